"""What the recipe's parts are made of: closed, strict settings, fields of later work, bounds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Strict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from cuboid.parallel.errors import one_of


@dataclass(frozen=True)
class Offered:
    """Marks a field whose schema knows the values of later work: only ``values`` work today."""

    values: tuple[object, ...]
    reason: str = "is not yet offered"
    """Why the others are refused."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self.values)}

    def check(self, value: object) -> object:
        # the types are compared too: True equals 1, but `shard: 1` is not `shard: true`
        if any(value == offered and type(value) is type(offered) for offered in self.values):
            return value
        remedy = f"use {one_of([written(offered) for offered in self.values])}"
        raise PydanticCustomError("cuboid", "not yet", {"constraint": self.reason, "remedy": remedy})


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5)]
Positive = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(gt=1)]
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Strict(False)]
Places = Annotated[tuple[CountOrZero, ...], Strict(False), Field(min_length=1)]
_LOSS_SCALING = (
    "has not the range of bfloat16 and float32: its losses would have to be scaled, which is offered on no device"
)
Number = Annotated[Literal["float32", "bfloat16", "float16"], Offered(("float32", "bfloat16"), _LOSS_SCALING)]


def written(value: object) -> str:
    """A value as YAML spells it, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


class Settings(BaseModel):
    """A closed, frozen part of the recipe; strict types: ``"2"`` is not a number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
