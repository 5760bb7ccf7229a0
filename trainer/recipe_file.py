"""A recipe from a file and overrides: every error at once, with file and line or override. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cuboid.parallel.errors import FieldError, UserError, UserErrors
from cuboid.trainer import recipe_errors, recipe_yaml
from cuboid.trainer.recipe import Recipe, validated
from cuboid.trainer.recipe_yaml import Mark
from cuboid.trainer.runlog import redact

MAX_BYTES = 1 << 18


class RecipeFile:
    """Plain data of a recipe, where each field stands, and what was wrong with the text itself."""

    def __init__(self, text: str, where: str) -> None:
        parsed = recipe_yaml.parse_file(text, where)
        self.where = where
        self.data: dict[str, Any] = parsed.data
        self.marks, self.errors = parsed.marks, parsed.errors

    def override(self, text: str) -> None:
        """Sets ``a.b=value``; a mapping replaces the whole value. What is wrong with it is told by `recipe`."""
        mark = Mark(MAX_BYTES, f"override `{text}`")
        name, equals, value = text.partition("=")
        path = tuple(name.split("."))
        try:
            if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in path):
                raise UserError("is not of the form section.key=value")
            parsed = recipe_yaml.parse_value(value, path, mark)
            self._set(path, parsed.data, mark)
            self.errors += parsed.errors
        except UserError as error:
            self.marks[(text,)] = mark
            self.errors.append(((text,), error))

    def recipe(self) -> Recipe:
        """The recipe; raises UserErrors with everything that is wrong in the file, the overrides and the fields."""
        recipe, details = validated(self.data)
        broken = {path for path, _ in self.errors}
        found = [*self.errors, *(pair for pair in recipe_errors.mistakes(details, self.data) if pair[0] not in broken)]
        found += _secrets(self.data, ())
        if recipe is None or found:
            found.sort(key=lambda pair: self._mark(pair[0]).order)
            raise UserErrors([UserError(f"{self._mark(path).text}: {error}") for path, error in found])
        return recipe

    def located(self, error: UserError) -> UserErrors:
        """The same errors, those of a field with the place where the field stands."""
        return UserErrors([self._located(one) for one in getattr(error, "errors", (error,))])

    def _located(self, error: UserError) -> UserError:
        if not isinstance(error, FieldError):
            return error
        return UserError(f"{self._mark(tuple(error.field.split('.'))).text}: {error}")

    def _mark(self, path: tuple[str, ...]) -> Mark:
        """Where a field stands, or the nearest section around it."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, Mark(0, self.where))

    def _set(self, path: tuple[str, ...], value: object, mark: Mark) -> None:
        place = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if place.get(part) is None:
                place[part] = {}
                self.marks[path[:depth]] = mark
            place = place[part]
            if not isinstance(place, dict):
                raise UserError(f"{'.'.join(path[:depth])} is not a mapping")
        place[path[-1]] = value
        below = [key for key in self.marks if key[: len(path)] == path]
        for key in below:
            del self.marks[key]
        self.marks[path] = mark


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A valid recipe from a file or a shipped recipe's name, with ``a.b=value`` overrides.

    Raises UserErrors with everything that is wrong. What depends on the model or the machine: `check.check`.
    """
    return read_recipe(name_or_path, overrides).recipe()


def read_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """The file with its overrides, fields not yet checked; raises UserError where there is no such file or no YAML."""
    path = find_recipe(str(name_or_path))
    source = RecipeFile(_text(path), _display(path))
    for override in overrides:
        source.override(override)
    return source


def shipped_recipes() -> dict[str, Path]:
    """Recipes in the package, by bare name."""
    folder = Path(str(resources.files("cuboid.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that a bare name or a path means; raises UserError that lists the names."""
    shipped = shipped_recipes()
    known = f"shipped recipes, by bare name: {', '.join(shipped)}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"there is no recipe file {name}; {known}")
    if name not in shipped:
        guess = recipe_errors.nearest(name, list(shipped))
        hint = f"did you mean {guess}? " if guess else ""
        raise UserError(f"no recipe is called {name}; {hint}{known}; a file is given with its .yaml")
    return shipped[name]


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal one."""
    return recipe_yaml.dump(recipe.model_dump(mode="json"))


def _secrets(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], UserError]]:
    """Fields that hold a token or password, which would be written beside the run and sent to its tracker."""
    if isinstance(value, str) and (shown := redact(value)) != value:
        constraint = "holds a secret, which recipe.yaml, checkpoints and trackers would hold too"
        yield path, FieldError(".".join(path), shown, constraint, "leave it in the environment")
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _secrets(inner, (*path, str(key)))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES} bytes, which no recipe is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error


def _display(path: Path) -> str:
    """The path as a user would write it from here."""
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if inside else str(path)
