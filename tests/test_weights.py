"""Initial weights: the same from a seed on every mesh, and read from safetensors straight into shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from harness import run_ranks
from parity import full, pretrained
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cuboid.parallel.errors import UserError
from cuboid.parallel.gradients import local
from cuboid.parallel.mesh import connect
from cuboid.trainer import weights
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.model import draw_blueprint, seeded_tensors
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import Recipe


def tensors_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    """In every rank: what it holds, gathered over data and tensor."""
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        return {name: full(parameter.detach()).clone() for name, parameter in engine.parameters}


def on_mesh(recipe: Recipe) -> dict[str, torch.Tensor]:
    # any batch that the layout divides: nothing is computed here
    batch = recipe.layout.data * recipe.parallel.microbatches
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch": batch})})
    whole: dict[str, torch.Tensor] = {}
    for held in run_ranks(tensors_of, recipe.layout.world_size, recipe, timeout=120):
        for name, tensor in held.items():
            assert torch.equal(tensor, whole.setdefault(name, tensor)), f"{name} differs between ranks"
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in several files, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("model")
    config = read_checked_config(Case(family="qwen3", tied=True).recipe().model)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


SPREAD = [
    Case(2, 2, 2),
    Case(2, 1, 1, "interleaved_1f1b", tied=True),
    Case(1, 3, 1),
    Case(2, 2, 1, family="mixtral", expert=2),
]


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_a_seed_gives_the_same_weights_on_every_mesh(case: Case) -> None:
    alone = on_mesh(Case(family=case.family, tied=case.tied).recipe())
    spread = on_mesh(case.recipe())
    assert alone.keys() == spread.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, spread[name]), name


def test_initial_values_follow_the_familys_rule() -> None:
    recipe = Case().recipe()
    read = seeded_tensors(draw_blueprint(read_checked_config(recipe.model)), seed=1)
    other = seeded_tensors(draw_blueprint(read_checked_config(recipe.model)), seed=2)
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    assert abs(read("model.embed_tokens.weight").std().item() - 0.02) < 2e-3
    assert torch.equal(read("model.norm.weight"), torch.ones(32))
    assert torch.equal(read(first), read(first))
    assert not torch.equal(read(first), read(second))
    assert not torch.equal(read(first), other(first))


@pytest.mark.parametrize("case", [Case(2, 2, 2), Case(), Case(1, 3, 1), Case(2, 1, 2, shard=False)], ids=str)
def test_safetensors_reach_the_shards_bit_for_bit(case: Case, folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    held = on_mesh(pretrained(case.recipe(), folder))
    assert held.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in held.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(1, 2, 1, family="mixtral", expert=2), marks=pytest.mark.full),
        Case(2, 2, 1, family="qwen3_moe"),
        Case(1, 2, 2, family="qwen3_moe", expert=2, shard=False),
        pytest.param(Case(1, 4, 1, family="olmoe", expert=2), marks=pytest.mark.full),
        pytest.param(Case(1, 2, 1, family="gpt_oss", expert=2), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_experts_reach_the_shards_as_their_family_stores_them(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(read_checked_config(case.recipe().model))
    model.save_pretrained(tmp_path)
    expected = dict(model.named_parameters())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        one_by_one = any(".experts.0." in name for name in file.keys())  # noqa: SIM118
    assert one_by_one == (case.family != "gpt_oss")
    held = on_mesh(pretrained(case.recipe(), tmp_path))
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, expected[name]), name


class CountingFile:
    """A safetensors file that counts the elements cut out of it."""

    def __init__(self, file: Any, read: Counter[str]) -> None:
        self.file, self.read = file, read

    def __enter__(self) -> CountingFile:
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self.file.get_slice(name), name, self.read)


class CountingSlice:
    def __init__(self, whole: Any, name: str, read: Counter[str]) -> None:
        self.whole, self.name, self.read = whole, name, read

    def get_shape(self) -> list[int]:
        return self.whole.get_shape()

    def get_dtype(self) -> str:
        return self.whole.get_dtype()

    def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
        cut = self.whole[part]
        self.read[self.name] += cut.numel()
        return cut


def elements_read(recipe: Recipe) -> tuple[Counter[str], dict[str, tuple[int, int]]]:
    """In every rank: elements read by name, and of each parameter how many it holds and how many there are."""
    read: Counter[str] = Counter()
    # in a forked rank: this process stays as it is; whatever else of a file were asked for would raise
    weights.safe_open = lambda path, framework: CountingFile(safe_open(path, framework=framework), read)
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        return read, {name: (local(p).numel(), p.numel()) for name, p in engine.parameters}


@pytest.mark.parametrize("case", [Case(1, 2, 1), Case(1, 1, 2), Case(2, 1, 1)], ids=str)
def test_a_rank_reads_what_it_owns_and_nothing_else(case: Case, folder: Path) -> None:
    assert safe_open is weights.safe_open, "what is counted is what is called"
    total = 0
    for read, held in run_ranks(elements_read, 2, pretrained(case.recipe(), folder), timeout=120):
        assert read == {name: own for name, (own, _) in held.items()}
        cut = [own < whole for own, whole in held.values()]
        assert all(cut) if case.data > 1 else any(cut) == (case.tensor > 1)
        total += sum(read.values())
    with torch.device("meta"):
        whole = sum(
            p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).parameters()
        )
    # what both need is read by both: norms over the tensor axis, the tied embedding at both ends of the pipeline
    assert whole <= total < 1.2 * whole
    assert (total == whole) == (case.data > 1)


def refusal(folder: Path) -> str:
    recipe = pretrained(Case().recipe(), folder)
    with pytest.raises(UserError) as error:
        initial_weights(recipe, draw_blueprint(read_checked_config(recipe.model)))
    return str(error.value)


def test_what_cannot_be_read_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name = "model.layers.3.mlp.up_proj.weight"

    index.write_text(json.dumps(whole | {"weight_map": whole["weight_map"] | {name: "../elsewhere.safetensors"}}))
    assert "points outside its folder: ../elsewhere.safetensors" in refusal(tmp_path)

    index.write_text(json.dumps(whole | {"weight_map": {k: v for k, v in whole["weight_map"].items() if k != name}}))
    assert f"{name} is missing" in refusal(tmp_path)

    index.write_text(json.dumps(whole))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "has shape [48, 32], the config says [64, 32]" in refusal(tmp_path)

    (tmp_path / whole["weight_map"][name]).write_bytes(b"\xff" * 100)
    assert "is no readable safetensors" in refusal(tmp_path)
