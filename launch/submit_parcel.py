"""What a submitted run needs on the cluster, in one folder: the resolved recipe, the code, small local files.

The code travels as what a wheel holds, unpacked. A wheel itself would need pip and a build backend here, and Ray
installs one on every node with all its dependencies. Ray puts the folder first on PYTHONPATH of the driver and of every
rank, before whatever cuboid the cluster has installed. Imports no torch.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cuboid.parallel.errors import FieldError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import dump_recipe
from cuboid.trainer.version import version

RECIPE = "recipe.yaml"
LIMIT_BYTES = 100 << 20
"""The largest upload that Ray's job API takes (`client_max_size` of its server)."""

_PACKAGES = ("parallel", "trainer", "recipes", "launch")
_CODE = (".py", ".yaml", ".typed")
_OWN = {"cuboid", RECIPE}
_FIELDS = (
    "model.pretrained",
    "data.path",
    "data.eval_path",
    "data.tokenizer",
    "data.chat_template",
    "lora.adapter",
    "distill.teacher",
    "distill.cache",
    "preference.reference",
)
"""Fields of the recipe that may name a local file or folder."""


@dataclass(frozen=True)
class Parcel:
    """A folder that is ready to be sent, and what of it takes how many bytes."""

    folder: Path
    bytes_by_part: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_part.values())


def pack(recipe: Recipe, folder: Path) -> Parcel:
    """Fill ``folder``, which is not there yet. A relative path of the recipe that is found here travels and keeps its
    name; one that leads out of the working directory gets another. An absolute one means a place that the nodes see.

    Raises:
        FieldError: the files are too large, or would lie where the code does.
    """
    _write_code(folder / "cuboid")
    about = folder / f"cuboid-{version()}.dist-info" / "METADATA"  # what `version` reads there
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: cuboid\nVersion: {version()}\n")
    sizes = {"code": _bytes_in(folder)}
    plain = recipe.model_dump(mode="json")
    found = {field: files for field in _FIELDS if (files := _take(plain, field))}
    sizes |= {field: sum(source.stat().st_size for source in files) for field, files in found.items()}
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = max(found, key=lambda field: sizes[field])
        limit = f"Ray's job API takes {LIMIT_BYTES / 1e6:,.0f} MB in all"
        constraint = f"is {sizes[largest] / 1e6:,.0f} MB here, and {limit}"
        remedy = "put it on storage that every node sees and give its absolute path"
        raise FieldError(largest, _value(recipe, largest), constraint, remedy)
    for field, files in found.items():
        for source, inside in files.items():
            if inside.parts[0] in _OWN:
                constraint = f"would lie where {inside.parts[0]} of the job does"
                raise FieldError(field, _value(recipe, field), constraint, "give it another name")
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / inside)
    (folder / RECIPE).write_text(dump_recipe(Recipe.model_validate(plain)), "utf-8")
    return Parcel(folder, sizes)


def _write_code(folder: Path) -> None:
    for package in _PACKAGES:
        source, target = Path(str(resources.files(f"cuboid.{package}"))), folder / package
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix in _CODE:
                shutil.copyfile(file, target / file.name)


def _take(plain: dict[str, Any], field: str) -> dict[Path, Path]:
    """The files here that a field means, each with its place in the parcel; the field then says that place."""
    *sections, name = field.split(".")
    for section in sections:
        plain = plain[section] or {}
    value, taken = plain.get(name), dict[Path, Path]()
    if value is None:
        return taken
    places = []
    for one in value if isinstance(value, list) else [value]:
        files = _files(one)
        taken |= {file: _inside(file) for file in files}
        places.append(str(_inside(Path(one))) if files else one)
    plain[name] = places if isinstance(value, list) else places[0]
    return taken


def _files(value: str) -> list[Path]:
    """Of a relative path or glob, without hidden ones; none where the value means something else, as a hub id."""
    if os.path.isabs(os.path.expanduser(value)):
        return []
    matches = [value] if os.path.exists(value) or not glob.has_magic(value) else glob.glob(value, recursive=True)
    return sorted({file for match in matches for file in _walk(Path(match))})


def _walk(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    elif place.is_dir():
        for folder, below, names in os.walk(place):
            below[:] = [name for name in below if not name.startswith(".")]  # .git above all
            yield from (Path(folder, name) for name in names if not name.startswith("."))


def _inside(path: Path) -> Path:
    """Where a relative path lies in the parcel: ``../../data`` becomes ``above-2/data``."""
    parts = Path(os.path.normpath(path)).parts
    above = parts.count("..")
    return Path(f"above-{above}", *parts[above:]) if above else Path(*parts)


def _value(recipe: Recipe, field: str) -> object:
    value: Any = recipe
    for part in field.split("."):
        value = getattr(value, part)
    return value


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
