"""Text to ids: bytes, or the tokenizer of a Hugging Face model. Imports no torch; transformers where it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from cuboid.parallel.errors import FieldError
from cuboid.trainer.foreign import check_folder, reason

BYTES = "bytes"
_END_OF_DOCUMENT = 256
_END_NAME = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the data needs of a tokenizer."""

    identity: str
    """Names the tokenizer exactly: the same identity gives the same ids."""
    vocab_size: int
    """Largest id + 1."""
    begin: int | None
    """Id before each document, where the tokenizer puts one."""
    end: int | None
    """Id after each document."""
    pad: int
    """Id that fills a sequence; never predicted."""

    chat_template: str | None
    """Its own, in Jinja."""
    special_tokens: Mapping[str, str]
    """Texts that a template names: bos_token, eos_token, ..."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without `begin` and `end`."""

    def encode_placed(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, the character of the text that each id begins with) of each text; [n] each."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, for people: special tokens by their names."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 as end of document."""

    identity = BYTES
    vocab_size = _END_OF_DOCUMENT + 1
    begin: int | None = None
    end: int | None = _END_OF_DOCUMENT
    pad = _END_OF_DOCUMENT
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = MappingProxyType({})

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8) for text in texts]

    def encode_placed(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = self.encode(texts)
        # every byte but a character's first is 10xxxxxx
        return [(row, np.cumsum((row & 0xC0) != 0x80) - 1) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        parts = b"".join(bytes([byte]) if byte < _END_OF_DOCUMENT else _END_NAME.encode() for byte in ids)
        return parts.decode("utf-8", "replace")


class PretrainedTokenizer:
    """A tokenizer of transformers, from a local folder or hub id; no code of the repository is run."""

    def __init__(self, name: str, *, field: str = "data.tokenizer") -> None:
        place = Path(name).expanduser()
        if name.startswith((".", "/", "~")) and not place.is_dir():
            raise FieldError(field, name, "is no folder", f"give a folder (relative to {Path.cwd()}) or a hub id")
        try:
            from transformers import AutoTokenizer

            if place.is_dir():
                check_folder(place)
            source = str(place) if place.is_dir() else name
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # transformers tells a missing tokenizer in many ways
            constraint = f"gives no tokenizer ({reason(error)})"
            raise FieldError(field, name, constraint, "use bytes, a folder or a hub id") from error
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.end: int | None = self._tokenizer.eos_token_id
        plain: list[int] = self._tokenizer("x")["input_ids"]
        begin = self._tokenizer.bos_token_id
        self.begin: int | None = begin if begin is not None and plain[:1] == [begin] else None
        pads = (self._tokenizer.pad_token_id, self.end, 0)
        self.pad = int(next(pad for pad in pads if pad is not None))
        template = self._tokenizer.chat_template
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template
        self.special_tokens: Mapping[str, str] = self._tokenizer.special_tokens_map
        self._name, self._field = name, field
        self.identity = self._identity()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [np.asarray(row, dtype=np.uint32) for row in rows]

    def encode_placed(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        if not self._tokenizer.is_fast:
            constraint = "has no fast form, which alone tells where in a text each token begins"
            raise FieldError(
                self._field, self._name, constraint, "use a model with a tokenizer.json, or data.kind=text"
            )
        found = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (np.asarray(ids, dtype=np.uint32), np.array([first for first, _ in offsets], np.int64))
            for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def _identity(self) -> str:
        if self._tokenizer.is_fast:
            content = self._tokenizer.backend_tokenizer.to_str()
        else:
            content = type(self._tokenizer).__name__ + json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        facts = json.dumps([content, self.begin, self.end, self.pad])
        return "sha256:" + hashlib.sha256(facts.encode()).hexdigest()


def open_tokenizer(name: str, *, pretrained: str | None = None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
        name: `auto` (the model's own, or bytes where the model comes from a config), `bytes`, a folder or a hub id.
        pretrained: the recipe's `model.pretrained`, for `auto`.
        vocab_size: the model's; None skips the comparison.

    Raises:
        FieldError: there is no such tokenizer, or its largest id does not fit the model.
    """
    field = "data.tokenizer"
    if name == "auto":
        name, field = (BYTES, field) if pretrained is None else (pretrained, "model.pretrained")
    tokenizer: Tokenizer = ByteTokenizer() if name == BYTES else PretrainedTokenizer(name, field=field)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        constraint = f"has ids up to {tokenizer.vocab_size - 1}, which do not fit the model's vocab_size={vocab_size}"
        remedy = f"set model.config.vocab_size to at least {tokenizer.vocab_size}, or use another tokenizer"
        raise FieldError("data.tokenizer", name, constraint, remedy)
    return tokenizer


def save_tokenizer(
    name: str, folder: Path, *, pretrained: str | None, max_tokens: int | None, chat_template: str | None = None
) -> None:
    """Write the tokenizer that `data.tokenizer` names to ``folder``, as `AutoTokenizer.from_pretrained` loads it.

    Bytes become a byte-level BPE without merges, which gives the same ids. ``chat_template`` takes the place of the
    tokenizer's own.

    Raises:
        FieldError: there is no such tokenizer any more.
    """
    if name == "auto":
        name = BYTES if pretrained is None else pretrained
    tokenizer: Any = _byte_tokenizer() if name == BYTES else PretrainedTokenizer(name)._tokenizer
    if max_tokens is not None:
        tokenizer.model_max_length = max_tokens
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={sign: byte for byte, sign in enumerate(_byte_signs())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(_END_NAME, special=True, normalized=False)])
    assert core.token_to_id(_END_NAME) == _END_OF_DOCUMENT
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=_END_NAME, pad_token=_END_NAME, clean_up_tokenization_spaces=False
    )


def _byte_signs() -> list[str]:
    """The printable sign for each byte in byte-level BPE: itself where it is printable, else the next from U+0100 on.

    Radford et al. 2019, `bytes_to_unicode` of GPT-2's encoder.py.
    """
    signs, free = [], 0x100
    for byte in range(256):
        printable = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
        signs.append(chr(byte if printable else free))
        free += not printable
    return signs
