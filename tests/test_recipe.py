"""The recipe: its schema, the YAML door, overrides, and every mistake in words with file and line."""

import re
import subprocess
import sys

import pytest

from cuboid.parallel.errors import UserError, UserErrors
from cuboid.trainer.recipe import Recipe, validated
from cuboid.trainer.recipe_file import dump_recipe, load_recipe, shipped_recipes
from cuboid.trainer.resume import differences

MINIMAL = """\
name: mini
model:
  config: {model_type: llama, hidden_size: 64, rms_norm_eps: 1e-6, hidden_act: no}
data: {kind: text, path: "package:stdlib", sequence_length: 128}
train:
  steps: 10
  global_batch: 8
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a recipe file in the working directory."""
    monkeypatch.chdir(tmp_path)

    def _write(text, *, add=""):
        (tmp_path / "x.yaml").write_text(text + add)
        return "x.yaml"

    return _write


def complaints(path, *overrides):
    """Everything that is said of a wrong recipe, one line an error."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def test_defaults_and_yaml_1_2_scalars(write):
    recipe = load_recipe(write(MINIMAL, add="optimizer: {learning_rate: 1e-3, betas: [0.9, 0.99], eps: 1E-08}\n"))
    assert recipe.model.config == {"model_type": "llama", "hidden_size": 64, "rms_norm_eps": 1e-6, "hidden_act": "no"}
    assert (recipe.optimizer.learning_rate, recipe.optimizer.betas, recipe.optimizer.eps) == (1e-3, (0.9, 0.99), 1e-8)
    assert (recipe.layout.world_size, recipe.batch_plan.microbatch_size, recipe.runs) == (1, 8, "runs")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("010", 10), ("0x1F", 31), ("0o17", 15), ("-3", -3), ("+12e03", 12000.0), (".5", 0.5), ("1.", 1.0),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None), ("yes", "yes"), ("on", "on"),
        ("1_000", "1_000"), ("12:30:45", "12:30:45"), ("2026-11-21", "2026-11-21"), ("<<", "<<"), ("'1'", "1"),
        ("0b1", "0b1"), ("1e-6", 1e-6), ("-1E6", -1e6), ("é", "é"), ("{a: {b: [1, x]}}", {"a": {"b": [1, "x"]}}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(write, written, value):
    recipe = load_recipe(write(MINIMAL), [f"model.config.x={written}"])
    found = recipe.model.config["x"]
    assert (found, type(found)) == (value, type(value))
    # and what is stored beside a run reads back as the same recipe
    again = load_recipe(write(dump_recipe(recipe)))
    assert again == recipe
    assert type(again.model.config["x"]) is type(value)


def test_stored_text_is_never_read_back_as_a_number(write):
    words = [
        "1e-6",
        "0o7",
        "no",
        "null",
        "~",
        "",
        "1.",
        "true",
        "010",
        ".inf",
        "- x",
        "a: b",
        "# c",
        "&a",
        "*a",
        "!t",
        "x\ny",
        "'",
        "=",
        "<<",
    ]
    recipe, details = validated(
        load_recipe(write(MINIMAL)).model_dump() | {"model": {"config": {"model_type": "llama", "x": words}}}
    )
    assert not details
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_every_error_at_once_with_file_and_line(write):
    text = """\
name: a/b
model:
  config: {hidden_size: 64}
data: {kind: txt, path: 5, sequence_length: 1e3}
parallel:
  tensr: 2
  data: 0
  schedule: zbw
  pipeline: "2"
  shard: two
