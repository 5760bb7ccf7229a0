"""What a run leaves is its owner's alone: modes of every file, no secret in any, no port that the network reaches."""

import json
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import standin

from cuboid.launch import worker
from cuboid.launch.private import UMASK, keep_files_private
from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.recipe_file import load_recipe
from cuboid.trainer.runlog import redact

SECRETS = {
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary01",
    "WANDB_API_KEY": "ca0a7" * 8,
    "RAY_AUTH_TOKEN": "canary-of-a-ray-cluster",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0123",
    "AWS_SECRET_ACCESS_KEY": 'canary/of"a\\cloud+%=',
    "GITHUB_TOKEN": "ghp_CanaryCanaryCanaryCanaryCanaryCanary",
    "DATABASE_PASSWORD": "canary-of-a-database",
}
RECIPE = """\
name: mine
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 2, vocab_size: 264}
data: {kind: text, path: text.txt, sequence_length: 16}
parallel: {data: 2, microbatches: 1}
train: {steps: 3, global_batch: 4}
checkpoint: {every: 2}
track: {to: wandb, artifacts: none}
launch: {launcher: local, device: cpu}
"""
COMMAND = [sys.executable, "-m", "cuboid.launch.cli"]


def cuboid(folder: Path, *arguments: str, **variables: str) -> psutil.Popen:
    """A command as from a shell that lets everybody read and write everything."""
    environment = os.environ | SECRETS | {"CUBOID_CACHE": str(folder / "cache"), "WANDB_MODE": "offline"} | variables
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return psutil.Popen([*COMMAND, *arguments], cwd=folder, env=environment, umask=0, **streams)


def processes(command: psutil.Popen) -> Iterator[psutil.Process]:
    try:
        yield from [command, *command.children(recursive=True)]
    except psutil.NoSuchProcess:
        return


def seen_from_outside(command: psutil.Popen) -> tuple[set[str], set[str]]:
    """While the command runs: the words on its processes' command lines, and the addresses on which they listen."""
    words, addresses = set[str](), set[str]()
    while command.poll() is None:
        for process in processes(command):
            try:
                words |= set(process.cmdline())
                found = process.net_connections(kind="inet")
            except psutil.Error:  # it has just ended
                continue
            addresses |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
        time.sleep(0.2)
    return words, addresses


def shared(folder: Path) -> list[str]:
    """Files and folders that others than their owner may read or write, with their modes."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in paths if not path.is_symlink()}
    return [f"{path} {mode:o}" for path, mode in modes.items() if mode & 0o077]


def spellings(secret: str) -> set[bytes]:
    return {text.encode() for text in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""))}


def leaks(folder: Path) -> list[str]:
    """Files in which a secret stands."""
    return [
        f"{path} holds {name}"
        for path in folder.rglob("*")
        if path.is_file()
        for name, secret in SECRETS.items()
        if any(text in path.read_bytes() for text in spellings(secret))
    ]


def test_a_run_and_its_export_are_private(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("All that is gold does not glitter. " * 60)
    command = cuboid(tmp_path, "train", "recipe.yaml")
    words, addresses = seen_from_outside(command)
    out = command.stdout.read()
    assert command.returncode == 0, out
    export = cuboid(tmp_path, "export", "runs/mine", "--to", "hf", "--out", "exported")
    told = export.communicate(timeout=120)[0]
    assert export.returncode == 0, told
    for name in ("runs", "exported", "cache"):
        assert len(list((tmp_path / name).rglob("*"))) > 3
        assert shared(tmp_path / name) == []
    assert list((tmp_path / "runs").rglob("*.wandb")), "the tracker wrote nothing"
    assert leaks(tmp_path) == []
    for secret in SECRETS.values():
        assert secret not in out + told
        assert not any(secret in word for word in words)
    assert addresses == {"127.0.0.1"}


def leak(recipe: object, folder: Path) -> None:
    """What a library does that has been given a token."""
    for name in SECRETS:
        print(f"print {os.environ[name]}")
        print("in an error", {"key": os.environ[name]}, file=sys.stderr)
        logging.getLogger("library").warning("logged %s", os.environ[name])
    try:
        raise ValueError(
            f"401 for https://me:{SECRETS['DATABASE_PASSWORD']}@host, Authorization: Bearer abcdefghijklmnop1234"
        )
    except ValueError as error:
        raise RuntimeError(f"not authorised: {list(SECRETS.values())}") from error


def rank_that_leaks(folder: Path) -> None:
    os.environ.update(SECRETS, RANK="0")
    sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))  # not those of pytest
    logging.getLogger("library").addHandler(logging.StreamHandler())  # on the stream of before
    worker.run(standin.recipe().model_dump(), str(folder), train=leak)


def test_an_error_that_holds_a_secret_is_told_without(tmp_path: Path) -> None:
    process = get_context("fork").Process(target=rank_that_leaks, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 70
    assert leaks(tmp_path) == []
    log = (tmp_path / "logs" / "rank-0.txt").read_text()
    for words in ("print [HF_TOKEN]", "'key': '[WANDB_API_KEY]'", "logged [RAY_AUTH_TOKEN]"):
        assert words in log
    assert "https://me:[redacted]@host" in (tmp_path / "errors" / "rank-0.txt").read_text()
    assert "abcdefghijklmnop1234" not in (tmp_path / "errors" / "rank-0.txt").read_text()
    assert shared(tmp_path / "logs") == shared(tmp_path / "errors") == []


def test_a_recipe_that_holds_a_secret_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("text.txt", "https://me:pass1234@host/text.txt"))
    with pytest.raises(
        UserError, match=r"recipe.yaml:5: data.path=https://me:\[redacted\]@host/text.txt holds a secret"
    ):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"model.config.x=\[HF_TOKEN\] holds a secret") as refused:
        load_recipe("quickstart", [f"model.config.x={SECRETS['HF_TOKEN']}"])
    assert SECRETS["HF_TOKEN"] not in redact(str(refused.value))


def test_a_command_s_error_neither_tells_secrets_nor_steers_the_terminal(tmp_path: Path) -> None:
    command = cuboid(tmp_path, "train", f"{SECRETS['HF_TOKEN']}.yaml", 'name="\\e[2Jx"')
    out = command.communicate(timeout=60)[0]
    assert command.returncode == 2
    assert "no recipe file [HF_TOKEN].yaml" in out
    assert "\x1b[2J" not in out


@pytest.mark.parametrize(("chosen", "mode"), [(None, 0o600), ("027", 0o640), ("007", 0o660), ("0077", 0o600)])
def test_a_group_may_be_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, mode: int) -> None:
    if chosen:
        monkeypatch.setenv(UMASK, chosen)
    before = os.umask(0)
    try:
        keep_files_private()
        (tmp_path / "file").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("chosen", ["", "777", "0o77", "9", "-1"])
def test_a_umask_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv(UMASK, chosen)
    with pytest.raises(FieldError, match="use 077, 027 or 007"):
        keep_files_private()
