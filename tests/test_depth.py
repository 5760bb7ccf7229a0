"""A model that keeps some layers of a pretrained one: which, of what kind, with whose weights, and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import model_config
from runs import recipe_on, run
from test_check import complaints, recipe
from transformers import AutoModelForCausalLM

from cuboid.trainer.depth import kept_layers
from cuboid.trainer.export import export_hf
from cuboid.trainer.model_config import layers_in_folder, read_checked_config
from cuboid.trainer.one_process import undropped_blueprint, whole_with_values
from cuboid.trainer.recipe import ModelSettings


def saved(folder: Path, family: str, *, layers: int = 6, tied: bool = False, **values: Any) -> str:
    """A folder with a model of this family."""
    torch.manual_seed(0)
    config = model_config(family, tied, layers) | values
    AutoModelForCausalLM.from_config(read_checked_config(ModelSettings(config=config))).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("layers", "available", "kept"),
    [(1, 6, (0,)), (2, 6, (0, 5)), (3, 6, (0, 2, 5)), (6, 6, (0, 1, 2, 3, 4, 5)), ([1, 4], 6, (1, 4))],
)
def test_a_count_is_spread_evenly_and_a_list_is_itself(
    layers: int | list[int], available: int, kept: tuple[int, ...]
) -> None:
    assert kept_layers(layers, available) == kept


@pytest.mark.parametrize("count", range(1, 31))
def test_no_layer_is_kept_twice(count: int) -> None:
    assert len(set(kept_layers(count, 30))) == count


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (5, "model.layers=5 is more than the 4 there are; use 4"),
        ([0, 4], "model.layers=[0, 4] is not a rising list of the model's layers, which are 0 to 3; name each once"),
        ([2, 1], "model.layers=[2, 1] is not a rising list"),
        ([1, 1], "model.layers=[1, 1] is not a rising list"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: int | list[int], told: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", layers=4)
    wanted = recipe(pretrained=folder, data={"path": "package:stdlib", "tokenizer": "bytes", "sequence_length": 16})
    changed = wanted.model_copy(update={"model": ModelSettings(pretrained=folder, layers=layers)})
    assert any(line.startswith(told) for line in complaints(changed))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_it_computes_what_is_left_of_the_pretrained_model(family: str, tmp_path: Path) -> None:
    """transformers' own model of the folder, the other layers taken out of its list."""
    folder, kept = saved(tmp_path / "model", family, tied=family == "gemma3"), (0, 2, 5)
    settings = ModelSettings(pretrained=folder, layers=kept)
    shallow = recipe(pretrained=folder).model_copy(update={"model": settings})
    found = whole_with_values(shallow, undropped_blueprint(shallow))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = whole.get_submodule(whole.base_model_prefix)
    name = "h" if family == "gpt2" else "layers"
    setattr(base, name, torch.nn.ModuleList([getattr(base, name)[layer] for layer in kept]))
    for layer, block in enumerate(getattr(base, name)):
        (block.attn if family == "gpt2" else block.self_attn).layer_idx = layer
    whole.config = base.config = found.config
    ids = torch.randint(0, 96, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            found.eval()(input_ids=ids).logits, whole.eval()(input_ids=ids, use_cache=False).logits
        )


def test_layers_keep_the_kind_that_they_had(tmp_path: Path) -> None:
    mixture = saved(tmp_path / "mixture", "qwen3_moe", mlp_only_layers=[1, 4])
    sliding = saved(tmp_path / "sliding", "gemma3")
    assert read_checked_config(ModelSettings(pretrained=mixture, layers=[0, 1, 4, 5])).mlp_only_layers == [1, 2]
    config = read_checked_config(ModelSettings(pretrained=sliding, layers=[1, 2, 3]))
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_its_export_is_a_model_of_so_many_layers(tmp_path: Path) -> None:
    """Its weights of the first step are those of the folder's layers: with a learning rate of 0 they stay."""
    folder = saved(tmp_path / "model", "qwen3", layers=6, vocab_size=264)
    plain = recipe_on("2x1x1", changes={"optimizer": {"learning_rate": 0.0}, "train": {"steps": 2}})
    data = plain.data.model_copy(update={"tokenizer": "bytes"})
    settings = ModelSettings(pretrained=folder, layers=3)
    run(plain.model_copy(update={"model": settings, "data": data}), tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    whole, shallow = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out"))
    kept = layers_in_folder(settings)
    assert kept == (0, 2, 5)
    for name, value in shallow.items():
        first, _, rest = name.partition(".layers.")
        theirs = f"{first}.layers.{kept[int(rest[0])]}{rest[1:]}" if rest else name
        assert torch.equal(value, whole[theirs]), name
