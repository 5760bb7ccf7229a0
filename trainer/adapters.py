"""The peft door: adapters put into a model's shape on `meta`, their first values, and what is trained of it.

peft names what it adds: ``q_proj`` becomes ``q_proj.base_layer`` with ``q_proj.lora_A.default`` and
``q_proj.lora_B.default`` beside it, a module that is trained whole ``lm_head.modules_to_save.default``. These are the
global names of an adapter run; `base_name` takes them back to the model's own.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cuboid.parallel.stages import Anatomy
from cuboid.trainer.adapter_base import Base
from cuboid.trainer.adapter_folder import TENSORS, settings_of
from cuboid.trainer.model import Blueprint, seed_of
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_lora import LoraSettings
from cuboid.trainer.weights import CopyInto, from_file, from_full, shapes_in

ADAPTER = "default"
"""peft's name of a model's only adapter."""
_LENGTHS = ".lora_magnitude_vector."
"""In the names of DoRA's lengths of rows."""
_INITS: Mapping[str, bool | str] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
"""What peft calls those first values that it draws; the others are made here, for a model that is still on `meta`."""
_WRAPPED = re.compile(rf"\.base_layer(?=\.)|\.original_module(?=\.)|\.modules_to_save\.{ADAPTER}(?=\.)")


def adapt(recipe: Recipe, blueprint: Blueprint, weights: CopyInto) -> tuple[Blueprint, CopyInto]:
    """The recipe's model with its adapters, and the first values of all of it.

    Args:
        blueprint: of the model alone.
        weights: its values, by its own names.
    """
    assert recipe.lora is not None
    settings = settings_of(recipe.lora)
    adapted = with_adapters(blueprint, settings)
    base = Base(adapted, settings, weights)
    drawn = from_full(lambda name: _first_value(adapted, name, settings, base, seed=recipe.seed))
    lengths = from_full(lambda name: _lengths(adapted, name, weights))
    stored = settings.adapter and _from_adapter(_file(settings.adapter), adapted.model)
    of_adapter = trained(adapted.model).keys()

    def copy_into(name: str, part: tuple[slice, ...], target: Tensor) -> None:
        if stored and name in of_adapter:
            stored(name, part, target)
        elif _LENGTHS in name:
            lengths(name, part, target)
        elif ".lora_" in name:
            drawn(name, part, target)
        else:
            base.copy_into(base_name(name), part, target)

    return adapted, copy_into


def misfits(blueprint: Blueprint, settings: LoraSettings) -> list[str]:
    """In what the adapter that is gone on from is not one of this model, in words."""
    assert settings.adapter is not None
    needed = {
        stored_name(name): list(_stored_shape(parameter))
        for name, parameter in trained(with_adapters(blueprint, settings).model).items()
    }
    found = shapes_in(_file(settings.adapter))
    wrong = [f"{name} is missing" for name in sorted(needed.keys() - found.keys())]
    wrong += [f"{name} is too much" for name in sorted(found.keys() - needed.keys())]
    return wrong + [
        f"{name} has shape {found[name]}, this model's has {shape}"
        for name, shape in needed.items()
        if found.get(name, shape) != shape
    ]


def _file(folder: str) -> Path:
    return Path(folder).expanduser() / TENSORS


def _from_adapter(path: Path, model: nn.Module) -> CopyInto:
    """A saved adapter's values for the parameters of ``model`` that are trained."""
    stored = from_file(path, stored_name)

    def copy_into(name: str, part: tuple[slice, ...], target: Tensor) -> None:
        shape = _stored_shape(parameter := model.get_parameter(name))
        if shape == parameter.shape:
            stored(name, part, target)
        else:  # of experts: another shape of the same numbers
            whole = torch.empty(shape)
            stored(name, tuple(slice(0, size) for size in shape), whole)
            target.copy_(whole.view(parameter.shape)[part])

    return copy_into


def _stored_shape(parameter: Tensor) -> torch.Size:
    """What peft saves: of fused experts' B [F, r, E] the matrix [F, r E]."""
    return parameter.shape if parameter.dim() < 3 else parameter.flatten(1).shape


def with_adapters(blueprint: Blueprint, settings: LoraSettings) -> Blueprint:
    """The blueprint of the model with adapters beside its linears, all else frozen."""
    model = copy.deepcopy(blueprint.model)
    inject(model, settings, blueprint.anatomy)
    return replace(blueprint, model=model)


def inject(model: nn.Module, settings: LoraSettings, anatomy: Anatomy) -> None:
    """Put adapters into a whole model in place, on whatever device it is, and freeze what they leave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of GPT-2's transposed linears, and sees to them itself
        peft.inject_adapter_in_model(peft_config(model, settings, anatomy), model, ADAPTER)
    for module in model.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.original_module = nn.Identity()  # its copy alone is computed with
    for matrix, shape in expert_matrices(model):
        weight = matrix.weight
        matrix.weight = nn.Parameter(weight.detach().view(shape), requires_grad=weight.requires_grad)


def expert_matrices(model: nn.Module) -> list[tuple[nn.Linear, torch.Size]]:
    """B of each adapter of fused experts, which peft saves as [F, r E], with the shape [F, r, E] by which it reads it:
    in that the experts can be divided."""
    wrappers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.layer.ParamWrapper)]
    return [
        (matrix, torch.Size([matrix.out_features, wrapper.r[ADAPTER], wrapper.num_experts]))
        for wrapper in wrappers
        for matrix in (wrapper.lora_B[ADAPTER],)
    ]


def peft_config(model: nn.Module, settings: LoraSettings, anatomy: Anatomy) -> peft.LoraConfig:
    """The recipe's settings in peft's words."""
    targets = settings.targets
    if targets == "all-linear":  # peft's own would take parameters of fused experts with them
        targets = tuple(sorted({name.rpartition(".")[2] for name in linears(model, anatomy)}))
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        target_modules=list(targets),
        lora_dropout=settings.dropout,
        bias=settings.bias,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        modules_to_save=list(settings.modules_to_save) or None,
        target_parameters=settings.target_parameters and list(settings.target_parameters),
        init_lora_weights=_INITS.get(settings.init, True),
    )


def linears(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of the linears within layers of a model without adapters: what can be a target.

    Where some layers have experts in place of a feed-forward, those of the other layers' feed-forwards are left out:
    peft takes their names for those of experts.
    """
    layers = f"{anatomy.base}.{anatomy.layers}."
    kinds = ("Linear", "Conv1D")  # the second is GPT-2's linear, transposed
    feed_forward = f".{anatomy.experts.rpartition('.')[0]}." if anatomy.experts else None
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(layers) and type(module).__name__ in kinds and not (feed_forward and feed_forward in name)
    ]


