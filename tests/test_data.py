"""Data: what a sample holds, in which order, tokenised once."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import BYTES, prepared

from cuboid.parallel.errors import FieldError, UserError
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.corpus import find_corpus
from cuboid.trainer.data import Dataset, permute
from cuboid.trainer.tokenizer import open_tokenizer
from cuboid.trainer.tokens import Tokens, cache_folder, prepare_tokens


def dataset(documents, *, length, packing=True, cross=False, seed=0):
    """A data set of documents given as lists of ids."""
    starts = np.cumsum([0] + [len(document) for document in documents])
    tokens = Tokens(np.concatenate(documents).astype(np.uint16), starts.astype(np.int64), "none")
    return Dataset(tokens, sequence_length=length, packing=packing, cross_documents=cross, seed=seed, tokenizer=BYTES)


def random_documents(generator, number):
    """Documents of 2..40 ids, each id naming its document and place: document * 100 + place."""
    return [np.arange(length) + 100 * n for n, length in enumerate(generator.integers(2, 41, number))]


@pytest.mark.parametrize("length", [2, 7, 32, 4096])
def test_packing_predicts_each_token_once_and_nothing_across_documents(length):
    documents = random_documents(np.random.default_rng(length), 50)
    data = dataset(documents, length=length)
    batch = data.batch(range(data.num_samples))
    predicted = batch.labels != -100
    pairs = Counter(zip(batch.input_ids[predicted].tolist(), batch.labels[predicted].tolist(), strict=True))
    assert pairs == Counter((int(a), int(b)) for d in documents for a, b in itertools.pairwise(d))
    # Positions: one more than before, or 0 where the sample or a document begins.
    for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
        for t, (token, position) in enumerate(zip(ids, positions, strict=True)):
            begins = t == 0 or (token != BYTES.pad and token % 100 == 0)
            assert position == (0 if begins else positions[t - 1] + 1)
    padding = batch.input_ids == BYTES.pad
    assert (batch.labels[padding] == -100).all()
    assert int(padding.sum()) <= length


def test_cross_documents_is_one_running_text():
    documents = random_documents(np.random.default_rng(0), 20)
    stream = np.concatenate(documents)
    data = dataset(documents, length=16, cross=True)
    order = permute(np.arange(data.num_samples), data.num_samples, seed=0, epoch=0)
    batch = data.batch(range(data.num_samples))
    assert (batch.position_ids == torch.arange(16)).all()
    for row, place in enumerate(order):
        ids, after = stream[place * 16 : place * 16 + 16], stream[place * 16 + 1 : place * 16 + 17]
        assert batch.input_ids[row, : len(ids)].tolist() == ids.tolist()
        assert batch.labels[row, : len(after)].tolist() == after.tolist()
        assert (batch.labels[row, len(after) :] == -100).all()


def test_without_packing_a_document_is_a_sample():
    documents = random_documents(np.random.default_rng(0), 20)
    data = dataset(documents, length=16, packing=False)
    assert data.num_samples == 20
    batch = data.batch(range(20))
    assert (batch.position_ids == torch.arange(16)).all()
    for row, number in enumerate(permute(np.arange(20), 20, seed=0, epoch=0)):
        document = documents[number].tolist()
        filled = (document + [BYTES.pad] * 16)[:16]
        labels = (document[1:] + [-100] * 16)[:16]
        assert batch.input_ids[row].tolist() == filled
        assert batch.labels[row].tolist() == labels


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 255, 1000, 65537])
def test_an_epoch_holds_each_sample_once(size):
    numbers = np.arange(size)
    orders = [permute(numbers, size, seed=3, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), numbers)
    if size >= 16:
        shares = [np.mean(a == b) for a, b in [(orders[0], orders[1]), (orders[1], orders[2]), (orders[0], numbers)]]
        assert max(shares) < 5 / size + 0.01, "an epoch repeats the order of another"


FIRST_SAMPLES = [675, 716, 75, 387, 50, 293]


def test_the_order_is_even_and_never_changes_between_versions():
    """Each sample comes to each place equally often (chi-square, 19 x 19 degrees of freedom), and seeds differ."""
    epochs = 2000
    counts = np.zeros((20, 20))
    for epoch in range(epochs):
        counts[np.arange(20), permute(np.arange(20), 20, seed=7, epoch=epoch)] += 1
    chi_square = ((counts - epochs / 20) ** 2 / (epochs / 20)).sum()
    assert 361 - 6 * 27 < chi_square < 361 + 6 * 27
    # A resumed run counts on these figures: they may not change without another name of the order in the fingerprint.
    assert permute(np.arange(6), 1000, seed=1234, epoch=0).tolist() == FIRST_SAMPLES
    assert permute(np.arange(6), 1000, seed=1235, epoch=0).tolist() != FIRST_SAMPLES


def test_samples_go_on_without_end_and_any_is_found_at_once():
    data = dataset(random_documents(np.random.default_rng(1), 30), length=8)
    n = data.num_samples
    epochs = [data.batch(range(e * n, (e + 1) * n)) for e in range(3)]
    contents = [Counter(tuple(row) for row in epoch.input_ids.tolist()) for epoch in epochs]
    assert contents[0] == contents[1] == contents[2]
    assert not torch.equal(epochs[0].input_ids, epochs[1].input_ids)
    across = data.batch(range(n - 3, n + 3))
    assert torch.equal(across.labels, torch.cat([epochs[0].labels[-3:], epochs[1].labels[:3]]))
    # The mesh does not matter: shares of any size are rows of the whole.
    whole = data.batch(range(40, 64))
    parts = [data.batch(range(40 + 6 * rank, 46 + 6 * rank)) for rank in range(4)]
    for field in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
        assert getattr(whole, field).dtype == torch.int64
        assert getattr(whole, field).is_contiguous()
    assert data.batch(range(10**15, 10**15 + 4)).input_ids.shape == (4, 8)


def test_a_batch_costs_less_than_a_millisecond(tmp_path):
    data = prepared("package:stdlib", tmp_path, sequence_length=128)
    seconds = []  # of the processor: the machine may be busy with other things
    for step in range(50):
        started = time.thread_time()
        data.batch(range(16 * step, 16 * step + 16))
        seconds.append(time.thread_time() - started)
    assert statistics.median(seconds) < 1e-3


def test_an_incomplete_batch_is_filled_up_with_rows_that_predict_nothing():
    found = dataset([range(20)], length=6)
    for count in (3, 1, 0):
        batch = found.batch(range(count))
        full = batch.filled_up(3)
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(getattr(full, name)[:count], getattr(batch, name))
            assert getattr(full, name).shape == (3, 6)
        assert (full.labels[count:] == IGNORE).all()
        assert (full.position_ids[count:] == torch.arange(6)).all()  # a document: each token has what to attend to
    with pytest.raises(AssertionError, match="3 samples, where a step takes 2"):
        found.batch(range(3)).filled_up(2)


def test_the_fingerprint_tells_contents_apart(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the quick brown fox")
    first = prepared(str(source), tmp_path / "cache")
    assert first.fingerprint == prepared(str(source), tmp_path / "other").fingerprint
    copy = tmp_path / "b.txt"
    copy.write_text("the quick brown fox")
    assert first.fingerprint == prepared(str(copy), tmp_path / "cache").fingerprint
    different = [
        prepared(str(source), tmp_path / "cache", sequence_length=9),
        prepared(str(source), tmp_path / "cache", cross_documents=True),
        prepared(str(source), tmp_path / "cache", seed=1),
    ]
    times = os.stat(source)
    source.write_text("the quick brown fix")  # the same size, and the same time below
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    different.append(prepared(str(source), tmp_path / "cache"))
    assert len({first.fingerprint, *(data.fingerprint for data in different)}) == 5


def _prepare_counted(folder, results):
    """One of many processes that want the same data; counts how often the corpus is really read."""
    corpus = find_corpus(str(folder / "corpus.txt"))

    def read():
        with open(folder / "reads", "a") as file:
            file.write("read\n")
        time.sleep(0.3)
        yield from corpus.read()

    tokens = prepare_tokens(replace(corpus, read=read), tokenizer=BYTES, cache=folder / "cache")
    results.put((tokens.sha256, bytes(tokens.ids[:4].astype(np.uint8))))


def test_tokenised_once_for_all_ranks(tmp_path):
    (tmp_path / "corpus.txt").write_text("once upon a time")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_prepare_counted, args=(tmp_path, results)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    found = {results.get(timeout=30) for _ in ranks}
    for rank in ranks:
        rank.join(30)
    assert (tmp_path / "reads").read_text() == "read\n"
    assert len(found) == 1
    assert found.pop()[1] == b"once"


def test_a_killed_preparer_and_a_broken_entry_block_nobody(tmp_path):
    (tmp_path / "corpus.txt").write_text("once upon a time")
    program = f"""
