"""What `cuboid submit` sends, and which clusters it talks to; runs on a real cluster: test_submit_ray.py."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from cuboid.launch import cli, submit_parcel
from cuboid.launch.ray_group import RankConfig, Seat, _check
from cuboid.launch.ray_jobs import _Tail, exit_code, why_not_begun
from cuboid.launch.submit_address import settle_access
from cuboid.launch.submit_parcel import LIMIT_BYTES, pack
from cuboid.launch.submitted import SENT, tell_version
from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import load_recipe
from cuboid.trainer.version import version

ROOT = Path(__file__).parents[1]


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "far",
            "model": {"config": {"model_type": "llama"}},
            "data": {"kind": "text", "path": "texts", "sequence_length": 8, **changes},
            "train": {"steps": 2, "global_batch": 1},
            "runs": "/shared",
        }
    )


def write(path: Path, text: str = "words") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def carried(folder: Path) -> set[str]:
    """Names of the user's files in a parcel."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return {name for name in names if not name.startswith("cuboid") and name != "recipe.yaml"}


def test_the_code_is_what_git_knows_and_works_alone(tmp_path: Path) -> None:
    """Without site-packages: nothing that the cluster has installed answers in its place."""
    pack(recipe(path="package:stdlib"), tmp_path / "job")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *submit_parcel._PACKAGES]
    known = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    code = tmp_path / "job" / "cuboid"
    assert {path.relative_to(code).as_posix() for path in code.glob("*/*")} == {
        name for name in known if (ROOT / name).exists()
    }
    lines = ("import sys", f"sys.path.insert(0, {str(tmp_path / 'job')!r})", "from cuboid.trainer import version as v")
    command = [sys.executable, "-I", "-S", "-c", "; ".join([*lines, "print(v.version(), v.__file__)"])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [version(), f"{code}/trainer/version.py"]


def test_relative_files_travel_and_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "work" / "here"
    write(here / "texts" / "a.txt", "a" * 1000)
    write(here / "texts" / "deep" / "b.txt")
    write(here / "texts" / ".git" / "objects")
    write(here / "texts" / ".gitignore", "*")
    write(here / "more-1.txt")
    write(here / "more-2.txt")
    write(tmp_path / "elsewhere" / "held.txt")
    monkeypatch.chdir(here)
    asked = recipe(
        path=["texts", "more-?.txt", "/on/the/nodes", "~/there", "some/hub-id"], eval_path="../../elsewhere/held.txt"
    )
    parcel = pack(asked, tmp_path / "job")
    names = {"texts/a.txt", "texts/deep/b.txt", "more-1.txt", "more-2.txt", "above-2/elsewhere/held.txt"}
    assert carried(parcel.folder) == names
    sent = load_recipe(parcel.folder / "recipe.yaml")
    assert sent.data.path == asked.data.path
    assert sent.data.eval_path == "above-2/elsewhere/held.txt"
    rest = sent.model_copy(update={"data": sent.data.model_copy(update={"eval_path": asked.data.eval_path})})
    assert rest == asked
    assert parcel.bytes_by_part["data.path"] == 1015
    assert parcel.bytes == parcel.bytes_by_part["code"] + 1015 + 5


def test_large_files_are_refused_before_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(LIMIT_BYTES)
    words = r"data\.path=big\.txt is 105 MB here, and Ray's job API takes 105 MB in all; put it on storage that every"
    with pytest.raises(FieldError, match=words):
        pack(recipe(path="big.txt"), tmp_path / "job")
    assert not carried(tmp_path / "job")


def test_files_in_the_place_of_the_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cuboid" / "a.txt")
    with pytest.raises(FieldError, match=r"data\.path=cuboid would lie where cuboid of the job does"):
        pack(recipe(path="cuboid"), tmp_path / "job")


@contextmanager
def answering(code: int) -> Iterator[str]:
    """host:port of a server that says this to all who show no token. 0.0.0.0 leads here, and is no loopback address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *about: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield str(server.server_port)
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)


def test_an_open_cluster_is_taken_on_the_loopback_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://another:8265")
    with answering(200) as port:
        for host in ("127.0.0.1", "localhost"):
            assert settle_access(f"http://{host}:{port}/", insecure=False) == f"http://{host}:{port}"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "not for everybody")
        with pytest.raises(UserError, match="has no token authentication, and its job API runs code for anyone who"):
            settle_access(f"http://0.0.0.0:{port}", insecure=False)
        assert settle_access(f"http://0.0.0.0:{port}", insecure=True)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_ADDRESS" not in os.environ


def test_a_cluster_that_asks_for_a_token_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(401) as port:
        with pytest.raises(UserError, match="asks for a token, and the environment has none; set RAY_AUTH_TOKEN_PATH"):
            settle_access(f"http://0.0.0.0:{port}", insecure=False)
        for content, fault in ((None, "cannot be read: No such file"), ("\n", "is empty; the cluster at")):
            if content:
                (tmp_path / "token").write_text(content)
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
            with pytest.raises(UserError, match=rf"RAY_AUTH_TOKEN_PATH=.*/token {fault}"):
                settle_access(f"http://0.0.0.0:{port}", insecure=False)
        (tmp_path / "token").write_text("secret")
        settle_access(f"http://0.0.0.0:{port}", insecure=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.0.0.1:6379", "--address 10.0.0.1:6379 is not the URL of a Ray cluster's job API; use http://HOST:8265"),
        ("ray://head:10001", "is not the URL"),
        ("http://me:hunter2@head:8265", "--address http://head:8265 is not the URL"),
        ("http://127.0.0.1:9", "no Ray job API answers at http://127.0.0.1:9: "),
    ],
)
def test_other_addresses_are_refused_in_words(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        settle_access(address, insecure=False)
    assert "hunter2" not in str(told.value)


def test_what_is_wrong_with_a_recipe_is_told_before_any_cluster_is_asked() -> None:
    arguments = ["submit", "quickstart", "train.global_batch=3", "--address", "http://127.0.0.1:9"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "train.global_batch=3 is not a multiple of data x microbatches" in done.stderr
    assert "runs=runs is relative, and a cluster's nodes and jobs each have" in done.stderr


def test_a_job_says_which_code_runs_and_refuses_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_version()
    assert not capsys.readouterr().out, "no job"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv(SENT, version())
    tell_version()
    assert capsys.readouterr().out.startswith(f"cuboid {version()} on ")
    monkeypatch.setenv(SENT, "0.0.9+gabc")
    with pytest.raises(UserError, match=r"the job was sent with cuboid 0\.0\.9\+gabc, and .* runs"):
        tell_version()


@pytest.mark.parametrize(
    ("seat", "words"),
    [
        ({"sees_folder": False}, "node b does not see the run's folder /shared/far; give `runs` as an absolute path"),
        ({"version": "0.0.9+gabc"}, r"node b has cuboid 0\.0\.9\+gabc, this command is .*; install the same"),
    ],
)
def test_a_node_that_lacks_the_folder_or_the_code_is_named(seat: dict[str, object], words: str) -> None:
    about = {"address": "", "pid": 1, "version": version(), "sees_folder": True}
    seats = [Seat(node="1", host="a", **about), Seat(node="2", host="b", **(about | seat))]
    config = RankConfig(Path("/shared/far"), Path("/shared/far/.ray/seen"), tensor=1, threads=None)
    _check(seats[:1], config)
    with pytest.raises(UserError, match=words):
        _check(seats, config)


class Stream:
    """A log as the job API gives it: from its beginning at each call, in pieces of its own choice, cut off at first."""

    def __init__(self, *readings: list[str | Exception]) -> None:
        self._readings = iter(readings)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for piece in next(self._readings):
            if isinstance(piece, Exception):
                raise piece
            yield piece


def test_a_log_is_shown_once_however_often_its_connection_is_lost() -> None:
    shown: list[str] = []
    tail = _Tail(
        Stream(["one ", "two ", OSError("lost")], ["one", OSError("lost")], ["one two thr", "ee"]), "id", shown.append
    )
    for _ in range(2):
        with pytest.raises(OSError, match="lost"):
            asyncio.run(tail.read())
    asyncio.run(tail.read())
    assert "".join(shown) == "one two three"


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("STOPPED", None, 85), ("FAILED", 2, 2), ("FAILED", 85, 85), ("FAILED", None, 1)],
)
def test_who_follows_a_job_ends_as_it_did(status: str, driver: int | None, code: int) -> None:
    job = JobDetails(
        type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="", driver_exit_code=driver, message="no node"
    )
    assert exit_code(job) == code
    assert why_not_begun(job) == ("no node" if (status, driver) == ("FAILED", None) else "")
