"""`cuboid verify` as its tests run it: on a small recipe, in this process, so that forked ranks inherit what was
planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cuboid.launch import verify as verification

RECIPE = """\
name: small
model:
  config:
    model_type: {family}
    vocab_size: 264
    hidden_size: 64
    intermediate_size: 128
    num_hidden_layers: 12
    num_attention_heads: 8
    num_key_value_heads: 4
    tie_word_embeddings: true
    bos_token_id: null
    eos_token_id: 256
data: {{kind: text, path: text.txt, tokenizer: bytes, sequence_length: 64}}
parallel: {{pipeline: 2, data: 2, tensor: 2, microbatches: 4}}
train: {{steps: 30, global_batch: 32}}
track: {{to: none}}
launch: {{launcher: local, device: cpu}}
"""

Verify = Callable[..., tuple[int, str]]


def verifier(capfd: pytest.CaptureFixture[str]) -> Verify:
    """The command: exit code, and what it printed."""

    def run(*overrides: str, family: str = "llama", shrink: bool = True, as_json: bool = False) -> tuple[int, str]:
        Path("small.yaml").write_text(RECIPE.format(family=family))
        code = verification.verify("small.yaml", overrides, shrink=shrink, as_json=as_json)
        return code, "".join(capfd.readouterr())

    return run
