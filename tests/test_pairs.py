"""Adapters beside every other option: each pair is a cell that is compared with one process, or refused in words.

A new option adds a line to `BESIDE`, and for each of `ADAPTERS` a cell to its tests or a refusal to its check.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import test_distillation
import test_lora
import test_pruning
import test_zero
from cases import LORA, Case, ZeroCase
from parity import one_process

from cuboid.parallel.errors import UserErrors
from cuboid.trainer.check import Devices, check

TAUGHT = [replace(case, teacher="a folder") for case in test_distillation.CELLS + test_distillation.MORE_CELLS]
COMPARED: list[Case] = [
    *(test_lora.CASES + test_lora.EVERY),
    *(test_zero.CELLS + test_zero.MORE_CELLS),
    *(test_pruning.CELLS + test_pruning.MORE_CELLS),
    *TAUGHT,
]
"""Every case that the tests of these files compare with one process."""

ADAPTERS: Mapping[str, str] = {"linears": "all", "DoRA": "dora", "fused experts": "experts"}
"""A kind of adapter, and one of `LORA` that has it."""


@dataclass(frozen=True)
class Option:
    """Something that a case may have beside an adapter."""

    asks: Mapping[str, Any]
    """What a case is changed by to have it."""
    is_in: Callable[[Case], bool]


BESIDE: Mapping[str, Option] = {
    "tensor": Option({"tensor": 2}, lambda case: case.tensor > 1),
    "whole tokens": Option({"tensor": 2, "sequence": False}, lambda case: case.tensor > 1 and not case.sequence),
    "pipeline": Option({"pipeline": 2}, lambda case: case.pipeline > 1),
    "split backward": Option({"pipeline": 2, "schedule": "zbv"}, lambda case: case.schedule == "zbv"),
    "sharded": Option({"data": 2}, lambda case: case.data > 1 and case.shard is True),
    "replicated": Option({"data": 2, "shard": False}, lambda case: not case.shard),
    "experts divided": Option({"data": 2, "expert": 2, "family": "mixtral"}, lambda case: case.expert > 1),
    "recomputed": Option({"activation_checkpointing": "full"}, lambda case: case.activation_checkpointing == "full"),
    "taught": Option({"teacher": "a folder"}, lambda case: case.teacher is not None),
    "pruned": Option({"prune": "magnitude"}, lambda case: case.prune is not None),
    "ZeRO 1": Option({"data": 2, "zero_stage": 1}, lambda case: zero_stage(case) == 1),
    "ZeRO 2": Option({"data": 2, "zero_stage": 2}, lambda case: zero_stage(case) == 2),
    "ZeRO 3": Option({"data": 2, "zero_stage": 3}, lambda case: zero_stage(case) == 3),
}


def zero_stage(case: Case) -> int | None:
    return case.zero_stage if isinstance(case, ZeroCase) else None


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    one_process(Case()).save_pretrained(folder)
    return str(folder)


@functools.cache
def told(case: Case) -> set[str]:
    """What the check says of a case's recipe."""
    try:
        check(case.recipe(), Devices("cpu", 2))
    except UserErrors as errors:
        return {str(error) for error in errors.errors}
    return set()


def has(case: Case, adapter: str) -> bool:
    lora = LORA[case.lora] or {}
    if adapter == "linears":
        return bool(lora)
    return bool(lora.get({"DoRA": "dora", "fused experts": "target_parameters"}[adapter]))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("beside", BESIDE)
def test_a_pair_is_compared_or_refused(adapter: str, beside: str, teacher: str) -> None:
    option, family = BESIDE[beside], "mixtral" if adapter == "fused experts" else "llama"
    asks = {"family": family, **option.asks} | ({"teacher": teacher} if beside == "taught" else {})
    both = (ZeroCase if "zero_stage" in asks else Case)(**asks, lora=ADAPTERS[adapter])
    assert option.is_in(both)
    assert has(both, adapter)
    refused = told(both) - told(Case(family=both.family, lora=both.lora))
    cells = [str(case) for case in COMPARED if has(case, adapter) and option.is_in(case)]
    assert bool(cells) is not bool(refused), f"compared in {cells}, refused by {refused}"
