"""The command line. Each command imports what it needs when it runs, so that help answers in a blink.

Exit codes: 0 done; 1 a failed run; 2 the user's mistake; 130 stopped by Ctrl-C; 85 stopped by a signal, to be requeued.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cuboid.launch.drill_options import DrillOptions
from cuboid.launch.export_options import ExportOptions, takes
from cuboid.launch.recipe_options import Overrides, RecipeName
from cuboid.launch.slurm_options import SlurmOptions
from cuboid.launch.submit_options import ADDRESS, INSECURE, SubmitOptions

_EXTRAS = {
    "aiohttp": "ray",
    "datasets": "data",
    "lm_eval": "eval",
    "matplotlib": "track",
    "peft": "lora",
    "ray": "ray",
    "requests": "ray",
    "torch": "train",
    "torchao": "quantize",
    "transformers": "train",
}
"""What `pip install 'cuboid[...]'` brings a package that is missing."""

app = typer.Typer(
    name="cuboid",
    help="Train Hugging Face language models over a block of devices: data x tensor x pipeline.",
    epilog="A recipe is one YAML file; `cuboid train quickstart` runs the one that is shipped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoint_app = typer.Typer(help="Look into the checkpoints of a run.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


class Launcher(StrEnum):
    """What starts the ranks."""

    ray = "ray"
    local = "local"
    slurm = "slurm"


class Shrink(StrEnum):
    """How small `verify` makes the model."""

    auto = "auto"
    none = "none"


def main() -> None:
    """The console script `cuboid`."""
    app()


@contextmanager
def told() -> Iterator[None]:
    """A user's mistake ends the command in words and with 2, a failed run with 1, Ctrl-C with 130."""
    from cuboid.parallel.errors import RunFailed, UserError

    try:
        yield
    except UserError as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except RunFailed as error:
        _complain(str(error))
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        _complain(f"this needs the package {package}: pip install 'cuboid[{_EXTRAS[package]}]'")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _complain(text: str) -> None:
    from cuboid.trainer.runlog import redact

    for line in redact(text).splitlines():
        typer.secho("cuboid: ", fg="red", bold=True, err=True, nl=False)
        # what a hostile file has put into its names must not steer the terminal
        typer.echo("".join(sign if sign.isprintable() else "?" for sign in line), err=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        from cuboid.trainer.version import version

        typer.echo(f"cuboid {version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version and git revision.")
    ] = False,
) -> None:
    """Train Hugging Face language models over a block of devices: data x tensor x pipeline."""
    with told():
        from cuboid.launch.private import keep_files_private

        keep_files_private()


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    launcher: Annotated[
        Launcher | None, typer.Option(help="ray, local processes without Ray, or slurm, within a Slurm job.")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            help="Go on from the newest checkpoint and refuse to begin anew, or move the old folder aside and begin. "
            "Default: go on where there is a checkpoint.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a recipe with its launcher; go on where an earlier run of the same name stopped."""
    with told():
        from cuboid.launch import training

        chosen = [f"launch.launcher={launcher.value}"] if launcher else []
        code = training.train(recipe, [*(overrides or ()), *chosen], resume=resume)
    raise typer.Exit(code)


@app.command()
def verify(
    recipe: RecipeName,
    overrides: Overrides = None,
    shrink: Annotated[
        Shrink, typer.Option(help="auto: few narrow layers and short sequences; none: the recipe's own model.")
    ] = Shrink.auto,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False,
) -> None:
    """Prove that the recipe's mesh computes the numbers of one process; exit code 1 where it does not."""
    with told():
        from cuboid.launch import verify as verification

        code = verification.verify(recipe, overrides or (), shrink=shrink is Shrink.auto, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What a rank may have on another machine, as 80GiB; default: its share of this one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the tables.")] = False,
) -> None:
    """Show what a recipe will do before it runs: stages, bubble, tokens, and the memory of each rank."""
    with told():
        from cuboid.launch import plan as planning

        code = planning.plan(recipe, overrides or (), memory=memory, as_json=as_json)
    raise typer.Exit(code)


@app.command()
@takes(DrillOptions)
def drill(options: DrillOptions) -> None:
    """Run a recipe undisturbed and with faults, and report what was lost; exit code 1 where it was too much."""
    with told():
        from cuboid.launch.drill import drill

        code = drill(options)
    raise typer.Exit(code)


@app.command()
def teach(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Write a teacher's likeliest tokens into distill.cache, so that training needs not run it."""
    with told():
        from cuboid.launch import teach as teaching

        code = teaching.teach(recipe, overrides or ())
    raise typer.Exit(code)


@app.command()
def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="Sequences to print, the first ones of the run.")] = 3,
) -> None:
    """Show what a recipe reads: decoded sequences, what of them is predicted, and how much there is."""
    with told():
        from cuboid.launch import data as samples

        samples.show(recipe, overrides or (), number=show)


