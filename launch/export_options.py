"""The options of `cuboid export`, as one value. Imports no torch; typer alone, for what help says of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

_Options = TypeVar("_Options")


class Format(StrEnum):
    """What an export makes."""

    hf = "hf"
    adapter = "adapter"
    merged = "merged"
    int8 = "int8"
    int4 = "int4"
    int8_int4 = "8da4w"
    float8 = "float8"
    lowrank = "lowrank"


class Way(StrEnum):
    """What decides how a model is made smaller, beside its weights."""

    gptq = "gptq"
    whitened = "whitened"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, to what, and where to. None stands for an option that was not given."""

    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder, a checkpoint, or a model's folder.")
    ]
    out: Annotated[Path, typer.Option(help="Folder to write.")]
    to: Annotated[
        Format,
        typer.Option(
            help="hf: what AutoModelForCausalLM.from_pretrained loads; int8, int4, float8: the same, its weights "
            "rounded; 8da4w: weights to int4, and what layers read to int8; "
            "lowrank: products of narrow layers, which cuboid alone reads; of a run with lora adapter: what "
            "PeftModel.from_pretrained loads, and merged: the whole model with it, as hf."
        ),
    ] = Format.hf
    best: Annotated[
        bool, typer.Option("--best", help="The run's checkpoint with the lowest held-out loss (checkpoint.best).")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False
    eval_path: Annotated[
        str | None,
        typer.Option(help="Text for the held-out loss before and after; default: the recipe's data.eval_path."),
    ] = None
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="int4, 8da4w: inputs that share a scale; default: as trained (quantize.group_size), or 32."
        ),
    ] = None
    method: Annotated[
        Way | None,
        typer.Option(
            help="int4: gptq, rounded so that each layer's outputs move least; lowrank: whitened, the products whose "
            "outputs are nearest. Both ask a calibration set. Default: the nearest weights."
        ),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(help="Text for --method, like that of the training; default: what the run trained on."),
    ] = None
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="How many samples are read of it; default: 32.")
    ] = None
    rank: Annotated[int | None, typer.Option(min=1, help="lowrank: inner width of every product.")] = None
    energy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="lowrank: the share of each weight's squared singular values that is kept."),
    ] = None
    module: Annotated[
        list[str] | None, typer.Option(help="lowrank: layers by their last name, as q_proj; give it again for another.")
    ] = None
    head: Annotated[
        bool, typer.Option("--head", help="int8, int4, 8da4w, float8: round the head too, if it is untied.")
    ] = False


def takes(options: type[_Options]) -> Callable[[Callable[[_Options], None]], Callable[..., None]]:
    """Gives a command one option for each field of a dataclass, and hands it the dataclass."""

    def decorate(command: Callable[[_Options], None]) -> Callable[..., None]:
        def called(**values: Any) -> None:
            command(options(**values))

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = inspect.signature(options, eval_str=True)  # type: ignore[attr-defined]
        return called

    return decorate
