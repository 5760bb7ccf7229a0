"""What a user did wrong, in words: field, value, constraint, remedy. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """The user's mistake (recipe, arguments, paths): told without a traceback, and the command exits with 2."""


class FieldError(UserError):
    """One field of the recipe that cannot be right.

    Reads as ``parallel.tensor=2 does not divide num_key_value_heads=3; use 1 or 3``.
    """

    def __init__(self, field: str, value: object, constraint: str, remedy: str = "") -> None:
        self.field, self.value, self.constraint, self.remedy = field, value, constraint, remedy
        super().__init__(f"{field}={value} {constraint}" + (f"; {remedy}" if remedy else ""))


class UserErrors(UserError):
    """Several mistakes told at once, one a line."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


class RunFailed(RuntimeError):
    """A run that cannot go on although the recipe was right (NaN loss, lost storage); told in one line, exit code 1."""


def one_of(values: Sequence[object]) -> str:
    """'1', '1 or 3', '1, 2 or 4': the values that would work, for a remedy."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
