"""A prompt answered by a finished model, token by token: a smoke check."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.limits import limited
from cuboid.trainer.model_folder import finished, load_model, load_tokenizer, quietly


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen, and how often."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: the most likely token; else drawn with logits divided by it."""
    seed: int = 0


@torch.no_grad()
def generate(source: Path, prompt: str, decoding: Decoding, *, raw: bool = False) -> None:
    """Print what the model of a run, a checkpoint or a Hugging Face folder makes of a prompt, as it comes.

    The prompt is a user's message where the tokenizer has a chat template, and the answer alone is printed; otherwise,
    and with ``raw``, it is text that goes on, and is printed too.

    Raises:
        UserError: there is no model, the prompt is empty or leaves no room, or the chat template refuses it.
    """
    with tempfile.TemporaryDirectory() as place, finished(source, beside=Path(place) / "it") as found:
        model = load_model(found.folder)
        tokenizer = load_tokenizer(found.folder)
        chat = tokenizer.chat_template is not None and not raw
        text = _as_message(tokenizer, prompt) if chat else prompt
        # a template writes its own begin of text
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"].long()
        _check_room(ids.shape[1], decoding.max_new_tokens, model.config)
        torch.manual_seed(decoding.seed)
        drawn = decoding.temperature > 0
        with quietly():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=decoding.max_new_tokens,
                do_sample=drawn,
                temperature=decoding.temperature if drawn else None,
                top_k=None,
                top_p=None,
                pad_token_id=tokenizer.pad_token_id,
                streamer=transformers.TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
            )


def _as_message(tokenizer: transformers.PreTrainedTokenizerBase, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    try:
        with limited(seconds=1, megabytes=200):
            return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja2's kinds, and whatever an expression of the template raises
        raise UserError(f"the chat template refuses it: {type(error).__name__}: {error}; --raw does without") from error


def _check_room(prompt_tokens: int, new_tokens: int, config: transformers.PretrainedConfig) -> None:
    if prompt_tokens == 0:
        raise FieldError("--prompt", "''", "has no token to go on from", "give some text")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and prompt_tokens + new_tokens > longest:
        room = longest - prompt_tokens
        constraint = f"and the {prompt_tokens} tokens of the prompt are more than max_position_embeddings={longest}"
        remedy = f"use at most {room}" if room > 0 else "give a shorter prompt"
        raise FieldError("--max-new-tokens", new_tokens, constraint, remedy)
