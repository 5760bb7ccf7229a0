"""What the `checkpoint` commands print. Imports no torch."""

from __future__ import annotations

import time
from math import prod
from pathlib import Path
from typing import Any

from cuboid.parallel.errors import UserError
from cuboid.trainer import inspection


def print_listing(path: Path) -> None:
    """A line for each checkpoint; raises UserError where there is none."""
    rows = inspection.listing(path)
    if not rows:
        raise UserError(f"{path} holds no checkpoint; give a run's folder, as runs/quickstart")
    for row in rows:
        state = row["fault"] or ", ".join(mark for mark in ("latest", "best") if row[mark])
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
        print(f"{row['step']:>8}  {megabytes(row['bytes']):>12}  {written}  {row['path']}  {state}".rstrip())


def print_inspection(path: Path) -> None:
    """Step, size, recipe facts and every tensor."""
    found = inspection.inspect(path)
    facts: dict[str, Any] = found["facts"]
    print(f"checkpoint  {found['path']}")
    print(f"step        {found['step']}")
    print(f"size        {megabytes(found['bytes'])} in {len(found['files'])} files")
    for key, value in facts.items():
        if key not in ("step", "recipe", "model_config", "adapter"):
            print(f"{key:<12}{value}")
    if adapter := facts.get("adapter"):
        share = f"{adapter['trained']:,} of {adapter['parameters']:,} numbers"
        print(f"adapter     rank {adapter['settings']['rank']}: {share}")
        print(f"base        {adapter['base'] or 'drawn from the seed'}")
    tensors: dict[str, dict[str, Any]] = found["tensors"]
    print(f"tensors     {len(tensors)}, {sum(prod(tensor['shape']) for tensor in tensors.values()):,} numbers")
    for name, tensor in sorted(tensors.items()):
        print(f"  {name}  {tensor['dtype']}  {list(tensor['shape'])}")


def print_verification(path: Path) -> bool:
    """Every fault in a line; whether there is none."""
    checkpoint = inspection.resolve(path, whole=False)
    faults = inspection.verify(checkpoint)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{checkpoint}: every byte is as its manifest says")
    return not faults


def megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:,.1f} MB"
