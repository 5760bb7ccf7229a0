"""What the deepspeed engine cannot run is refused in words, before any process starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import recipe_on
from typer.testing import CliRunner

from cuboid.launch import cli, local
from cuboid.trainer import check_engine
from cuboid.trainer.check_engine import compile_notice, engine_errors


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, **settings}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_stage": 1}, "parallel.zero_stage=1 needs parallel.engine=deepspeed; use null, or that engine"),
    ({"offload_path": "x"}, "parallel.offload_path=x needs parallel.engine=deepspeed; use null, or that engine"),
    ({"offload": "cpu"}, "parallel.offload=cpu needs parallel.engine=deepspeed; use null, or that engine"),
    (
        {"engine": "deepspeed"},
        "parallel.zero_stage=null leaves open what the deepspeed engine divides; use 1, 2 or 3",
    ),
    (
        {"engine": "deepspeed", "pipeline": 2},
        "parallel.zero_stage=null leaves open what the deepspeed engine divides; use 1",
    ),
    *(
        (
            zero(stage, pipeline=2),
            f"parallel.zero_stage={stage} divides gradients in every backward, which fails or hangs under "
            "parallel.pipeline=2; use 1, or parallel.pipeline=1",
        )
        for stage in (2, 3)
    ),
    (
        zero(1, expert=2),
        "parallel.expert=2 gives data ranks experts of their own, and ZeRO averages each gradient over all of them; "
        "use 1, or parallel.engine=native",
    ),
    *(
        (
            zero(1, shard=shard),
            f"parallel.shard={words} is for the native engine; under deepspeed parallel.zero_stage says what is "
            "divided; use true",
        )
        for shard, words in ((False, "false"), (2, "2"))
    ),
    (
        zero(3, reshard=False),
        "parallel.reshard=false is for the native engine; under deepspeed parallel.zero_stage says what is divided; "
        "use auto",
    ),
    *(
        (
            zero(1, pipeline=2, schedule=schedule),
            f"parallel.schedule={schedule} lays several stages on a rank, and the deepspeed engine runs one; use 1f1b "
            "or gpipe",
        )
        for schedule in ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipe_v")
    ),
    (
        zero(2, schedule="gpipe"),
        "parallel.schedule=gpipe runs several backwards after one another, which parallel.zero_stage=2 cannot; "
        "use 1f1b",
    ),
]


@pytest.mark.parametrize(("parallel", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_not_proven_is_refused(parallel: dict[str, Any], words: str) -> None:
    recipe = recipe_on("1x4x1")
    changed = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=parallel)})
    assert [str(error) for error in engine_errors(changed, runs_here=True)] == [words]


ON_DISK: list[tuple[dict[str, Any], str]] = [
    (
        zero(3, offload="nvme"),
        "parallel.offload_path=null leaves open where optimizer state lies; give a folder on a disk of the machine",
    ),
    (
        zero(3, offload="cpu", offload_path="x"),
        "parallel.offload_path=x needs parallel.offload=nvme; use null, or nvme",
    ),
    (
        zero(3, offload="nvme", offload_path="x"),
        "parallel.offload_path=x is relative, and a cluster's nodes and jobs each have a working directory of their "
        "own; use an absolute path that every node has",
    ),
    *(
        (
            zero(stage, offload="nvme", offload_path="/x"),
            f"parallel.offload=nvme is taken for cpu, without a word, under parallel.zero_stage={stage}; use cpu, or "
            "parallel.zero_stage=3",
        )
        for stage in (1, 2)
    ),
]


@pytest.mark.parametrize(("parallel", "words"), ON_DISK, ids=lambda value: str(value)[:60])
def test_state_on_a_disk_has_its_own_conditions(parallel: dict[str, Any], words: str) -> None:
    assert told(runs_here=False, **parallel) == [words]


def told(*, runs_here: bool = True, **parallel: Any) -> list[str]:
    return [str(error) for error in engine_errors(recipe_on("1x2x1", **parallel), runs_here=runs_here)]


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"PATH": ""}, "g++ and libaio-dev and ninja-build"),
        ({"CXX": "false"}, "libaio-dev"),
        ({"CXX": "no-such-compiler"}, "g++ and libaio-dev"),
    ],
)
def test_what_the_compile_step_misses_is_named(
    environment: dict[str, str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "PATH" not in environment:  # this machine's own may lack it
        (tmp_path / "ninja").touch(mode=0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert told(**zero(3, offload="nvme", offload_path=str(tmp_path))) == [
        f"parallel.offload=nvme is compiled by DeepSpeed, for which {missing} cannot be found; "
        f"apt-get install {missing.replace(' and', '')}, or use cpu"
    ]


@pytest.mark.parametrize(
    ("folder", "fault"), [("not there", "is no folder"), ("/proc", "cannot be written as DeepSpeed")]
)
def test_a_folder_that_cannot_hold_state_is_refused(
    folder: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_engine, "_missing_tools", list)
    (line,) = told(**zero(3, offload="nvme", offload_path=str(tmp_path / folder)))
    assert line.startswith(f"parallel.offload_path={tmp_path / folder} {fault}")
    assert not told(**zero(3, offload="nvme", offload_path=str(tmp_path)))


def test_the_compile_step_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_on("1x2x1", **zero(3, offload="nvme", offload_path=str(tmp_path)))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    words = f"DeepSpeed compiles its disk operator first: minutes, once; the result stays in {tmp_path}"
    assert compile_notice(recipe) == words
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "lock").touch()
    assert compile_notice(recipe) == f"{words}; if nothing compiles there now, delete {tmp_path / 'async_io' / 'lock'}"
    (tmp_path / "async_io" / "async_io.so").touch()
    assert compile_notice(recipe) is None
    assert compile_notice(recipe_on("1x2x1", **zero(3, offload="cpu"))) is None


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (
            "compute",
            "is something else in DeepSpeed: its bf16 goes on from rounded first weights, its autocast adds up layers "
            "in float32",
        ),
        ("reduce", "would round gradients once under ZeRO 1 and in every backward under ZeRO 2 and 3"),
    ],
)
def test_bfloat16_is_refused(field: str, reason: str) -> None:
    recipe = recipe_on("1x2x1", **zero(1))
    changed = recipe.model_copy(update={"precision": recipe.precision.model_copy(update={field: "bfloat16"})})
    (error,) = engine_errors(changed, runs_here=True)
    assert str(error) == f"precision.{field}=bfloat16 {reason}; use float32, or parallel.engine=native"


def test_a_missing_or_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_on("1x2x1", **zero(1))
    monkeypatch.setattr(check_engine, "metadata", SimpleNamespace(version=lambda name: "0.19.2+cpu"))
    (error,) = engine_errors(recipe, runs_here=True)
    words = "finds deepspeed 0.19.2+cpu, which scales gradients wrongly; pip install 'deepspeed>=0.19.3', or use native"
    assert str(error) == f"parallel.engine=deepspeed {words}"
    monkeypatch.setattr(check_engine, "find_spec", lambda name: None)
    (error,) = engine_errors(recipe, runs_here=True)
    words = "needs the package deepspeed; pip install 'cuboid[deepspeed]', or use native"
    assert str(error) == f"parallel.engine=deepspeed {words}"
    assert not list(engine_errors(recipe, runs_here=False)), "a cluster's machines have their own packages"


RECIPE = """\
name: small
model: {config: {model_type: llama, vocab_size: 264, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                 num_attention_heads: 4, num_key_value_heads: 2, bos_token_id: null, eos_token_id: 256}}
data: {kind: text, path: text.txt, tokenizer: bytes, sequence_length: 32}
parallel: {data: 2, pipeline: 2, microbatches: 2, engine: deepspeed, zero_stage: 3}
train: {steps: 3, global_batch: 8}
track: {to: none}
launch: {launcher: local, device: cpu}
"""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "small.yaml:5: parallel.zero_stage=3 divides gradients in every backward"),
        (["parallel.zero_stage=4"], "parallel.zero_stage=4 is not 1 or 2 or 3 or null"),
        (["parallel.offload=nvme"], "parallel.offload_path=null leaves open where optimizer state lies"),
    ],
)
def test_the_command_refuses_before_any_process(
    overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("All that is gold does not glitter. " * 99)
    Path("small.yaml").write_text(RECIPE)
    done = CliRunner().invoke(cli.app, ["train", "small.yaml", *overrides])
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("runs").exists()


def test_the_command_tells_of_the_compile_step_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(check_engine, "_missing_tools", list)
    monkeypatch.setattr(local, "launch", lambda recipe, folder: 1)  # no rank starts: it would compile for minutes
    Path("text.txt").write_text("All that is gold does not glitter. " * 99)
    Path("small.yaml").write_text(RECIPE)
    overrides = ["parallel.pipeline=1", "parallel.offload=nvme", "parallel.offload_path=."]
    done = CliRunner().invoke(cli.app, ["train", "small.yaml", *overrides])
    assert f"minutes, once; the result stays in {tmp_path / 'built'}\n" in done.stdout
