"""An adapter run's checkpoint -> peft's adapter, or a whole model with it merged in; loaded again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.adapter_base import Base
from cuboid.trainer.adapter_folder import TENSORS
from cuboid.trainer.adapters import (
    base_name,
    expert_matrices,
    load_adapter,
    stored_name,
    whole_peft_model,
    with_adapters,
)
from cuboid.trainer.assemble import initial_weights
from cuboid.trainer.export import (
    Exported,
    Weights,
    open_weights,
    probe,
    trained_config,
    valid_checkpoint,
    without_progress_bar,
    write_tokenizer,
    write_words,
)
from cuboid.trainer.manifest import CheckpointError
from cuboid.trainer.model import Blueprint, draw_blueprint, local_folder, whole_model
from cuboid.trainer.model_config import config_of
from cuboid.trainer.out_folder import disk_errors_of, new_folder
from cuboid.trainer.recipe import Recipe, validated
from cuboid.trainer.recipe_lora import LoraSettings
from cuboid.trainer.weights import fingerprint, shapes_in

TOLERANCE = 1e-5
MERGED_TOLERANCE = 1e-4
"""Of the largest logit: W + B A is one rounded matrix, where W x + B A x were two products. So it is where W stands for
W less what was taken out of it."""


def export_adapter(source: Path, out: Path, *, merge: bool = False, overwrite: bool = False) -> Exported:
    """Write the adapter of a checkpoint, or of a run's newest valid one, for `PeftModel.from_pretrained`; with
    ``merge`` the whole model with it, for `AutoModelForCausalLM.from_pretrained`.

    The model is in memory whole, twice one after the other. ``out`` appears when all is written and checked.

    Raises:
        UserError: it is no adapter run's, its base has changed or stands in no folder, or ``out`` may not be written.
        RunFailed: loaded again, it does not give the logits of the checkpoint's own values in peft's model.
    """
    checkpoint, refused = valid_checkpoint(Path(source))
    weights, facts = open_weights(checkpoint)
    recipe, settings = _recipe(checkpoint, facts, merge=merge)
    blueprint = draw_blueprint(config_of(recipe), attention=recipe.model.attention)
    base = Base(with_adapters(blueprint, settings), settings, initial_weights(recipe, blueprint))
    model = _filled(recipe, blueprint, settings, weights, base)
    expected = _logits(model, blueprint)
    with new_folder(Path(out), source=checkpoint, overwrite=overwrite) as partial:
        if merge:
            with disk_errors_of(out), without_progress_bar():
                model.merge_and_unload().save_pretrained(partial)
                write_words(partial, trained_config(facts, weights), facts)
            del model
            difference = (_logits(_loaded(partial), blueprint) - expected).abs().max() / expected.abs().max()
        else:
            if settings.takes_out:
                model = _beside_whole(model, recipe, blueprint, settings, base)
            with disk_errors_of(out):
                # peft would save the frozen head too where that is a target
                model.save_pretrained(partial, save_embedding_layers=False)
                write_tokenizer(partial, blueprint.config, facts)
            del model
            _check_names(partial, weights)
            loaded = load_adapter(_its_base(recipe, blueprint, settings, base), partial)
            difference = (_logits(loaded, blueprint) - expected).abs().max()
            if settings.takes_out:
                difference /= expected.abs().max()
        limit = MERGED_TOLERANCE if merge or settings.takes_out else TOLERANCE
        if not difference <= limit:
            words = f"its logits differ by {difference:.1e}, more than {limit:.0e}"
            raise RunFailed(f"{checkpoint} was not exported: loaded again, {words}")
    return Exported(checkpoint, tuple(refused), difference.item(), weights.left_out)


def _recipe(checkpoint: Path, facts: dict[str, Any], *, merge: bool) -> tuple[Recipe, LoraSettings]:
    """Of the run, where its adapter can be exported."""
    recipe, errors = validated(facts["recipe"])
    if recipe is None:
        raise CheckpointError(f"{checkpoint} has a recipe that this version does not read: {errors[0]['msg']}")
    if recipe.lora is None:
        raise UserError(f"{checkpoint} is of a run without lora: it holds the whole model; use --to hf")
    pretrained = recipe.model.pretrained
    if pretrained is None and not merge:
        words = "its frozen model was drawn from the seed and stands in no folder that an adapter could name"
        raise UserError(f"{checkpoint}: {words}; use --to merged")
    if recipe.model.layers is not None and not merge:
        words = f"its frozen model has some of the layers of {pretrained}, which an adapter could not say"
        raise UserError(f"{checkpoint}: {words}; use --to merged")
    if pretrained is not None and fingerprint(local_folder(pretrained)) != facts["adapter"]["base"]:
        raise UserError(f"{checkpoint}: the model in {pretrained} is not the one that was trained on (other weights)")
    settings = LoraSettings.model_validate(facts["adapter"]["settings"])
    if settings.only_merged and not merge:
        words = f"lora.init={settings.init} left matrices that were then rounded to lora.base={settings.base}"
        raise UserError(f"{checkpoint}: {words}, and no adapter beside those of {pretrained} is equal; use --to merged")
    return recipe, settings


def _filled(recipe: Recipe, blueprint: Blueprint, settings: LoraSettings, weights: Weights, base: Base) -> Any:
    """peft's own model: the base as the run held it, and what was trained from the checkpoint."""
    model = _peft_model(recipe, blueprint, settings)
    named = dict(model.base_model.model.named_parameters())
    shapes = {matrix.weight: shape for matrix, shape in expert_matrices(model)}
    trained = {
        name: parameter.data.view(shapes.get(parameter, parameter.shape))
        for name, parameter in named.items()
        if parameter.requires_grad
    }
    if faults := weights.faults(trained):
        raise RunFailed(f"{weights.path} cannot be exported: {'; '.join(faults[:5])}")
    weights.fill(trained)
    for name, parameter in named.items():
        if name not in trained:
            base.copy_into(base_name(name), tuple(slice(0, size) for size in parameter.shape), parameter.data)
    return model


