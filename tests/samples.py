"""Small data sets as the trainer prepares them, shared by the tests of data, corpora and conversations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cuboid.parallel.loss import IGNORE
from cuboid.trainer.data import Dataset, prepare
from cuboid.trainer.recipe import DataSettings
from cuboid.trainer.tokenizer import ByteTokenizer, Tokenizer

BYTES = ByteTokenizer()


def prepared(path: str, cache: Path, *, seed: int = 0, tokenizer: Tokenizer = BYTES, **fields: Any) -> Dataset:
    """The data set of ``data.path``, in sequences of 8 unless ``fields`` of `data` say otherwise."""
    settings = DataSettings(path=path, **{"kind": "text", "sequence_length": 8, **fields})
    return prepare(settings, tokenizer=tokenizer, seed=seed, cache=cache)


CHATML = r"""{% for message in messages %}{% if loop.first and tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}
{%- else %}{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A template that marks what an assistant says, so that transformers itself can tell which tokens are predicted."""
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def save_chat_tokenizer(folder: Path, template: str | None) -> Path:
    """A folder with a byte-level BPE tokenizer with ChatML's tokens, as a chat model has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[1])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def said(*turns: str) -> list[Mapping[str, Any]]:
    """A conversation: words of the user and the assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": words} for role, words in zip(roles, turns, strict=False)]


def write_rows(path: Path, rows: list[Any]) -> str:
    """A .jsonl file; a text is a line as it stands."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chats(path: Path, conversations: list[list[Mapping[str, Any]]]) -> str:
    return write_rows(path, [{"messages": messages} for messages in conversations])


def examples(data: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of every example of an epoch: one begins where positions do; what fills up predicts nothing."""
    batch = data.batch(range(data.num_samples))
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        begins = (positions == 0).nonzero().flatten().tolist()
        for first, stop in itertools.pairwise([*begins, len(ids)]):
            assert positions[first:stop].tolist() == list(range(stop - first))
            if (labels[first:stop] != IGNORE).any():
                yield ids[first:stop].tolist(), labels[first:stop].tolist()
