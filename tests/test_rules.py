"""The rules of CONTRIBUTING.md, executed: who may import what, and how large things may grow.

ruff tells most of them while one types (TID251, TID253, PLW0603); here they are exact: which file is whose door.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RUFF = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]

MAY_IMPORT = {
    "parallel": set(),
    "trainer": {"parallel"},
    "recipes": set(),
    "launch": {"parallel", "trainer"},
}
AXES = {"parallel.tensor", "parallel.expert", "parallel.data", "parallel.pipeline"}
"""The axis files do not import one another; they meet in trainer/assemble and trainer/engine."""

DOORS = {
    "datasets": {"trainer/corpus.py"},
    "deepspeed": {"trainer/zero.py"},
    "fsspec": {"trainer/copies.py"},
    "huggingface_hub": {"trainer/model.py", "trainer/model_config.py"},
    "lm_eval": {"trainer/tasks.py"},
    "matplotlib": {"trainer/timeline.py"},
    "peft": {"recipes/compare_answers.py", "trainer/adapters.py"},
    "pyarrow": {"trainer/corpus.py"},
    "pydantic": {"trainer/recipe.py", "trainer/recipe_fields.py"},
    "ray": {"launch/ray_group.py", "launch/ray_jobs.py", "launch/ray_room.py"},
    "rich": {"launch/data.py", "launch/progress.py"},
    "safetensors": {"trainer/low_rank_format.py", "trainer/restore.py", "trainer/weights.py"},
    "torch.distributed.device_mesh.DeviceMesh.from_group": {"parallel/mesh.py"},
    "torch.distributed.fsdp": {"parallel/data.py"},
    "torch.distributed.init_process_group": {"parallel/mesh.py"},
    "torch.distributed.pipelining": {"parallel/pipeline.py"},
    "trackio": {"trainer/track.py"},
    "torchao": {"trainer/quantize.py"},
    "transformers": {
        "trainer/chat_template.py",
        "trainer/families.py",
        "trainer/model.py",
        "trainer/model_config.py",
        "trainer/tokenizer.py",
        "trainer/export.py",
        "trainer/export_adapter.py",
        "trainer/generate.py",
        "trainer/low_rank_format.py",
        "trainer/model_folder.py",
        "trainer/quantize.py",
        "recipes/compare_answers.py",
        "recipes/prepare_smollm2.py",
    },
    "typer": {
        "launch/cli.py",
        "launch/drill_options.py",
        "launch/export_options.py",
        "launch/recipe_options.py",
        "launch/slurm_options.py",
        "launch/submit_options.py",
    },
    "wandb": {"trainer/track.py"},
    "yaml": {"trainer/recipe_yaml.py"},
    # Nothing unpickles, and nothing outside decides what is imported.
    "cloudpickle": set(),
    "dill": set(),
    "importlib.import_module": set(),
    "importlib.util.spec_from_file_location": set(),
    "joblib": set(),
    "marshal": set(),
    "numpy.load": set(),
    "os.system": set(),
    "pickle": set(),
    "runpy": set(),
    "shelve": set(),
    "torch.distributed.device_mesh.init_device_mesh": set(),  # its groups know no time-out
    "torch.distributed.tensor.parallel": set(),
    "torch.load": set(),
    "torch.save": set(),
}
"""The only files that may name a library or a call; everything else goes through them."""

HEAVY = {
    "torch",
    "torchao",
    "transformers",
    "peft",
    "ray",
    "deepspeed",
    "datasets",
    "lm_eval",
    "wandb",
    "trackio",
    "matplotlib",
}


def sources(*folders: str) -> list[Path]:
    """The project's Python files, also those not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    wanted = (ROOT / name for name in sorted(set(names)) if not folders or name.split("/")[0] in folders)
    return [path for path in wanted if path.exists()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor() -> list[str]:
    """The files that must answer without torch: those that TID253 is not switched off for."""
    (pattern,) = (glob for glob, codes in RUFF["per-file-ignores"].items() if codes == ["TID253"])
    assert pattern[:2] == "!{"
    assert pattern[-1] == "}"
    return sorted(pattern[2:-1].split(","))


def names_used(path: Path) -> Iterator[tuple[str, int]]:
    """Every dotted name that the file imports or reaches through an import, with its line."""
    return names_in(ast.parse(path.read_text()), f"cuboid.{path.parent.name}")


def names_in(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 3 - node.level] if node.level else []  # one dot is the package itself
            module = ".".join([*above, node.module] if node.module else above)
            for name in node.names:
                aliases[name.asname or name.name] = f"{module}.{name.name}"
                yield f"{module}.{name.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (dotted := unparse_dotted(node)):
            head, _, rest = dotted.partition(".")
            if head in aliases:
                yield f"{aliases[head]}.{rest}", node.lineno


def unparse_dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain that begins with a name; otherwise nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := unparse_dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def is_within(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def test_no_spelling_of_an_import_is_overlooked() -> None:
    lines = ("import a.b as c", "from .. import launch", "from . import data", "from ..trainer.loop import train")
    names = {name for name, _ in names_in(ast.parse("\n".join([*lines, "c.d.e", "launch.f"])), "cuboid.parallel")}
    assert names >= {"a.b", "cuboid.launch", "cuboid.parallel.data", "cuboid.trainer.loop.train", "a.b.d.e"}
    assert "cuboid.launch.f" in names


def test_a_package_imports_only_those_to_its_left() -> None:
    assert all((ROOT / f"{axis.replace('.', '/')}.py").exists() for axis in AXES)
    wrong = []
    for path in sources(*MAY_IMPORT):
        package, module = path.parent.name, f"{path.parent.name}.{path.stem}"
        for name, line in names_used(path):
            parts = name.split(".")
            if parts[0] in MAY_IMPORT:
                wrong.append(f"{relative(path)}:{line} imports {name}, which is installed as cuboid.{name}")
            if parts[0] != "cuboid" or len(parts) < 2:
                continue
            if parts[1] not in MAY_IMPORT[package] | {package}:
                wrong.append(f"{relative(path)}:{line} imports {name}")
            if module in AXES and ".".join(parts[1:3]) in AXES - {module}:
                wrong.append(f"{relative(path)}:{line} imports another axis, {name}")
    assert not wrong, "\n".join(wrong)


def test_every_library_has_its_door() -> None:
    used: dict[str, set[str]] = {library: set() for library in DOORS}
    wrong = []
    for path in sources(*MAY_IMPORT):
        for name, line in names_used(path):
            for library in (library for library in DOORS if is_within(name, library)):
                used[library].add(relative(path))
                if relative(path) not in DOORS[library]:
                    doors = ", ".join(sorted(DOORS[library])) or "nobody"
                    wrong.append(f"{relative(path)}:{line} uses {name}; {library} belongs to {doors}")
    wrong += [
        f"{library}: {files - used[library]} does not use it"
        for library, files in DOORS.items()
        if files - used[library]
    ]
    assert not wrong, "\n".join(wrong)


RUNS_DATA = {"eval", "exec", "compile", "__import__"}
"""Builtins that make code of what they are given."""
TRUSTS = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "shell": True}
"""Arguments with which a call runs what it reads."""


def runs_data(source: str) -> Iterator[str]:
    """Calls that would run data as code, or that leave it to a library whether a model may bring its own."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, where = unparse_dotted(node.func), f"line {node.lineno}"
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in RUNS_DATA:
            yield f"{where} calls {name}"
        yield from (f"{where} gives {key}={value}" for key, value in TRUSTS.items() if given.get(key) is value)
        owner, _, method = name.rpartition(".")
        asks = owner.split(".")[-1].startswith("Auto") and method in ("from_pretrained", "from_config")
        if asks and given.get("trust_remote_code") is not False:
            yield f"{where} calls {name} without trust_remote_code=False"


def test_nothing_runs_what_it_reads() -> None:
    calls = (
        "eval(x)",
        "f(shell=True)",
        "a.AutoConfig.from_pretrained(x)",
        "AutoModel.from_config(x, trust_remote_code=y)",
    )
    assert len(list(runs_data("\n".join(calls)))) == len(calls)
    wrong = [f"{relative(path)}, {words}" for path in sources(*MAY_IMPORT) for words in runs_data(path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_ruff_guards_the_same_doors() -> None:
    assert set(RUFF["flake8-tidy-imports"]["banned-api"]) == set(DOORS)
    (doors,) = (glob for glob, codes in RUFF["per-file-ignores"].items() if codes == ["TID251"] and glob[0] == "{")
    assert set(doors.strip("{}").split(",")) == set().union(*DOORS.values())


def test_a_commit_is_held_to_what_make_lint_runs() -> None:
    """By the tools of the same environment: no hook brings a version of its own beside constraints.txt."""
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    hooks = {hook["entry"] for hook in local["hooks"]}
    tools = {entry.removeprefix(".venv/bin/").removesuffix(" --fix") for entry in hooks}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    run = {line.partition("$(BIN)/")[2].removesuffix(" --check") for line in lint[1].splitlines()}
    assert tools == run | {"make types"}


def test_the_floor_imports_no_torch() -> None:
    """In one fresh interpreter, so that also what a file imports through another is seen."""
    modules = [f"cuboid.{name.removesuffix('.py').replace('/', '.')}" for name in floor()]
    script = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = set({sorted(HEAVY)}) & sys.modules.keys()\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_folder_refuses_its_bare_name(package: str) -> None:
    spec = importlib.util.spec_from_file_location(package, ROOT / package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"cuboid.{package}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def too_large(path: Path) -> Iterator[str]:
    """What in the file is over a budget: file 400 lines, class 250, function 70, 8 parameters; and `global`."""
    text = path.read_text()
    if (lines := text.count("\n")) > 400:
        yield f"{relative(path)}: {lines} lines, over 400"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Global):
            yield f"{relative(path)}:{node.lineno} global {', '.join(node.names)}"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        where, length = f"{relative(path)}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1
        budget = 250 if isinstance(node, ast.ClassDef) else 70
        if length > budget:
            yield f"{where}: {length} lines, over {budget}"
        if not isinstance(node, ast.ClassDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([argument for argument in named if argument.arg not in ("self", "cls")])
            if count > 8:
                yield f"{where}: {count} parameters, over 8"


def test_nothing_outgrows_its_budget() -> None:
    wrong = [line for path in sources() for line in too_large(path)]
    assert not wrong, "\n".join(wrong)