@app.command()
@takes(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write a finished model for transformers, as it is or made smaller, and prove that it gives equal logits there."""
    with told():
        from cuboid.launch.exports import export

        export(options)


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported folder, a run, or a checkpoint.")],
    data: Annotated[
        str | None, typer.Option(help="Held-out text, given like data.path; default: the run's data.eval_path.")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option(help="A task of your own: a YAML file in lm_eval's keys; again for another.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many sequences of --data; default: 32.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in each; default: 512.")] = None,
) -> None:
    """Measure a finished model on held-out text and on tasks of your own."""
    with told():
        from cuboid.launch.evaluate import evaluate

        evaluate(source, data=data, tasks=tasks or (), samples=samples, length=length)


@app.command()
def generate(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A model's or adapter's folder, a run, a checkpoint.")
    ],
    prompt: Annotated[str, typer.Option(help="A message where the tokenizer has a chat template, else text.")],
    raw: Annotated[bool, typer.Option("--raw", help="Text that goes on, also where there is a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn, with a temperature.")] = 0,
) -> None:
    """Let a finished model answer a prompt: a smoke check."""
    with told():
        from cuboid.trainer.generate import Decoding, generate

        decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        generate(source, prompt, decoding, raw=raw)


@checkpoint_app.command("list")
def list_checkpoints(path: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """List the checkpoints of a run, newest first."""
    with told():
        from cuboid.launch.reports import print_listing

        print_listing(path)


@checkpoint_app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its newest.")]) -> None:
    """Show what is in a checkpoint."""
    with told():
        from cuboid.launch.reports import print_inspection

        print_inspection(path)


@checkpoint_app.command("verify")
def verify_checkpoint(path: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its newest.")]) -> None:
    """Check every byte of a checkpoint against its manifest; exit code 1 where one is wrong."""
    with told():
        from cuboid.launch.reports import print_verification

        sound = print_verification(path)
    raise typer.Exit(0 if sound else 1)


@app.command()
@takes(SlurmOptions)
def slurm(options: SlurmOptions) -> None:
    """Write a Slurm job for a recipe: it saves before its time is up, goes back into the queue, and goes on."""
    with told():
        from cuboid.launch.slurm import slurm

        slurm(options)


@app.command()
@takes(SubmitOptions)
def submit(options: SubmitOptions) -> None:
    """Send a recipe to a Ray cluster, code and small files with it, and follow its run; exit code: the run's."""
    with told():
        from cuboid.launch import submit as submission

        code = submission.submit(options)
    raise typer.Exit(code)


JobId = Annotated[str, typer.Argument(metavar="ID", help="A job, as `cuboid jobs` lists it.")]


@app.command()
def jobs(address: Annotated[str, ADDRESS], insecure: Annotated[bool, INSECURE] = False) -> None:
    """List the jobs that `cuboid submit` has sent to a cluster, newest first."""
    with told():
        from cuboid.launch import submit as submission

        submission.print_jobs(submission.connect(address, insecure=insecure))


@app.command()
def logs(
    job: JobId,
    address: Annotated[str, ADDRESS],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends; exit code: the job's.")] = False,
    insecure: Annotated[bool, INSECURE] = False,
) -> None:
    """Show what a job has printed."""
    code = 0
    with told():
        from cuboid.launch import submit as submission

        connected = submission.connect(address, insecure=insecure)
        if follow:
            code = submission.follow(connected, job)
        else:
            submission.print_logs(connected, job)
    raise typer.Exit(code)


@app.command()
def stop(job: JobId, address: Annotated[str, ADDRESS], insecure: Annotated[bool, INSECURE] = False) -> None:
    """Stop a job after a checkpoint; the same submission again goes on from there."""
    with told():
        from cuboid.launch import submit as submission

        submission.stop(submission.connect(address, insecure=insecure), job)


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    with told():
        import json

        from cuboid.trainer.recipe import Recipe

        typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


if __name__ == "__main__":
    main()
