"""Data and chat templates of an enemy: what unfolds, never ends or lies about its size is told in words."""

import bz2
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  what reads tables, imported before a cost is measured
import numpy as np
import pyarrow as pa
import pytest
from hostile import ALWAYS, refusal
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from samples import BYTES, CHATML, save_chat_tokenizer

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.chat_template import open_template
from cuboid.trainer.corpus import find_corpus
from cuboid.trainer.generate import _as_message
from cuboid.trainer.limits import limited
from cuboid.trainer.model_folder import load_tokenizer
from cuboid.trainer.tokens import prepare_tokens

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"
TEMPLATES = {
    "endless loops": ENDLESS,
    "a long text": "{{ 'x' * 10**10 }}",
    "a wide number": "{{ '%0999999999d' % 1 }}",
    "a number of a billion digits": "{{ 9**(9**(9**9)) }}",
    "texts that double": "{% set ns = namespace(a='xx') %}" + DOUBLED,
    "lists that double": "{% set ns = namespace(a=[1]) %}" + DOUBLED,
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if place < 2 else pytest.mark.full) for place, name in enumerate(TEMPLATES)]
)
def test_a_template_that_never_ends_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATES[case] + CHATML)
    if case == "a macro that calls itself":  # Python itself stops it, at each conversation
        template = open_template(str(tmp_path / "t.jinja"), BYTES)
        assert "recursion" in refusal(template.example, [{"role": "user", "content": "Who?"}])
    else:
        assert "needs more than 0.7 s or 150 MB" in refusal(open_template, str(tmp_path / "t.jinja"), BYTES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_stays_in_its_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.jinja").write_text(CHATML + source)
    template = open_template("t.jinja", BYTES)
    with pytest.raises(UserError, match="the chat template refuses it"):
        template.example([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}])
    assert not Path("hacked").exists()


def test_a_model_s_own_template_is_bounded_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_chat_tokenizer(tmp_path, ENDLESS))
    with pytest.raises(UserError, match="the chat template refuses it: TimeoutError"):
        _as_message(tokenizer, "Who?")


def spin() -> None:
    while True:
        pass


def test_limits_end_with_their_block() -> None:
    with pytest.raises(MemoryError), limited(seconds=5, megabytes=50):
        np.ones(10**8)
    assert np.ones(10**7).sum() == 10**7
    with pytest.raises(TimeoutError), limited(seconds=0.05, megabytes=50):
        spin()
    sum(range(10**7))  # longer than that


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content)


def zipped(content: bytes) -> bytes:
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", content)
    return place.getvalue()


def tarred(content: bytes) -> bytes:
    place = io.BytesIO()
    with tarfile.open(fileobj=place, mode="w") as archive:
        info = tarfile.TarInfo("a.csv")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return place.getvalue()


def read(path: Path) -> None:
    list(find_corpus(str(path)).read())


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
@pytest.mark.parametrize("pack", [gzipped, zipped, tarred, bz2.compress])
def test_a_packed_table_is_refused_whatever_its_name(
    tmp_path: Path, pack: Callable[[bytes], bytes], suffix: str
) -> None:
    (tmp_path / f"a{suffix}").write_bytes(pack(b"text\n" + b"a\n" * 1000))
    assert "is packed, and may unfold to any size" in refusal(read, tmp_path / f"a{suffix}")


def test_a_folder_with_an_archive_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.zip").write_bytes(zipped(b"x" * 10**6))
    assert "b.zip is packed" in refusal(read, tmp_path)


@pytest.mark.parametrize(
    "column",
    [pa.nulls(50_000_000, pa.string()), pa.array(np.zeros(60_000_000, np.int8))],
    ids=["a wealth of nulls", "a wealth of zeros"],
)
def test_a_parquet_that_unfolds_is_refused(tmp_path: Path, column: pa.Array) -> None:
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 300_000
    words = refusal(read, tmp_path / "a.parquet")
    assert "rows out of" in words


@pytest.mark.parametrize("footer", [b"", b"\xff" * 4 + b"PAR1", (100).to_bytes(4, "little") + b"PAR1"])
def test_a_parquet_that_is_none_is_refused(tmp_path: Path, footer: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\x15" * 200 + footer)
    assert "is no readable parquet" in refusal(read, tmp_path / "a.parquet")


ROWS = {
    "nested": '{"text": ' + "[" * 100_000,
    "unfolding": '{"text": [' + "[]," * 1_000_000 + "[]]}",
    "long": '{"text": "' + "x" * (80 << 20) + '"}',
    "twice": '{"text": "a", "text": "b"}',
    "a number": '{"text": ' + "9" * 100_000 + "}",
}


@pytest.mark.parametrize("case", ROWS)
def test_a_hostile_row_is_told_by_its_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + ROWS[case] + '\n{"text": "three"}\n')
    assert f"{path}, line 2: not JSON" in refusal(read, path)
    found = find_corpus(str(path), skip_broken=True)
    assert [document for document in found.read() if isinstance(document, str)] == ["one", "three"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("text"), inner, max_size=3)
    ),
)


def test_a_row_may_hold_a_long_text_of_any_signs(tmp_path: Path) -> None:
    text = '[{"a": 1, "b": []}, ' * 300_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert [*find_corpus(str(tmp_path / "a.jsonl")).read()] == [text]


@ALWAYS
@given(st.lists(VALUES.map(json.dumps) | st.text(max_size=20), max_size=4))
def test_any_rows_are_documents_or_told(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8", "replace")
    corpus = find_corpus(str(folder / "a.jsonl"), skip_broken=True)
    with suppress(FieldError):  # no usable document
        assert prepare_tokens(corpus, tokenizer=BYTES, cache=folder).starts[-1] > 0
