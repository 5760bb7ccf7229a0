"""An adapter that peft has saved: what its adapter_config.json says, as the recipe's settings. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.foreign import check_folder, read_json
from cuboid.trainer.recipe_lora import LoraSettings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_OURS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "bias": "bias",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "target_modules": "targets",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
}
"""peft's keys and the recipe's."""
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)
"""Keys that change nothing of what the saved values compute, that follow from the model (whether a linear is
transposed), or that are checked by themselves."""
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")
"""First values that leave the model beside them as it is; pissa and its like take their part out of it."""


def settings_of(lora: LoraSettings) -> LoraSettings:
    """The settings, with those of the adapter that they go on from in its place.

    Raises:
        FieldError: there is no such adapter, or it is of a kind that is not offered.
    """
    if lora.adapter is None:
        return lora
    defaults = LoraSettings(adapter=lora.adapter, base=lora.base)
    if changed := [name for name, value in lora if value != getattr(defaults, name)]:
        constraint = f"stands beside lora.adapter={lora.adapter}, whose {CONFIG} says it"
        raise FieldError(f"lora.{changed[0]}", getattr(lora, changed[0]), constraint, "leave it out")
    folder = Path(lora.adapter).expanduser()
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            constraint = f"has no {name}"
            raise FieldError("lora.adapter", lora.adapter, constraint, "give a folder that peft's save_pretrained made")
    try:
        check_folder(folder)
        said: dict[str, Any] = read_json(folder / CONFIG)
        given = {ours: said[theirs] for theirs, ours in _OURS.items() if said.get(theirs) is not None}
        own = {"rank": said["r"], "alpha": float(said["lora_alpha"]), "adapter": lora.adapter, "base": lora.base}
        settings = LoraSettings.model_validate({**given, **own})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        constraint = f"has an {CONFIG} that cannot be gone on from: {str(error).splitlines()[0]}"
        raise FieldError("lora.adapter", lora.adapter, constraint, "use a LoRA adapter of named targets") from None
    others = [key for key, value in said.items() if value and key not in (*_OURS, *_WITHOUT_EFFECT)]
    if said.get("peft_type") != "LORA":
        others = [f"peft_type={said.get('peft_type')}"]
    if (init := said.get("init_lora_weights", True)) not in _PLAIN_INITS:
        others.append(f"init_lora_weights={init}, which changes the model itself")
    if others:
        constraint = f"uses {', '.join(others)}, which is not offered"
        raise FieldError("lora.adapter", lora.adapter, constraint, "use a plain LoRA adapter")
    return settings


def is_adapter_folder(folder: Path) -> bool:
    """Whether peft's save_pretrained has left an adapter here, and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def settings_and_base(folder: Path) -> tuple[LoraSettings, str]:
    """Of an adapter, with the folder or hub id of the model that it is of.

    Raises:
        UserError: it names none, or it is of a kind that is not offered.
    """
    try:
        settings = settings_of(LoraSettings(adapter=str(folder)))
    except FieldError as error:
        raise UserError(f"{folder} {error.constraint}; {error.remedy}") from None
    if not (base := read_json(folder / CONFIG).get("base_model_name_or_path")):
        raise UserError(f"{folder}: its {CONFIG} names no base_model_name_or_path; write the model's folder into it")
    return settings, str(base)