import time
from dataclasses import replace
from pathlib import Path
from cuboid.trainer.corpus import find_corpus
from cuboid.trainer.tokenizer import ByteTokenizer
from cuboid.trainer.tokens import prepare_tokens
corpus = find_corpus({str(tmp_path / "corpus.txt")!r})
def read():
    yield "x" * (1 << 23)
    print("inside", flush=True)
    time.sleep(60)
prepare_tokens(replace(corpus, read=read), tokenizer=ByteTokenizer(), cache=Path({str(tmp_path / "cache")!r}))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as preparer:
        assert preparer.stdout.readline() == b"inside\n"
        preparer.send_signal(signal.SIGKILL)
        preparer.wait(10)
    folder = tmp_path / "cache" / "tokens"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")], "nothing was left half-written"
    whole = prepared(str(tmp_path / "corpus.txt"), tmp_path / "cache")
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    facts = json.loads((entry / "facts.json").read_text())
    assert facts["tokens"] == 17
    assert facts["bytes"] == {"tokens.bin": 34, "starts.bin": 16}
    os.truncate(entry / "tokens.bin", 20)
    assert prepared(str(tmp_path / "corpus.txt"), tmp_path / "cache").fingerprint == whole.fingerprint
    assert (entry / "tokens.bin").stat().st_size == 34


