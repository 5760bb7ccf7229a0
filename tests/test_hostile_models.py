"""Models, tokenizers and adapters of an enemy: refused by name, in words, at a small price; no code of theirs runs."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import ALWAYS, BOMBS, changed, header_of, header_of_many, mutations, refusal
from hypothesis import example, given, settings
from samples import save_chat_tokenizer
from stores import make_model
from transformers import LlamaConfig

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.adapter_folder import settings_and_base
from cuboid.trainer.foreign import check_folder
from cuboid.trainer.model_config import check_buildable, read_checked_config
from cuboid.trainer.model_folder import load_model, load_tokenizer
from cuboid.trainer.recipe import ModelSettings
from cuboid.trainer.shards import encode_header
from cuboid.trainer.tokenizer import PretrainedTokenizer
from cuboid.trainer.weights import fingerprint


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder, max_shard_size="100KB")
    save_chat_tokenizer(folder, None)
    assert (folder / "model.safetensors.index.json").exists()
    for work in (train_on, load_model, load_tokenizer):
        work(folder)
    return folder


@pytest.fixture
def model(good_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good_model, tmp_path / "model")


def train_on(folder: Path) -> None:
    """What a run reads of `model.pretrained`, up to the shapes in its files."""
    from cuboid.trainer.model import draw_blueprint, parameter_shapes
    from cuboid.trainer.weights import from_safetensors

    PretrainedTokenizer(str(folder))
    blueprint = draw_blueprint(read_checked_config(ModelSettings(pretrained=str(folder))))
    family, base = blueprint.config.model_type, blueprint.anatomy.base
    from_safetensors(folder, shapes=parameter_shapes(blueprint), base=base, family=family, stored_names={})
    fingerprint(folder)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard_of(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def with_header(size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = shard_of(folder)
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])

    return change


def index_to(name: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        names = json.loads(path.read_text())["weight_map"]
        edit(path, weight_map=dict.fromkeys(names, name))

    return change


def config_with(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **values)


def replaced(name: str, how: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        how(folder / name)

    return change


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a header of 2^60 bytes": (with_header(1 << 60), "safetensors: a header of"),
    "a header longer than its file": (with_header(1 << 20), ""),
    "a header of 400,000 tensors": (
        lambda folder: shard_of(folder).write_bytes(header_of_many(400_000)),
        "safetensors: a header of",
    ),
    "a header of 200,000 tensors": (lambda folder: shard_of(folder).write_bytes(header_of_many(200_000)), ""),
    "an index that leaves the folder": (index_to("../model.safetensors"), "outside its folder"),
    "an index with an absolute path": (index_to("/etc/passwd"), "outside its folder"),
    "an index of numbers": (index_to(3), "no weight_map"),
    "an index of nothing": (
        lambda folder: edit(folder / "model.safetensors.index.json", weight_map=None),
        "no weight_map",
    ),
    "a config that nests": (lambda folder: (folder / "config.json").write_bytes(BOMBS["depth"]), "config.json"),
    "a config that unfolds": (lambda folder: (folder / "config.json").write_bytes(BOMBS["lists"]), "config.json"),
    "a config twice": (lambda folder: (folder / "config.json").write_bytes(BOMBS["twice"]), "stands twice"),
    "a tokenizer's settings that unfold": (
        lambda folder: (folder / "tokenizer_config.json").write_bytes(BOMBS["lists"]),
        "tokenizer_config.json",
    ),
    "a tokenizer of 70 MB": (
        lambda folder: os.truncate(folder / "tokenizer.json", 70 << 20),
        "tokenizer.json is larger",
    ),
    "a billion layers": (config_with(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "no heads": (config_with(num_attention_heads=0), ""),
    "sizes that are no numbers": (config_with(hidden_size="x"), ""),
    "code of its own": (
        config_with(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}),
        "code of its own, which is never run",
    ),
    "kernels from a hub": (config_with(attn_implementation="enemy/kernel"), "kernels enemy/kernel"),
    "kernels of a part": (config_with(text_config={"_attn_implementation": {"": "enemy/k:f"}}), "kernels enemy/k:f"),
    "a pipe for a file": (replaced("generation_config.json", os.mkfifo), "not a plain file"),
    "a device for weights": (
        lambda folder: replaced(shard_of(folder).name, lambda path: path.symlink_to("/dev/zero"))(folder),
        "not a plain file",
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if number % 3 == 0 else pytest.mark.full) for number, case in enumerate(MODELS)],
)
def test_a_hostile_model_is_refused(model: Path, case: str) -> None:
    change, words = MODELS[case]
    change(model)
    (model / "mine.py").write_text(f"open({str(model / 'hacked')!r}, 'w')")
    for work in (train_on, load_model):
        assert words in refusal(work, model)
    assert not (model / "hacked").exists()


def test_a_config_that_names_kernels_is_refused_without_a_file_too() -> None:
    values = make_model().config.to_dict() | {"attn_implementation": "enemy/kernel"}
    with pytest.raises(FieldError, match="attn_implementation=enemy/kernel is code of a hub, which is never run"):
        check_buildable(LlamaConfig.from_dict(values))


def test_a_tokenizer_that_asks_for_code_is_refused(model: Path) -> None:
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="Mine")
    edit(model / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (model / "mine.py").write_text(f"open({str(model / 'hacked')!r}, 'w')")
    assert "never run" in refusal(load_tokenizer, model)
    assert "never run" in refusal(PretrainedTokenizer, str(model))
    assert not (model / "hacked").exists()


def test_a_family_of_transformers_is_used_although_it_could_bring_code(model: Path) -> None:
    """As many models on the hub do: the class of transformers is taken, and nothing is asked."""
    edit(model / "config.json", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    train_on(model)
    load_model(model)


@pytest.mark.parametrize("kind", ["I8", "F8_E4M3"])
def test_weights_without_their_scales_are_refused(model: Path, kind: str) -> None:
    shard = shard_of(model)
    entries, _ = header_of(shard)
    rest = b""
    for key, entry in entries.items():
        if key != "__metadata__":
            size = torch.Size(entry["shape"]).numel()
            entry |= {"dtype": kind, "data_offsets": [len(rest), len(rest) + size]}
            rest += bytes(size)
    shard.write_bytes(encode_header(entries) + rest)
    with pytest.raises(UserError, match=f"is {kind}, and weights are F64, F32, F16 or BF16"):
        train_on(model)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("model.safetensors.index.json", "tokenizer_config.json", "shard")
        ),
    ],
)
def test_whatever_is_changed_in_a_model(good_model: Path, name: str) -> None:
    """Refused in words, or loaded with every tensor as it was; the values of a model carry no sum that could tell."""
    expected = make_model().state_dict()
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(good_model, Path(place) / "model")
        file = shard_of(folder) if name == "shard" else folder / name
        good = file.read_bytes()
        header = good[: 8 + int.from_bytes(good[:8], "little")] if name == "shard" else good

        @settings(ALWAYS, max_examples=25)
        @given(mutations(header))
        @example(header)
        def check(content: bytes) -> None:
            with changed(file, content + (good[len(header) :] if name == "shard" else b"")):
                for work in (train_on, load_tokenizer):
                    with suppress(UserError):
                        work(folder)
                try:
                    found = load_model(folder).state_dict()
                except UserError:
                    return
                assert found.keys() == expected.keys()
                assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())

        check()


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"target_modules": {"a": 1}}, "cannot be gone on from"),
        ({"r": float("nan")}, "cannot be gone on from"),
        ({"auto_mapping": None, "eva_config": {"x": "y"}}, "eva_config"),
        (None, "adapter_config.json"),
    ],
)
def test_a_hostile_adapter_is_refused(tmp_path: Path, values: dict[str, Any] | None, words: str) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(encode_header({}))
    content = BOMBS["lists"] if values is None else json.dumps(ADAPTER | values).encode()
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert words in refusal(settings_and_base, tmp_path)


def test_a_folder_of_the_hub_s_cache_is_read_through_its_links(good_model: Path, tmp_path: Path) -> None:
    for path in good_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    check_folder(tmp_path)
    train_on(tmp_path)
