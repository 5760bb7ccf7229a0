"""The `verify` command: one process against the recipe's mesh, on this machine's CPU, and the verdict as a table."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cuboid.launch import local
from cuboid.launch.training import checked_recipe
from cuboid.parallel.errors import UserError
from cuboid.trainer.model_config import config_of, num_experts
from cuboid.trainer.recipe import Recipe

if TYPE_CHECKING:
    from cuboid.trainer.verify import Verdict

_CPU = ("launch.launcher=local", "launch.device=cpu", "launch.max_failures=0")


def verify(name: str, overrides: Sequence[str], *, shrink: bool, as_json: bool) -> int:
    """Compare and print; returns the command's exit code.

    Raises:
        UserError: the recipe cannot run so, in the same words as for `train`.
    """
    # ranks are forked from this process, which computes too: a pool of threads would be gone in them, and waited for
    os.environ["OMP_NUM_THREADS"] = "1"
    original = checked_recipe(name, [*overrides, *_CPU])
    if not shrink and original.moe is not None and original.moe.experts is not None:
        # what a router learns is the difference of experts, and there is none yet but rounding
        raise UserError(
            "--shrink none cannot tell: experts just made of a dense model are all alike; use --shrink auto"
        )
    if not shrink and original.precision.compute != "float32" and num_experts(config_of(original)):
        # of the shrunk model each token goes to all experts
        raise UserError(
            "--shrink none cannot tell: in bfloat16 a token near a tie chooses another expert than in one process; "
            "use --shrink auto, or precision.compute=float32"
        )
    if original.preference is not None and original.precision.compute != "float32":
        raise UserError(
            "verify cannot tell: in bfloat16 a pair's loss comes of differences between sums that are rounded; "
            "use precision.compute=float32"
        )
    from cuboid.trainer.one_process import reference
    from cuboid.trainer.verify import comparable, run_mesh, small_recipe, verdict

    folder = Path(tempfile.mkdtemp(prefix="cuboid-verify-"))
    recipe = comparable(small_recipe(original, folder) if shrink else original)
    expected = reference(recipe, original)
    code = local.launch(recipe, folder, train=partial(run_mesh, expected=expected), quiet=True)
    if code:
        return code  # what the ranks said stays in the folder, which the failure's words name
    found = verdict(folder)
    shutil.rmtree(folder)
    if as_json:
        print(json.dumps(found.record()))
    else:
        _print(found, recipe, shrunk=shrink)
    return 0 if found.passed else 1


def _print(found: Verdict, recipe: Recipe, *, shrunk: bool) -> None:
    from cuboid.trainer.model_config import read_checked_config
    from cuboid.trainer.one_process import STEPS

    layers = f", shrunk to {read_checked_config(recipe.model).num_hidden_layers} layers" if shrunk else ""
    print(f"one process against {found.mesh}{layers}")
    print(f"{'largest difference of':<24}{'found':>9}  {'allowed':>7}  where")
    for words, value, limit, where in (
        ("the loss", found.loss_rel, "loss_rel", f"in {STEPS} steps"),
        ("the gradient norm", found.grad_norm_rel, "grad_norm_rel", f"in {STEPS} steps"),
        ("a parameter's gradient", found.worst_gradient[1], "gradient_rel", found.worst_gradient[0]),
        ("a parameter's update", found.worst_update[1], "update_rel", found.worst_update[0]),
    ):
        mark = "" if value <= found.tolerance[limit] else "  <- too much"
        print(f"{words:<24}{value:>9.1e}  {found.tolerance[limit]:>7.0e}  {where}{mark}")
    for kind, names in (("gradient", found.missing_gradients), ("place on any rank", found.missing_parameters)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            print(f"no {kind}: {', '.join(names[:5])}{more}")
    print("the same numbers" if found.passed else "NOT the same numbers")
    edges = f", and numbers near an edge of {found.rounded}" if found.rounded else ""
    print(f"allowed: {found.compute} rounding (sums in another order){edges}; more for updates, as AdamW makes them")