def test_a_changed_byte_of_the_cache_is_found(tmp_path):
    """One flipped bit of an id is another word, and no size tells of it."""
    (tmp_path / "corpus.txt").write_text("once upon a time")
    corpus = find_corpus(str(tmp_path / "corpus.txt"))
    prepare_tokens(corpus, tokenizer=BYTES, cache=tmp_path / "cache", verify=True)
    (file,) = (tmp_path / "cache").glob("tokens/*/tokens.bin")
    content = bytearray(file.read_bytes())
    content[6] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"token files in {file.parent} are not as they were written; delete the"):
        prepare_tokens(corpus, tokenizer=BYTES, cache=tmp_path / "cache", verify=True)
    shutil.rmtree(file.parent)
    again = prepare_tokens(corpus, tokenizer=BYTES, cache=tmp_path / "cache", verify=True)
    assert bytes(again.ids[:4].astype(np.uint8)) == b"once"


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("CUBOID_CACHE", raising=False)
    assert cache_folder() == Path("/x/cuboid")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/cuboid")
    monkeypatch.setenv("CUBOID_CACHE", "~/c")
    assert cache_folder() == Path("/h/c")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer of its own, as a model of the hub has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([Path(json.__file__).read_text()], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_the_models_own_tokenizer(tmp_path, pretrained):
    from transformers import AutoTokenizer

    tokenizer = open_tokenizer("auto", pretrained=str(pretrained), vocab_size=400)
    line = "    def decode(self, s, _w=WHITESPACE.match):\n"
    documents = [line * 3, "ö" * 10, line * 15_000]  # the last one is several pieces long
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(document)
    tokens = prepare_tokens(find_corpus(str(tmp_path / "*.txt")), tokenizer=tokenizer, cache=tmp_path / "cache")
    reference = AutoTokenizer.from_pretrained(pretrained)
    for number, document in enumerate(documents):
        ids = tokens.ids[tokens.starts[number] : tokens.starts[number + 1]]
        assert ids.tolist() == [*reference(document)["input_ids"], reference.eos_token_id]
    assert tokens.ids.dtype == np.uint16
    assert tokenizer.identity == open_tokenizer(str(pretrained)).identity != BYTES.identity


def test_a_tokenizer_that_does_not_fit_is_refused_with_the_values(tmp_path, pretrained):
    words = (
        r"data.tokenizer=bytes has ids up to 256, which do not fit the model's vocab_size=256; set .* to at least 257"
    )
    with pytest.raises(FieldError, match=words):
        open_tokenizer("auto", vocab_size=256)
    assert open_tokenizer("bytes", vocab_size=257).vocab_size == 257
    assert open_tokenizer("bytes", pretrained=str(pretrained), vocab_size=512).identity == "bytes"
    with pytest.raises(FieldError, match=r"has ids up to 399, which do not fit the model's vocab_size=399"):
        open_tokenizer("auto", pretrained=str(pretrained), vocab_size=399)
    with pytest.raises(FieldError, match=r"model.pretrained=.* gives no tokenizer \("):
        open_tokenizer("auto", pretrained=str(tmp_path))
    with pytest.raises(FieldError, match=r"data.tokenizer=./nowhere is no folder"):
        open_tokenizer("./nowhere")
