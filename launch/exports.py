"""`cuboid export`: which function makes which format, and what is said of it."""

from __future__ import annotations

import sys
from dataclasses import replace

from cuboid.launch.export_options import ExportOptions, Format, Way
from cuboid.launch.reports import megabytes
from cuboid.parallel.errors import FieldError
from cuboid.trainer import inspection
from cuboid.trainer.calibration import Calibration
from cuboid.trainer.compress import Compressed, Method, compress
from cuboid.trainer.export import Exported, export_hf
from cuboid.trainer.held_out import SAMPLES

_ROUNDED = (Format.int8, Format.int4, Format.int8_int4, Format.float8)
_BELONGS_TO = {
    "eval_path": (*_ROUNDED, Format.lowrank),
    "group_size": (Format.int4, Format.int8_int4),
    "method": (Format.int4, Format.lowrank),
    "calibration": (Format.int4, Format.lowrank),
    "calibration_samples": (Format.int4, Format.lowrank),
    "head": _ROUNDED,
    "rank": (Format.lowrank,),
    "energy": (Format.lowrank,),
    "module": (Format.lowrank,),
}
"""Options that say something of some formats alone."""
_WAYS = {Format.int4: Way.gptq, Format.lowrank: Way.whitened}
"""The method of each format that asks a calibration set."""


def export(options: ExportOptions) -> None:
    """Write what is asked for, prove that it loads, and say what it is.

    Raises:
        UserError: what is asked for cannot be had.
        RunFailed: what was written does not give the model's logits.
    """
    for name, formats in _BELONGS_TO.items():
        value = getattr(options, name)
        if value not in (None, False, []) and options.to not in formats:
            constraint = f"says nothing of --to {options.to}"
            remedy = f"leave it out, or use --to {' or '.join(formats)}"
            raise FieldError(f"--{name.replace('_', '-')}", value, constraint, remedy)
    if options.best:
        options = replace(options, source=inspection.best(options.source), best=False)
    if options.to is Format.hf:
        _say_exported(options, export_hf(options.source, options.out, overwrite=options.overwrite))
        return
    if options.to in (Format.adapter, Format.merged):
        from cuboid.trainer.export_adapter import export_adapter

        merge = options.to is Format.merged
        _say_exported(options, export_adapter(options.source, options.out, merge=merge, overwrite=options.overwrite))
        return
    made = compress(
        options.source, options.out, _method(options), eval_path=options.eval_path, overwrite=options.overwrite
    )
    _say_compressed(options, made)


def _method(options: ExportOptions) -> Method:
    calibration = _calibration(options)
    if options.to is Format.lowrank:
        from cuboid.trainer.low_rank import LowRank

        modules = tuple(options.module or ())
        return LowRank(rank=options.rank, energy=options.energy, modules=modules, calibration=calibration)
    from cuboid.trainer.model_folder import trained_rounding
    from cuboid.trainer.quantize import GROUP_SIZE, Quantization

    learned = trained_rounding(options.source)
    together = learned.inputs_together if learned and learned.scheme == options.to else None
    if learned and options.method is not None:
        constraint = f"rounds otherwise than this run has learned (quantize.scheme={learned.scheme})"
        raise FieldError("--method", options.method, constraint, "leave it out")
    group_size = options.group_size or together or GROUP_SIZE
    return replace(Quantization.named(options.to, group_size=group_size, head=options.head), calibration=calibration)


def _calibration(options: ExportOptions) -> Calibration | None:
    wanted = _WAYS.get(options.to)
    if options.method is None:
        for name in ("calibration", "calibration_samples"):
            if (value := getattr(options, name)) is not None:
                constraint = "says nothing without a method that asks for it"
                raise FieldError(f"--{name.replace('_', '-')}", value, constraint, f"add --method {wanted}")
        return None
    if options.method is not wanted:
        raise FieldError("--method", options.method, f"says nothing of --to {options.to}", f"use --method {wanted}")
    return Calibration(options.calibration, options.calibration_samples or SAMPLES)


def _say_exported(options: ExportOptions, done: Exported) -> None:
    _say_source(done)
    if done.sizes:
        before, after = map(megabytes, done.sizes)
        print(f"size           {before} -> {after}, what was pruned as a whole is left out")
    print(f"{options.out}: made of {done.checkpoint}; loaded again, its logits differ by {done.difference:.1e} at most")


def _say_compressed(options: ExportOptions, done: Compressed) -> None:
    if done.exported:
        _say_source(done.exported)
    if done.passage and done.before and done.after:
        where = f"{done.after.tokens:,} tokens of {done.passage.words}"
        print(f"held-out loss  {done.before} -> {done.after}, {where}")
    else:
        print("held-out loss  not measured: no text was held out (data.eval_path); name one with --eval-path")
    if done.calibration:
        print(f"calibration    {done.calibration}")
    print(f"size           {megabytes(done.bytes_before)} -> {megabytes(done.bytes_after)}")
    print("\n".join(done.words))
    source = done.exported.checkpoint if done.exported else options.source
    print(f"{options.out}: made of {source}; loaded again, its logits are equal")


def _say_source(done: Exported) -> None:
    for fault in done.refused:
        print(f"refused: {fault}", file=sys.stderr)
    if done.left_out:
        print(
            f"left out: {len(done.left_out)} biases of routers (moe.bias_update), for which the format has no place: "
            "tokens may choose other experts than in training"
        )