def _beside_whole(filled: Any, recipe: Recipe, blueprint: Blueprint, settings: LoraSettings, base: Base) -> Any:
    """The same function as an adapter of twice the rank beside the whole W: of W less s B0 A0, and s B A beside it, is
    s (B A - B0 A0) = s [B, -B0] [A; A0] beside W (peft's "Convert PiSSA to LoRA")."""
    alpha = settings.alpha * (2**0.5 if settings.rslora else 2)
    doubled = settings.model_copy(update={"rank": 2 * settings.rank, "alpha": alpha, "init": "default"})
    model, values = _peft_model(recipe, blueprint, doubled), dict(filled.base_model.model.named_parameters())
    for name, parameter in model.base_model.model.named_parameters():
        owner, _, part = name.partition(".lora_")
        if part.startswith("A."):
            parameter.data.copy_(torch.cat([values[name].data, base.factors(owner)[0]]))
        elif part.startswith("B."):
            parameter.data.copy_(torch.cat([values[name].data, -base.factors(owner)[1]], dim=1))
        else:  # of the frozen ones none is saved
            parameter.data.copy_(values[name])
    return model


def _peft_model(recipe: Recipe, blueprint: Blueprint, settings: LoraSettings) -> Any:
    base = recipe.model.pretrained
    if base is not None and Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().absolute())
    return whole_peft_model(whole_model(blueprint), settings, blueprint.anatomy, base=base)


def _its_base(recipe: Recipe, blueprint: Blueprint, settings: LoraSettings, base: Base) -> nn.Module:
    """What the adapter is loaded beside: the model of the folder that it names, as users load it, or with the numbers
    that the run's 4 bits stand for."""
    assert recipe.model.pretrained is not None
    model = _loaded(local_folder(recipe.model.pretrained))
    for name, parameter in model.named_parameters() if settings.base else ():
        base.copy_into(name, tuple(slice(0, size) for size in parameter.shape), parameter.data)
    return model


def _check_names(folder: Path, weights: Weights) -> None:
    """Every tensor that was trained is in the file, and nothing else."""
    written, trained = shapes_in(folder / TENSORS).keys(), {stored_name(name) for name in weights.records}
    if different := sorted(written ^ trained):
        raise RunFailed(f"{weights.path} was not exported: {different[0]} is not in both it and {TENSORS}")


def _loaded(folder: Path) -> nn.Module:
    with without_progress_bar():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )


@torch.no_grad()
def _logits(model: nn.Module, blueprint: Blueprint) -> Tensor:
    return model.eval()(input_ids=probe(blueprint.config)).logits
