"""Seconds from the command to the first step, phase by phase, against a bare torchrun that only initialises.

    python benchmarks/start.py [--rounds 3]

The recipe is the quickstart (8 ranks, 2 x 2 x 2) with one step. The bare program imports torch and transformers in each
of 8 ranks, joins them over gloo and sums one number: what any launcher that starts fresh processes pays at least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cuboid.launch.progress import start_phases

CUBOID = Path(sys.executable).with_name("cuboid")
TORCHRUN = Path(sys.executable).with_name("torchrun")
BARE = """
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
"""


def cuboid_start(launcher: str, folder: Path) -> dict[str, float]:
    """Seconds of each phase of a one-step run."""
    run = [CUBOID, "train", "quickstart", "train.steps=1", "checkpoint.every=0", "optimizer.warmup_steps=0"]
    settings = [f"launch.launcher={launcher}", "track.to=none", "track.timeline_every=0", f"runs={folder}"]
    subprocess.run([*run, *settings], check=True, stdout=subprocess.DEVNULL, timeout=300)
    phases = start_phases(folder / "quickstart")
    return phases | {"total": sum(phases.values())}


def bare_start(folder: Path) -> dict[str, float]:
    """Seconds of the whole bare program."""
    script = folder / "bare.py"
    script.write_text(BARE)
    began = time.monotonic()
    command = [TORCHRUN, "--nproc-per-node=8", "--master-port=0", "--standalone", script]
    subprocess.run(
        command, check=True, stderr=subprocess.DEVNULL, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return {"total": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    starts = {
        "local": lambda folder: cuboid_start("local", folder),
        "ray": lambda folder: cuboid_start("ray", folder),
        "bare torchrun": bare_start,
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
    for _ in range(rounds):
        for name, start in starts.items():
            with tempfile.TemporaryDirectory() as folder:
                seen[name].append(start(Path(folder)))
    # the launcher with the most phases gives their order
    longest_first = sorted(seen.values(), key=lambda runs: -len(runs[0]))
    phases = list(dict.fromkeys(phase for runs in longest_first for phase in runs[0]))
    print(f"| seconds, median of {rounds} | " + " | ".join(seen) + " |")
    print("|---|" + "---|" * len(seen))
    for phase in phases:
        cells = [
            f"{statistics.median(run[phase] for run in runs):.2f}" if phase in runs[0] else "" for runs in seen.values()
        ]
        print(f"| {phase} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