def base_name(name: str) -> str:
    """``layers.0.q_proj.base_layer.weight`` -> ``layers.0.q_proj.weight``: the model's own name of a parameter that it
    has without adapters."""
    return _WRAPPED.sub("", name)


def stored_name(name: str) -> str:
    """``layers.0.q_proj.lora_A.default.weight`` -> ``base_model.model.layers.0.q_proj.lora_A.weight``: what a saved
    adapter calls a parameter that is trained."""
    without = re.sub(rf"(\.lora_[AB])\.{ADAPTER}(?=\.)", r"\1", name)
    without = without.replace(f"{_LENGTHS}{ADAPTER}.weight", _LENGTHS.removesuffix("."))
    return f"base_model.model.{without.replace(f'.modules_to_save.{ADAPTER}.', '.')}"


def whole_peft_model(model: nn.Module, settings: LoraSettings, anatomy: Anatomy, *, base: str | None) -> Any:
    """peft's own model around a whole one, which it changes; a saved adapter will name ``base`` as what it is of."""
    config = peft_config(model, settings, anatomy)
    config.base_model_name_or_path = base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config, ADAPTER)


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A whole model with the adapter of ``folder``, as users load it."""
    return peft.PeftModel.from_pretrained(model, folder)


def without_adapters(model: nn.Module) -> None:
    """Have a whole model compute as if it had none from now on."""
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        layer.enable_adapters(False)


@contextmanager
def switched_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within: the models compute without their adapters. peft's own `enable_adapters` would also change what is
    trained."""
    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a model with adapters, by global name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_share(blueprint: Blueprint) -> dict[str, Any]:
    """How many numbers are trained, of how many, and how many in each kind of module, largest first."""
    by_module: Counter[str] = Counter()
    for name, parameter in trained(blueprint.model).items():
        owner = re.sub(r"\.lora_\w+\.\w+", "", base_name(name)).rpartition(".")[0]
        by_module[owner.rpartition(".")[2]] += parameter.numel()
    every = sum(parameter.numel() for parameter in blueprint.model.parameters())
    return {
        "trained": by_module.total(),
        "parameters": every,
        "by_module": dict(by_module.most_common()),
        "frozen_experts": bool(blueprint.anatomy.experts)
        and not any(f".{blueprint.anatomy.experts}." in name for name in trained(blueprint.model)),
    }


def _first_value(blueprint: Blueprint, name: str, settings: LoraSettings, base: Base, *, seed: int) -> Tensor:
    """The first value of an adapter's matrix, whole, on the CPU: taken out of the matrix beside it, or drawn by peft's
    own rule for the layer that it is of, from a generator that is seeded by the run's seed and that layer's name."""
    owner, _, parameter = name.partition(".lora_")
    if settings.takes_out:
        lora_A, lora_B = base.factors(owner)
        return lora_A if parameter.startswith("A.") else lora_B
    layer: Any = blueprint.model.get_submodule(owner)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, owner))
        twin: Any = object.__new__(type(layer))  # `copy` would call the constructor of experts that FSDP manages
        twin.__dict__.update(layer.__dict__)
        twin._modules = dict(layer._modules)
        for part in ("lora_A", "lora_B"):
            on_meta = getattr(layer, part)[ADAPTER]
            linear = nn.Linear(on_meta.in_features, on_meta.out_features, bias=on_meta.bias is not None)
            twin._modules[part] = nn.ModuleDict({ADAPTER: linear})
        twin._modules["base_layer"] = nn.Linear(1, 1)  # of which peft asks the type of numbers: the own may hold bytes
        if settings.init == "orthogonal":
            twin.orthogonal_init(ADAPTER)
        else:
            twin.reset_lora_parameters(ADAPTER, _INITS[settings.init])
    return twin.get_parameter(f"lora_{parameter}").detach().view(blueprint.model.get_parameter(name).shape)


def _lengths(blueprint: Blueprint, name: str, weights: CopyInto) -> Tensor:
    """DoRA's first lengths, [out]: those of the rows of W, since B is zero. Holds one whole matrix for as long."""
    owner = name.partition(_LENGTHS)[0]
    layer: Any = blueprint.model.get_submodule(owner)
    weight = torch.empty(layer.base_layer.weight.shape)
    weights(f"{owner}.weight", tuple(slice(0, size) for size in weight.shape), weight)
    return weight.norm(dim=0 if layer.fan_in_fan_out else 1)
