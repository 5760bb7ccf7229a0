"""What the deepspeed engine cannot run, in words. Imports no torch.

It is offered where tests prove it exact; all else is refused, since much of it would go on in silence and be wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from cuboid.parallel.errors import FieldError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_fields import written

_OLDEST = (0, 19, 3)
"""Before it DeepSpeed scaled gradients wrongly under a model-parallel group."""
_SCHEDULES = ("1f1b", "gpipe")
_OTHER_PRECISION = {
    "compute": (
        "is something else in DeepSpeed: its bf16 goes on from rounded first weights, its autocast adds up layers in "
        "float32"
    ),
    "reduce": "would round gradients once under ZeRO 1 and in every backward under ZeRO 2 and 3",
}
"""Why a precision below float32 would not compute what the native engine computes."""


def engine_errors(recipe: Recipe, *, runs_here: bool) -> Iterator[FieldError]:
    """Every field that does not go with the recipe's engine, with the values that do.

    Args:
        runs_here: ranks start on this machine, so that the package must be there.
    """
    settings = recipe.parallel
    if settings.engine == "native":
        for field in ("zero_stage", "offload", "offload_path"):
            if (value := getattr(settings, field)) is not None:
                yield FieldError(
                    f"parallel.{field}", value, "needs parallel.engine=deepspeed", "use null, or that engine"
                )
        return
    if runs_here:
        yield from _package_errors()
    if settings.zero_stage is None:
        constraint = "leaves open what the deepspeed engine divides"
        stages = "1" if settings.pipeline > 1 else "1, 2 or 3"
        yield FieldError("parallel.zero_stage", "null", constraint, f"use {stages}")
    yield from _mesh_errors(recipe)
    yield from _schedule_errors(recipe)
    yield from _disk_errors(recipe, runs_here=runs_here)
    for field, constraint in _OTHER_PRECISION.items():
        if (value := getattr(recipe.precision, field)) != "float32":
            yield FieldError(f"precision.{field}", value, constraint, "use float32, or parallel.engine=native")


def _package_errors() -> Iterator[FieldError]:
    if find_spec("deepspeed") is None:
        remedy = "pip install 'cuboid[deepspeed]', or use native"
        yield FieldError("parallel.engine", "deepspeed", "needs the package deepspeed", remedy)
        return
    found = metadata.version("deepspeed")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        constraint = f"finds deepspeed {found}, which scales gradients wrongly"
        yield FieldError(
            "parallel.engine", "deepspeed", constraint, f"pip install 'deepspeed>={oldest}', or use native"
        )


def _mesh_errors(recipe: Recipe) -> Iterator[FieldError]:
    settings = recipe.parallel
    if settings.pipeline > 1 and settings.zero_stage not in (None, 1):
        constraint = (
            f"divides gradients in every backward, which fails or hangs under parallel.pipeline={settings.pipeline}"
        )
        yield FieldError("parallel.zero_stage", settings.zero_stage, constraint, "use 1, or parallel.pipeline=1")
    if settings.expert > 1:
        constraint = "gives data ranks experts of their own, and ZeRO averages each gradient over all of them"
        yield FieldError("parallel.expert", settings.expert, constraint, "use 1, or parallel.engine=native")
    for field, value, default in (("shard", settings.shard, True), ("reshard", settings.reshard, "auto")):
        if value is not default and value != default:
            constraint = "is for the native engine; under deepspeed parallel.zero_stage says what is divided"
            yield FieldError(f"parallel.{field}", written(value), constraint, f"use {written(default)}")


def _schedule_errors(recipe: Recipe) -> Iterator[FieldError]:
    settings = recipe.parallel
    if settings.schedule not in _SCHEDULES:
        constraint = "lays several stages on a rank, and the deepspeed engine runs one"
        yield FieldError("parallel.schedule", settings.schedule, constraint, "use 1f1b or gpipe")
    if settings.schedule == "gpipe" and settings.zero_stage in (2, 3):
        constraint = f"runs several backwards after one another, which parallel.zero_stage={settings.zero_stage} cannot"
        yield FieldError("parallel.schedule", "gpipe", constraint, "use 1f1b")


def _disk_errors(recipe: Recipe, *, runs_here: bool) -> Iterator[FieldError]:
    """Optimizer state on a disk: what DeepSpeed compiles for it, and where it writes."""
    settings = recipe.parallel
    path = settings.offload_path
    if settings.offload != "nvme":
        if path is not None:
            yield FieldError("parallel.offload_path", path, "needs parallel.offload=nvme", "use null, or nvme")
        return
    if settings.zero_stage in (1, 2):
        constraint = f"is taken for cpu, without a word, under parallel.zero_stage={settings.zero_stage}"
        yield FieldError("parallel.offload", "nvme", constraint, "use cpu, or parallel.zero_stage=3")
    if path is None:
        constraint = "leaves open where optimizer state lies"
        yield FieldError("parallel.offload_path", "null", constraint, "give a folder on a disk of the machine")
    if not runs_here:
        if path is not None and not Path(path).expanduser().is_absolute():
            constraint = "is relative, and a cluster's nodes and jobs each have a working directory of their own"
            yield FieldError("parallel.offload_path", path, constraint, "use an absolute path that every node has")
        return
    if missing := _missing_tools():
        constraint = f"is compiled by DeepSpeed, for which {' and '.join(missing)} cannot be found"
        yield FieldError("parallel.offload", "nvme", constraint, f"apt-get install {' '.join(missing)}, or use cpu")
    if path is not None and (fault := _fault_of(Path(path).expanduser())):
        yield FieldError("parallel.offload_path", path, fault, "give a folder on a disk of the machine")


def _missing_tools() -> list[str]:
    """What DeepSpeed's operator needs and this machine lacks, by Debian's names of the packages."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        missing = ["g++", "libaio-dev"]
    else:
        source = "#include <libaio.h>\nint main() { return io_setup(0, nullptr); }"
        command = [compiler, "-x", "c++", "-", "-o", os.devnull, "-laio"]
        missing = ["libaio-dev"] * bool(
            subprocess.run(command, input=source, capture_output=True, text=True).returncode
        )
    return missing + ["ninja-build"] * (shutil.which("ninja") is None)


def _fault_of(folder: Path) -> str | None:
    """Why optimizer state cannot lie there. DeepSpeed reads and writes past the page cache, which not all can."""
    if not folder.is_dir():
        return "is no folder"
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_RDWR | getattr(os, "O_DIRECT", 0)))
    except OSError as error:
        return f"cannot be written as DeepSpeed does (O_DIRECT): {error.strerror}"
    return None


def compile_notice(recipe: Recipe) -> str | None:
    """What the user is told before DeepSpeed compiles; None where it has done so, or has nothing to compile."""
    if recipe.parallel.offload != "nvme":
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch_extensions")  # torch's own place
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache).expanduser()
    if any(cache.glob("**/async_io.so")):
        return None
    words = f"DeepSpeed compiles its disk operator first: minutes, once; the result stays in {cache}"
    # torch waits for it, whoever made it
    left = next(cache.glob("**/async_io/lock"), None)
    return f"{words}; if nothing compiles there now, delete {left}" if left else words