tensor: 3
quantize: {scheme: int3}
optimizer: {betas: [0.9, 1.0], lr: 3, learning_rate: .nan, clip_grad_norm: true}
checkpoint: often
seed: no
"""
    overrides = (
        "track.t=1",
        "precision.compute=float16",
        "a.b.c",
        "train.steps=[",
        "data.kind.x=3",
        "model.attention=a: b",
    )
    assert complaints(write(text), *overrides) == [
        "x.yaml: train is missing; it needs steps, global_batch",
        "x.yaml:1: name=a/b is not a safe name of a folder; use letters, digits, dots, _ and -, "
        "at most 100, a letter or digit first",
        "x.yaml:3: model.config has no model_type; write for example model_type: llama",
        "x.yaml:4: data.kind=txt is not a choice; did you mean text? use text, chat, instruct or preference",
        "x.yaml:4: data.path=5 is not text or a list; write it in quotes",
        "x.yaml:4: data.sequence_length=1000.0 is not a whole number",
        "x.yaml:6: parallel.tensr is not a key; did you mean parallel.tensor?",
        "x.yaml:7: parallel.data=0 is not at least 1",
        "x.yaml:8: parallel.schedule=zbw is not a choice; did you mean zbv? use gpipe, 1f1b, interleaved_1f1b, "
        "looped_bfs, interleaved_zero_bubble, zbv or dualpipe_v",
        'x.yaml:9: parallel.pipeline="2" is not a whole number; write it without quotes',
        'x.yaml:10: parallel.shard="two" is not true or false or a whole number',
        "x.yaml:11: tensor is not a key; did you mean parallel.tensor?",
        "x.yaml:12: quantize.scheme=int3 is not a choice; did you mean int8? use int8, int4, 8da4w or float8",
        "x.yaml:13: optimizer.learning_rate=nan is not finite",
        "x.yaml:13: optimizer.betas=[0.9, 1.0] has an item that is not below 1.0",
        "x.yaml:13: optimizer.clip_grad_norm=true is not a number or null",
        "x.yaml:13: optimizer.lr is not a key; known keys are name, learning_rate, betas, eps, weight_decay, "
        "clip_grad_norm, schedule, warmup_steps, min_ratio",
        'x.yaml:14: checkpoint="often" is not a mapping; its keys: every, keep, best, asynchronous, copy_to',
        'x.yaml:15: seed="no" is not a whole number',
        "override `a.b.c`: is not of the form section.key=value",
        "override `train.steps=[`: expected the node content, but found '<stream end>'",
        "override `data.kind.x=3`: data.kind is not a mapping",
        "override `model.attention=a: b`: a value is a scalar, [a list] or {key: value}",
        "override `precision.compute=float16`: precision.compute=float16 has not the range of bfloat16 and float32: "
        "its losses would have to be scaled, which is offered on no device; use float32 or bfloat16",
        "override `track.t=1`: track.t is not a key; did you mean track.to?",
    ]


def test_one_of_pretrained_and_config(write):
    path = write(MINIMAL)
    (both,) = complaints(path, "model.pretrained=models/x")
    assert both.startswith(
        "x.yaml:2: model needs exactly one of pretrained and config, both are given; set one to null"
    )
    (neither,) = complaints(path, "model.config=null")
    assert "neither is given; give one of them" in neither
    assert load_recipe(path, ["model.pretrained=models/x", "model.config=null"]).model.pretrained == "models/x"


def test_later_work_is_refused_by_name(write):
    path = write(MINIMAL)
    for override in (
        "parallel.compile=true", "precision.parameters=bfloat16",
        "data.kind=tokens", "parallel.activation_checkpointing=selective",
        "model.attention=flash_attention_2",
    ):  # fmt: skip
        (line,) = complaints(path, override)
        assert line.startswith(f"override `{override}`: {override.partition('=')[0]}=")
        assert "is not yet offered; use " in line
    (line,) = complaints(path, "precision.reduce=float16")
    assert "losses would have to be scaled, which is offered on no device; use float32 or bfloat16" in line


def test_a_section_that_may_be_null_has_keys_too(write):
    path = write(MINIMAL)
    assert load_recipe(path, ["moe={z_loss: 0.1}"]).moe.z_loss == 0.1
    assert complaints(path, "moe={zloss: 0.1, aux_loss: -1}") == [
        "override `moe={zloss: 0.1, aux_loss: -1}`: moe.aux_loss=-1 is not at least 0.0",
        "override `moe={zloss: 0.1, aux_loss: -1}`: moe.zloss is not a key; did you mean moe.z_loss?",
    ]
    (line,) = complaints(path, "moe=3")
    assert line.startswith("override `moe=3`: moe=3 is not a mapping; its keys: experts, top_k, aux_loss, z_loss, ")


def test_overrides(write):
    path = write(MINIMAL)
    recipe = load_recipe(
        path, ["parallel.tensor=4", "optimizer={learning_rate: 1e-6}", "train.steps=5", "train.steps=6"]
    )
    assert (recipe.parallel.tensor, recipe.optimizer.learning_rate, recipe.train.steps) == (4, 1e-6, 6)
    # a mapping replaces the whole value, and later overrides go below it
    recipe = load_recipe(path, ["model.config={model_type: qwen3}", "model.config.hidden_size=32"])
    assert recipe.model.config == {"model_type": "qwen3", "hidden_size": 32}
    assert complaints(path, "train={steps: 3}") == [
        "override `train={steps: 3}`: train.global_batch is missing; "
        "Sequences in one step: data x microbatches x microbatch size."
    ]
    assert (
        complaints(path, "parallel.tensr=4")[0]
        == "override `parallel.tensr=4`: parallel.tensr is not a key; did you mean parallel.tensor?"
    )


@pytest.mark.parametrize(
    ("addition", "words"),
    [
        ("seed: !!python/object/apply:os.system [touch hacked]", "the tag !!python/object/apply:os.system is refused"),
        ("lora: !mine {a: 1}", "x.yaml:8: the tag !mine is refused"),
        ("seed: !!int abc", "x.yaml:8: abc cannot be read as int"),
        ("name: other", "x.yaml:8: name stands twice, first at x.yaml:1"),
        ("lora: &a [1, 2]\nmoe: *a", "x.yaml:8: anchors and aliases (& and *) are refused"),
        ("lora: " + "[" * 5000, "x.yaml:8: nested deeper than 32 levels"),
        ("lora: " + "{a: " * 40 + "1" + "}" * 40, "x.yaml:8: nested deeper than 32 levels"),
        ("? [a, b]\n: 3", "a key that is itself a mapping or a list is refused"),
        ("seed: 3\n---\nseed: 4", "x.yaml:9: but found another document"),
        ("lora: {a: 1", "x.yaml:9: expected ',' or '}', but got '<stream end>'"),
        ("\tseed: 3", "x.yaml:8: found character '\\t' that cannot start any token"),
        ("seed: " + "9" * 5000, "cannot be read as int"),
        ("lora: \x01", "x.yaml: not YAML: unacceptable character #x0001"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_in_words(write, tmp_path, addition, words):
    assert any(words in line for line in complaints(write(MINIMAL, add=addition + "\n")))
    assert not (tmp_path / "hacked").exists()


def test_files_that_are_no_recipes(write, tmp_path):
    for content, words in (
        (b"", "is empty"),
        (b"- a\n", "is not a mapping"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"#" * (1 << 20) + b"#", "is larger"),
    ):
        (tmp_path / "x.yaml").write_bytes(content)
        assert words in complaints("x.yaml")[0]
    assert complaints("missing.yaml")[0].startswith(
        "there is no recipe file missing.yaml; shipped recipes, by bare name: distill, "
    )
    assert "did you mean quickstart?" in complaints("quikstart")[0]
    (line,) = complaints(str(tmp_path))
    assert line.startswith(f"there is no recipe file {tmp_path}; shipped recipes")


def test_shipped_recipes_are_valid_and_say_how_they_are_launched():
    shipped = shipped_recipes()
    assert {"quickstart", "smollm2"} <= set(shipped)
    for name, path in shipped.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        first = path.read_text().splitlines()[0]
        assert re.match(rf"# cuboid train recipes/{name}\.yaml +run on \d+ (CPU cores|GPUs), \d+ ranks", first), first
        assert recipe.batch_plan.microbatch_size >= 1


def test_what_may_differ_on_resume(write):
    path = write(MINIMAL)
    old = load_recipe(path).model_dump(mode="json")
    free = [
        "parallel.data=2",
        "launch.launcher=local",
        "track.to=none",
        "checkpoint.every=1",
        "faults.not_finite=skip",
        "train.steps=20",
        "train.log_every=5",
        "runs=/tmp",
    ]
    assert differences(old, load_recipe(path, free)) == []
    changed = load_recipe(
        path, ["optimizer.learning_rate=1", "model.config.hidden_size=32", "train.steps=5", "model.config.new=1"]
    )
    assert [str(error) for error in differences(old, changed)] == [
        "model.config.hidden_size=32 differs from the run's 64; set model.config.hidden_size=64",
        "model.config.new=1 differs from the run's null; set model.config.new=null",
        "optimizer.learning_rate=1.0 differs from the run's 0.0003; set optimizer.learning_rate=0.0003",
        "train.steps=5 is fewer than the run's 10; use 10 or more",
    ]
    del old["track"]  # a recipe of an older version, before the key existed
    assert differences(old, load_recipe(path)) == []


def test_schema_documents_every_field():
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert "description" in field or "$ref" in field, name
    recompute = schema["$defs"]["ParallelSettings"]["properties"]["activation_checkpointing"]
    assert recompute["enum"] == ["none", "full"], "only what works today"


def test_reading_a_recipe_imports_nothing_heavy():
    code = (
        "import sys; from cuboid.trainer.recipe_file import load_recipe; load_recipe('quickstart'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "ray", "numpy"} & set(done.stdout.split())


def test_errors_are_user_errors(write):
    with pytest.raises(UserErrors):
        load_recipe(write(MINIMAL), ["train.steps=x"])
