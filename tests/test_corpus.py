"""Where documents come from: files, folders, tables, the built-in corpus; and what is wrong with them, in words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from samples import prepared

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.corpus import find_corpus


def texts(path, **arguments):
    return list(find_corpus(str(path) if isinstance(path, Path) else path, **arguments).read())


def test_the_standard_library_is_always_there(tmp_path):
    corpus = find_corpus("package:stdlib")
    documents = list(corpus.read())
    assert documents == list(find_corpus("package:stdlib").read())
    assert len(documents) > 400
    assert any("class JSONDecoder" in text for text in documents)
    assert not any("/test/" in key[0] or "site-packages/" in key[0] for key in corpus.key[1:])
    data = prepared("package:stdlib", tmp_path)
    ids = data.batch(range(100)).input_ids
    assert int(ids.max()) <= 256


def test_files_folders_globs_and_lists(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / ".git").mkdir()
    (tmp_path / "a" / "2.txt").write_bytes("\ufeffzwei\r\nö".encode())
    (tmp_path / "a" / "1.md").write_text("one")
    (tmp_path / "a" / "deep" / "3.py").write_text("three = 3")
    (tmp_path / "a" / "deep" / "rows.jsonl").write_text('{"text": "r1"}\n\n{"text": null}\n{"text": "r2", "n": 1}\n')
    (tmp_path / "a" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "a" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "odd.log").write_text("log")
    assert texts(tmp_path / "a") == ["one", "zwei\r\nö", "three = 3", "r1", "", "r2"]
    assert texts([str(tmp_path / "odd.log"), str(tmp_path / "a" / "deep")]) == ["log", "three = 3", "r1", "", "r2"]
    assert texts(f"{tmp_path}/a/*.*[dt]") == ["one", "zwei\r\nö"]
    assert texts(f"{tmp_path}/**/*.py") == ["three = 3"]
    assert texts(tmp_path / "a" / "deep" / "rows.jsonl", text_column="text") == ["r1", "", "r2"]


CARD = """---
configs:
- config_name: whole
  default: true
  data_files: [{split: train, path: train.parquet}, {split: test, path: test.parquet}]
- config_name: part
  data_files: [{split: train, path: test.parquet}]
---
not a document
"""


def test_tables_and_data_set_folders_are_read_by_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for split in ("train", "test"):
        rows = {"body": [f"{split} {n}" for n in range(1500)] + [None], "id": list(range(1501))}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    expected = [f"test {n}" for n in range(1500)] + [""]
    assert texts(folder / "test.parquet", text_column="body") == expected
    assert texts(folder, text_column="body", split="test") == expected
    assert texts(folder, text_column="body", subset="part") == expected
    (tmp_path / "t.csv").write_text("text,n\nhello,1\n")
    assert texts(tmp_path / "t.csv") == ["hello"]
    assert prepared(str(folder), tmp_path / "cache", text_column="body").num_documents == 1500
    with pytest.raises(UserError, match=r"set: no column text \(there are: body, id\); set data.text_column"):
        texts(folder)
    with pytest.raises(UserError, match=r"test.parquet, row 1: column id holds int, not text"):
        texts(folder / "test.parquet", text_column="id")
    with pytest.raises(FieldError, match=r"data.path=.*set cannot be loaded by datasets \(Unknown split \"dev\""):
        texts(folder, text_column="body", split="dev")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((folder / "test.parquet").read_bytes()[:-100])
    with pytest.raises(FieldError, match=r"data.path=.*broken.parquet is no readable parquet \("):
        texts(broken, text_column="body")
    (tmp_path / "gone.txt").write_text("gone")
    for name in ("t.csv", "gone.txt"):
        corpus = find_corpus(str(tmp_path / name))
        (tmp_path / name).unlink()
        with pytest.raises(FieldError, match=rf"data.path=.*{name} cannot be read \(No such file"):
            list(corpus.read())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FieldError, match=r"needs the package datasets; pip install 'cuboid\[data\]'"):
        texts(folder)


def test_a_hub_id_without_a_network_is_told_in_words():
    code = "from cuboid.trainer.corpus import find_corpus; next(find_corpus('someone/nothing').read())"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert "data.path=someone/nothing is no file or folder here, and cannot be loaded by datasets" in done.stderr


def broken_jsonl(folder, line):
    (folder / "x.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    return str(folder / "x.jsonl")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda f: str(f / "none.txt"),
            r"data.path=.*none.txt does not exist; give a file, a folder, a glob, a hub id",
        ),
        (lambda f: str(f / "*.txt"), r"data.path=.*\*.txt matches no file"),
        (lambda f: str(f), r"data.path=.* holds no file that ends in .txt, .md, .py, .jsonl"),
        (lambda f: "package:torch", r"data.path=package:torch is no built-in corpus; use package:stdlib"),
        (lambda f: "corpus.txt", r"data.path=corpus.txt does not exist"),
        (lambda f: broken_jsonl(f, b'{"text": "ba'), r"x.jsonl, line 3: not JSON \(Unterminated string"),
        (
            lambda f: broken_jsonl(f, b'{"txt": "ba"}'),
            r"x.jsonl, line 3: no column text \(there are: txt\); set data.te",
        ),
        (lambda f: broken_jsonl(f, b'{"text": 3}'), r"x.jsonl, line 3: column text holds int, not text"),
        (lambda f: broken_jsonl(f, b"[1]"), r"x.jsonl, line 3: a JSON object is needed, this is list"),
        (lambda f: broken_jsonl(f, b'{"text": "\xff"}'), r"x.jsonl, line 3: not JSON"),
    ],
)
def test_bad_input_is_told_in_words(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        prepared(make(tmp_path), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("tokens/*/facts.json"))


def test_nothing_to_train_on(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(FieldError, match="has no usable document: all are empty"):
        prepared(str(empty), tmp_path / "cache")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FieldError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        prepared(str(tmp_path / "latin.txt"), tmp_path / "cache")
    (tmp_path / "blocked").write_text("a file where the cache should be")
    (tmp_path / "ok.txt").write_text("ok")
    with pytest.raises(UserError, match=r"cache of token files .*blocked/tokens cannot be written .*set CUBOID_CACHE"):
        prepared(str(tmp_path / "ok.txt"), tmp_path / "blocked")
