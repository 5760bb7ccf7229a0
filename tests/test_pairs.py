"""What changes how a model learns, beside every other option: each pair is compared with one process, or refused.

A new option adds a line to `BESIDE`, and for each of `LEARNING` a cell to its tests or a refusal to its check.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import test_distillation
import test_lora
import test_preference
import test_pruning
import test_qat
import test_structures
import test_zero
from cases import LORA, Case, ZeroCase
from parity import one_process

from cuboid.parallel.errors import UserErrors
from cuboid.trainer.check import Devices, check

TAUGHT = [
    replace(case, teacher="a folder")
    for case in test_distillation.CELLS
    + test_distillation.MORE_CELLS
    + test_distillation.RELATED
    + test_distillation.MORE_RELATED
]
COMPARED: list[Case] = [
    *(test_lora.CASES + test_lora.EVERY),
    *(test_zero.CELLS + test_zero.MORE_CELLS),
    *(test_pruning.CELLS + test_pruning.MORE_CELLS),
    *(test_structures.CELLS + test_structures.MORE_CELLS),
    *(test_qat.CELLS + test_qat.MORE_CELLS),
    *(test_preference.CELLS + test_preference.MORE_CELLS),
    *TAUGHT,
]
"""Every case that the tests of these files compare with one process."""


@dataclass(frozen=True)
class Option:
    """Something that a case may have."""

    asks: Mapping[str, Any]
    """What a case is changed by to have it."""
    is_in: Callable[[Case], bool]


def lora(case: Case, key: str) -> bool:
    return bool((LORA[case.lora] or {}).get(key))


def zero_stage(case: Case) -> int | None:
    return case.zero_stage if isinstance(case, ZeroCase) else None


LEARNING: Mapping[str, Option] = {
    "adapters": Option({"lora": "all"}, lambda case: case.lora != "none"),
    "DoRA": Option({"lora": "dora"}, lambda case: lora(case, "dora")),
    "adapters of experts": Option(
        {"lora": "experts", "family": "mixtral"}, lambda case: lora(case, "target_parameters")
    ),
    "adapters beside 4 bits": Option({"lora": "nf4", "family": "blocks"}, lambda case: lora(case, "base")),
    "rounded weights": Option({"quantize": "int4"}, lambda case: case.quantize is not None),
    "pairs of answers": Option({"preference": "sigmoid"}, lambda case: case.preference is not None),
    "structures pruned": Option({"prune": "layers"}, lambda case: case.prune in ("heads", "channels", "layers")),
    "a teacher": Option({"teacher": "a folder"}, lambda case: case.teacher is not None),
}

BESIDE: Mapping[str, Option] = {
    "tensor": Option({"tensor": 2}, lambda case: case.tensor > 1),
    "whole tokens": Option({"tensor": 2, "sequence": False}, lambda case: case.tensor > 1 and not case.sequence),
    "pipeline": Option({"pipeline": 2}, lambda case: case.pipeline > 1),
    "split backward": Option({"pipeline": 2, "schedule": "zbv"}, lambda case: case.schedule == "zbv"),
    "sharded": Option({"data": 2}, lambda case: case.data > 1 and case.shard is True),
    "replicated": Option({"data": 2, "shard": False}, lambda case: case.data > 1 and not case.shard),
    "experts divided": Option({"data": 2, "expert": 2, "family": "mixtral"}, lambda case: case.expert > 1),
    "recomputed": Option({"activation_checkpointing": "full"}, lambda case: case.activation_checkpointing == "full"),
    "taught": Option({"teacher": "a folder"}, lambda case: case.teacher is not None),
    "related": Option({"teacher": "a folder", "relations": "last"}, lambda case: case.relations is not None),
    "pruned": Option({"prune": "magnitude"}, lambda case: case.prune is not None),
    "rounded": Option({"quantize": "int4"}, lambda case: case.quantize is not None),
    "in pairs": Option({"preference": "sigmoid"}, lambda case: case.preference is not None),
    "ZeRO 1": Option({"data": 2, "zero_stage": 1}, lambda case: zero_stage(case) == 1),
    "ZeRO 2": Option({"data": 2, "zero_stage": 2}, lambda case: zero_stage(case) == 2),
    "ZeRO 3": Option({"data": 2, "zero_stage": 3}, lambda case: zero_stage(case) == 3),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    one_process(Case()).save_pretrained(folder)
    return str(folder)


@functools.cache
def told(case: Case) -> set[str]:
    """What the check says of a case's recipe, but that its data has no pairs: these cells make their own."""
    try:
        check(case.recipe(), Devices("cpu", 2))
    except UserErrors as errors:
        return {str(error) for error in errors.errors if "needs pairs of answers" not in str(error)}
    return set()


@pytest.mark.parametrize(
    ("learning", "beside"),
    [
        (learning, beside)
        for learning, own in LEARNING.items()
        for beside, option in BESIDE.items()
        if not own.asks.keys() & option.asks.keys() - {"family"}  # what it is itself
    ],
)
def test_a_pair_is_compared_or_refused(learning: str, beside: str, teacher: str) -> None:
    own, option = LEARNING[learning], BESIDE[beside]
    asks = {**option.asks, **own.asks}
    if beside == "experts divided":
        asks["family"] = "mixtral_blocks" if own.asks.get("family") == "blocks" else "mixtral"
    if "teacher" in asks:
        asks["teacher"] = teacher
    both = (ZeroCase if "zero_stage" in asks else Case)(**asks)
    assert option.is_in(both)
    assert own.is_in(both)
    if both.preference and (both.expert > 1 or both.lora == "experts"):
        both = replace(both, lora=both.lora if own.asks.get("lora") else "all", reference="adapter")
    refused = told(both) - told(Case(**{name: asks[name] for name in own.asks}))
    cells = [str(case) for case in COMPARED if own.is_in(case) and option.is_in(case)]
    assert bool(cells) is not bool(refused), f"compared in {cells}, refused by {refused}"
