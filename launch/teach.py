"""The `teach` command: a teacher's likeliest tokens for every sample of a run, written once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cuboid.launch import local
from cuboid.launch.training import checked_recipe
from cuboid.trainer.cache import facts_of
from cuboid.trainer.check import check_teacher

_LOCAL = ("launch.launcher=local", "launch.max_failures=0")


def teach(name: str, overrides: Sequence[str]) -> int:
    """Write the recipe's `distill.cache`, by processes of this machine on the mesh that the recipe or ``overrides``
    name; returns the command's exit code.

    Raises:
        UserError: the recipe names no teacher or no place, or the teacher cannot run so.
    """
    recipe = checked_recipe(name, [*overrides, *_LOCAL], check=check_teacher)
    from cuboid.trainer.teach import teach

    folder = Path(tempfile.mkdtemp(prefix="cuboid-teach-"))
    code = local.launch(recipe, folder, train=teach, quiet=True)
    if code:
        return code  # what the ranks said stays in the folder, which the failure's words name
    shutil.rmtree(folder)
    assert recipe.distill is not None
    assert recipe.distill.cache is not None
    facts = facts_of(Path(recipe.distill.cache).expanduser())
    assert facts is not None
    size = sum(facts["bytes"].values()) / 1e6
    words = f"the {facts['top_k']} likeliest tokens at each place of {facts['samples']:,} samples"
    print(f"{recipe.distill.cache}: {words}, {size:,.1f} MB")
    return 0
