"""A prompt answered: the most likely tokens, drawn ones, and by a chat template."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401  (its log handler keeps the stream that it finds first; not the runner's)
from peft import LoraConfig, get_peft_model
from stores import make_model, save_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.trainer.export import export_hf

ROOT = Path(__file__).parents[1]


def generated(*arguments: str) -> str:
    """What the command prints."""
    done = CliRunner().invoke(cli.app, ["generate", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Of bytes, as a run and as a folder; sharp enough that it does not repeat one byte."""
    model = make_model(tied=True, vocab_size=257)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    save_model(model, tmp_path / "run", 1)
    export_hf(tmp_path / "run", tmp_path / "folder")
    return model


def most_likely(model: Any, text: str, count: int) -> str:
    """The bytes that go on, each the argmax of a forward over all before it."""
    ids = list(text.encode())
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert not {model.config.eos_token_id, 256} & set(ids), "it ends, and tells less"
    assert len(set(ids[-count:])) > 3
    return bytes(ids).decode("utf-8", "replace")


def test_the_most_likely_tokens_go_on(model: Any, tmp_path: Path) -> None:
    expected = most_likely(model, "All that", 12)
    for source in ("run", "folder"):
        printed = generated(str(tmp_path / source), "--prompt", "All that", "--max-new-tokens", "12")
        assert printed.rstrip("\n") == expected.rstrip("\n")


def test_what_is_drawn_follows_the_seed(model: Any, tmp_path: Path) -> None:
    words = (str(tmp_path / "folder"), "--prompt", "All that", "--temperature", "5", "--max-new-tokens", "12", "--seed")
    first, again, other = (generated(*words, seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_a_chat_template_is_used_where_there_is_one(model: Any, tmp_path: Path) -> None:
    plain = generated(str(tmp_path / "folder"), "--prompt", "<gold>", "--max-new-tokens", "9")
    template = "<{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "folder" / "chat_template.jinja").write_text(template)
    assert "<gold>" + generated(str(tmp_path / "folder"), "--prompt", "gold", "--max-new-tokens", "9") == plain
    assert generated(str(tmp_path / "folder"), "--prompt", "<gold>", "--raw", "--max-new-tokens", "9") == plain


def test_an_adapter_s_folder_answers_with_its_model(model: Any, tmp_path: Path) -> None:
    """As peft itself merges it, and by the tokenizer of its model; where that cannot be found it is said."""
    base, folder = tmp_path / "folder", tmp_path / "adapter"
    torch.manual_seed(5)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    adapted.save_pretrained(folder)
    expected = most_likely(adapted.merge_and_unload().eval(), "All that", 12)
    assert expected != most_likely(model, "All that", 12)
    printed = generated(str(folder), "--prompt", "All that", "--max-new-tokens", "12")
    assert printed.rstrip("\n") == expected.rstrip("\n")
    save_model(make_model(vocab_size=257, family="smollm2"), tmp_path / "other", 1)
    export_hf(tmp_path / "other", tmp_path / "larger")
    said = json.loads((folder / "adapter_config.json").read_text())
    for change, words in (
        ({"base_model_name_or_path": None}, "adapter_config.json names no base_model_name_or_path"),
        ({"peft_type": "IA3"}, "adapter uses peft_type=IA3"),
        ({"base_model_name_or_path": str(tmp_path / "larger")}, "has shape [8, 32], this model's has [8, 36]"),
        ({"base_model_name_or_path": str(tmp_path / "none")}, "none is not here"),
        ({"target_modules": ["c_attn"]}, "is no adapter of"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(said | change))
        done = CliRunner().invoke(cli.app, ["generate", str(folder), "--prompt", "All that"])
        assert done.exit_code == 2, done.output
        assert words in re.sub(r"\s+", " ", done.stderr)


def test_mistakes_are_told_in_words(model: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("folder", "--prompt", ""), "--prompt='' has no token to go on from; give some text"),
        (("folder", "--prompt", "abc", "--max-new-tokens", "9999"), "--max-new-tokens=9999 and the 3 tokens of the"),
        (("empty", "--prompt", "abc"), "empty holds no complete checkpoint"),
    ):
        done = CliRunner().invoke(cli.app, ["generate", str(tmp_path / arguments[0]), *arguments[1:]])
        assert done.exit_code == 2, done.output
        assert words in re.sub(r"\s+", " ", done.stderr)


@pytest.mark.full
def test_a_real_model_knows_the_capital_of_france() -> None:
    words = (str(ROOT / "models/smollm2"), "--prompt", "What is the capital of France?", "--max-new-tokens", "12")
    assert "Paris" in generated(*words)
