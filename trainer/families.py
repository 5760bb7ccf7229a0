"""Whether a family's model is what its stages compute: a shrunk twin runs both ways before anything is trained.

A family may have all known parts and still do something between them (scale embeddings, divide logits) that stages
would leave out in silence; and a config may turn such a thing on.
"""

from __future__ import annotations

import copy

import torch
import transformers

from cuboid.parallel.errors import FieldError
from cuboid.parallel.stages import cut_stage
from cuboid.trainer.model import Blueprint, draw_blueprint, find_parts, whole_masks
from cuboid.trainer.plans import USE_PROVEN
from cuboid.trainer.shrink import layer_kinds, shrink_config

_TOLERANCE = 1e-4


def check_family(config: transformers.PretrainedConfig) -> None:
    """Raises FieldError where stages would not compute what transformers computes for this config; milliseconds."""
    small = shrink_config(config, tensor=1, layers=2 * len(layer_kinds(config)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ranks may be forked from this process: a pool of threads would be gone in them
    try:
        difference = _difference(small)
    except FieldError:
        raise
    except Exception as error:  # a family may fail in any way on a shape that it was not made for
        draw_blueprint(copy.deepcopy(config))  # which parts it has would be the better reason
        raise _refusal(config, f"cannot be tried on a small model ({error})") from error
    finally:
        torch.set_num_threads(threads)
    if not difference <= _TOLERANCE:  # NaN neither
        raise _refusal(config, f"computes something that stages leave out (a small model differs by {difference:.1e})")


def _refusal(config: transformers.PretrainedConfig, constraint: str) -> FieldError:
    return FieldError("model.model_type", config.model_type, constraint, USE_PROVEN)


@torch.no_grad()
def _difference(config: transformers.PretrainedConfig) -> float:
    """Largest difference of logits between the model and its stages, relative to the largest logit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        ).eval()
        for parameter in model.parameters():  # away from initial values, at which whole parts can be idle
            parameter.add_(0.1 * torch.randn_like(parameter))
        ids = torch.randint(config.vocab_size, (2, 16))
    positions = torch.arange(16).repeat(2, 1)
    positions[1, 7:] -= 7
    blueprint = Blueprint(config, model, find_parts(model))
    every = range(len(blueprint.anatomy.layer_kinds))
    stage = cut_stage(model, every, anatomy=blueprint.anatomy, masks=blueprint.masks)
    masks = whole_masks(blueprint, positions)
    expected = model(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False).logits
    found = stage(ids, position_ids=positions)
    return ((found - expected).abs().max() / expected.abs().max()).item()
