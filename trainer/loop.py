"""The one loop: set up or resume, step, record, save, stop. Every rank of every launcher runs `train`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from cuboid.parallel.errors import RunFailed, UserError, UserErrors
from cuboid.parallel.mesh import Block, connect
from cuboid.parallel.whereabouts import Whereabouts, path_of
from cuboid.trainer import memory
from cuboid.trainer.assemble import assemble, layers_of_stages, prepared
from cuboid.trainer.chat_template import given_source
from cuboid.trainer.checkpoint import Checkpointer, load, newest
from cuboid.trainer.copies import open_copier
from cuboid.trainer.data import Batch, Dataset, Mixture, held_out_settings, prepare
from cuboid.trainer.engine import Engine, Evaluation, StepResult, Untrusted
from cuboid.trainer.faults import ReplicasDiffer, Watch
from cuboid.trainer.identity import adapter_facts, same_on_every_rank, teacher_fingerprint, versions
from cuboid.trainer.manifest import steps
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import config_of
from cuboid.trainer.optimizer import learning_rate
from cuboid.trainer.prune import is_due
from cuboid.trainer.publish import set_aside
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recorder import Recorder
from cuboid.trainer.replicas import Replicas
from cuboid.trainer.restore import read_facts
from cuboid.trainer.resume import differences
from cuboid.trainer.run import Run
from cuboid.trainer.runlog import STOP_FILE
from cuboid.trainer.tokenizer import open_tokenizer
from cuboid.trainer.tokens import cache_folder

CHECKPOINTS = "checkpoints"
_PATIENCE_SECONDS = 15.0
_LONGER_SECONDS = 15
"""Added to the time-out of process groups: who watches the ranks speaks before those that wait for a hung one."""


def train(recipe: Recipe, folder: Path, *, before_step: Callable[[Run], None] | None = None) -> str | None:
    """Run the recipe to its last step, from the newest checkpoint in ``folder`` where there is one.

    ``before_step`` is called on every rank before each step: faults are injected by it (`cuboid drill`).

    Returns None when done, or what the stop file said that ended the run early (after a checkpoint).

    Raises:
        UserError: what cannot be right and shows only here.
        RunFailed: the run cannot go on.
    """
    device = torch.device("cpu") if recipe.launch.device == "cpu" else None
    patience = recipe.launch.timeout_seconds + _LONGER_SECONDS
    where = Whereabouts(path_of(folder, int(os.environ["RANK"])))
    with (
        closing(where),
        connect(recipe.layout, timeout_seconds=patience, device=device, whereabouts=where) as block,
        set_up(memory.fitted(recipe, folder, block), folder, block) as run,
    ):
        reason = None
        if run.step == 0 and recipe.train.eval_first and run.held_out:
            run.recorder.evaluated_first(evaluate(run, run.held_out))
        while run.step < recipe.train.steps and reason is None:
            if before_step is not None:
                before_step(run)
            reason = _agreed_to_stop(run, train_step(run))
            if _save_is_due(run, last=reason is not None):
                save(run)
        where.begin("save", run.step)
        run.checkpointer.wait()
        if failure := run.checkpointer.failure:
            left = next((f"the newest checkpoint is {path}" for path in steps(run.checkpointer.folder).values()), "")
            raise RunFailed(f"step {run.saved} could not be saved ({failure}); {left or 'there is no checkpoint'}")
        run.recorder.stopped(run.step, reason)
        return reason


def train_step(run: Run) -> StepResult:
    """One update: this rank's samples, the engine's exact step, the record of it."""
    recipe, step = run.recipe, run.step + 1
    run.block.whereabouts.begin("batch", step)
    rate = learning_rate(step, steps=recipe.train.steps, settings=recipe.optimizer)
    # every draw (dropout) is a function of seed, step and place, so that no generator state has to be saved
    place = run.block.coordinate
    if not recipe.parallel.sequence:
        place = place._replace(tensor=0)  # tensor ranks compute the same hidden states, and must drop the same of them
    torch.manual_seed(_seed(recipe.seed, step, *place))
    batch = run.dataset.batch(recipe.batch_plan.samples(step, run.block.coordinate.data))
    prune(run, step, batch)
    if recipe.quantize is not None and step == recipe.quantize.start_step:
        compare_rounding(run)
    run.block.whereabouts.begin("step", step)
    run.engine.begin_step(step)
    share = run.watch.share(step, saved=run.saved)
    told = [_wants_to_stop(run), share, *run.recorder.by_rank(run.engine.pipeline)]
    skipped = None
    try:
        with memory.told(recipe, run.folder, run.block, step=step):
            result = run.engine.step(batch, learning_rate=rate, told=told, judge=partial(run.watch.judge, step))
    except Untrusted as error:
        result, skipped = error.result, error.kind
        if answer(run, step, error) == "rewind":
            return result
    run.step = step
    run.evaluated = run.recorder.step(
        step,
        result,
        learning_rate=rate,
        by_rank=result.told[2:],
        skipped=skipped,
        pipeline=run.engine.pipeline,
        evaluation=partial(evaluate, run, run.held_out) if run.held_out and _evaluation_is_due(run) else None,
    )
    if step == recipe.train.steps:
        compare_rounding(run)
    return result


def answer(run: Run, step: int, error: Untrusted) -> Literal["skip", "rewind"]:
    """What the recipe's `faults` says to a step that is not to be trusted. To rewind is to skip where nothing is saved
    yet: the parameters are as they were.

    Raises:
        RunFailed: it says stop, or there were too many.
    """
    answered, is_of_memory = run.watch.answer(step, error), isinstance(error, ReplicasDiffer)
    samples = None if is_of_memory else _samples(run, step, error.data_ranks)
    words = f"step {step}: {error}" + (f" ({samples})" if samples else "")
    if answered == "stop":
        earlier = ", ".join(f"{step} ({_samples(run, step)})" for step in run.watch.earlier)
        limit = f"; faults.max_faults={run.recipe.faults.max_faults}, and steps before it were so: {earlier}"
        raise RunFailed(f"{words}; nothing was updated" + (limit if earlier else ""))
    run.engine.drop_gradients()
    if answered == "rewind" and not rewind(run, suspect=is_of_memory and run.saved == run.step):
        if is_of_memory:
            raise RunFailed(f"{words}; there is no checkpoint to go back to")
        answered = "skip"
    if run.block.rank == 0:
        done = f"back to step {run.step}" if answered == "rewind" else "nothing was updated"
        about = {"fault": error.kind, "cause": str(error), "samples": samples, "words": f"{words}; {done}"}
        run.recorder.event(answered, step=step, to=run.step, **about)
    return answered


def prune(run: Run, step: int, batch: Batch) -> None:
    """Before the step of this number, where the recipe says so; what it costs is evaluated the first and last time."""
    settings = run.recipe.prune
    if settings is None or not is_due(settings, step):
        return
    compared = run.held_out if step in (settings.begin_step, settings.last_step) else None
    losses = {"eval_loss_before": evaluate(run, compared).loss} if compared else {}
    share = run.engine.prune(step, batch)
    losses |= {"eval_loss_after": evaluate(run, compared).loss} if compared else {}
    if run.block.rank == 0:
        run.recorder.event("prune", step=step, method=settings.method, zeros=share, **losses)


def compare_rounding(run: Run) -> None:
    """Where weights are rounded in training: tell the held-out loss in full precision and rounded, before the
    first step that is computed so (what rounding after training would cost) and after the last."""
    settings, quantization = run.recipe.quantize, run.engine.quantization
    if settings is None or quantization is None or run.held_out is None:
        return
    losses = {}
    for name, is_on in (("eval_loss_full", False), ("eval_loss_rounded", True)):
        quantization.is_on = is_on
        losses[name] = evaluate(run, run.held_out).loss
    learned = run.step >= settings.start_step
    run.recorder.rounded(run.step, scheme=settings.scheme, learned=learned, **losses)


def evaluate(run: Run, held_out: Dataset | Mixture) -> Evaluation:
    """Of the first held-out samples, each once, on every rank."""
    plan = run.recipe.batch_plan
    count = min(run.recipe.train.eval_batches * plan.global_batch, held_out.num_samples)

    def batches() -> Iterator[Batch]:
        for number in range(1, -(-count // plan.global_batch) + 1):
            samples = plan.samples(number, run.block.coordinate.data)
            yield held_out.batch(samples[: max(0, count - samples.start)])  # the last batch may be incomplete

    return run.engine.evaluate(batches())


@contextmanager
def set_up(recipe: Recipe, folder: Path, block: Block) -> Iterator[Run]:
    """Build everything that a run needs, resumed from the newest valid checkpoint, and close it at the end."""
    recorder = Recorder(recipe, folder, block)
    recorder.phase("connect")
    config = config_of(recipe)
    blueprint = draw_blueprint(config, attention=recipe.model.attention, compute=recipe.precision.compute)
    tokenizer = open_tokenizer(recipe.data.tokenizer, pretrained=recipe.model.pretrained, vocab_size=config.vocab_size)
    # ranks of a machine share its cache: one of them reads it whole
    read = partial(prepare, tokenizer=tokenizer, seed=recipe.seed, cache=cache_folder(), verify=_is_first_here())
    dataset = read(recipe.data)
    same_on_every_rank("the data's fingerprint", dataset.fingerprint)
    held_out = None
    if recipe.train.eval_every and (settings := held_out_settings(recipe.data)):
        held_out = read(settings)
        same_on_every_rank("the evaluation's fingerprint", held_out.fingerprint)
    if block.rank == 0:
        for part, found in (("training", dataset), ("evaluation", held_out)):
            if found is not None:
                recorder.event("data", part=part, **found.facts)
    recorder.phase("data")
    blueprint, weights = prepared(recipe, blueprint)
    adapter = adapter_facts(recipe, blueprint)
    teacher = teacher_fingerprint(recipe, dataset)
    engine = assemble(recipe, block, blueprint, weights)
    recorder.phase("model")
    checkpointer = Checkpointer(
        folder / CHECKPOINTS,
        keep=recipe.checkpoint.keep,
        asynchronous=recipe.checkpoint.asynchronous,
        copier=open_copier(recipe, event=recorder.event),
        event=recorder.event,
    )
    run = Run(
        recipe=recipe,
        folder=folder,
        block=block,
        model_config=config.to_dict(),
        adapter=adapter,
        teacher=teacher,
        versions=versions(recipe) if block.rank == 0 else {},
        chat_template=given_source(recipe.data.chat_template),
        dataset=dataset,
        held_out=held_out,
        engine=engine,
        watch=Watch(recipe.faults, engine, _replicas(recipe, engine)),
        recorder=recorder,
        checkpointer=checkpointer,
    )
    try:
        if recipe.checkpoint.every:
            checkpointer.prepare(engine.tensors())
        resume(run)
        layers = [len(stage) for stage in layers_of_stages(recipe, blueprint)]
        attention = blueprint.model.config._attn_implementation
        if adapter is not None and block.rank == 0:
            recorder.event("adapter", **adapter)
        recorder.started(run.step, versions=run.versions, attention=attention, layers_of_stages=layers)
        yield run
        checkpointer.close()
    except BaseException:
        # a save may be finished by ranks that live; one that no longer answers must not silence this rank's failure
        checkpointer.close(patience_seconds=_PATIENCE_SECONDS)
        raise
    finally:
        recorder.close()


def resume(run: Run) -> None:
    """Continue from the newest valid checkpoint: tensors, step, data position and the tracker's run.

    Raises:
        UserError: the checkpoint is another run's (a field of the recipe, or the data, differs).
    """
    path = newest(run.checkpointer.folder, event=run.recorder.event)
    if path is None:
        run.recorder.open(step=0, run_id=None)
        return
    facts = read_facts(path)  # before the tensors: a changed recipe is told by its field, not by a tensor's shape
    if wrong := differences(facts["recipe"], run.recipe):
        raise UserErrors(wrong)
    taught_by = facts.get("teacher", run.teacher)  # older checkpoints do not say
    if taught_by != run.teacher:
        words = f"the teacher (fingerprint {str(run.teacher)[:12]}) is not {path.name}'s ({str(taught_by)[:12]})"
        raise UserError(f"{words}; bring the old files back, or start anew with --fresh")
    if run.adapter is not None and facts["adapter"]["base"] != run.adapter["base"]:
        words = f"the model in {run.recipe.model.pretrained} is not the one whose adapter {path.name} holds"
        raise UserError(f"{words} (other weights); bring the old files back, or start anew with --fresh")
    stored, found = facts["data"]["fingerprint"], run.dataset.fingerprint
    if stored != found:
        words = f"the data (fingerprint {found[:12]}) is not what {path.name} was trained on ({stored[:12]})"
        raise UserError(f"{words}; bring the old data back, or start anew with --fresh")
    stands_at, begins_at = facts["data"]["next_sample"], facts["step"] * run.recipe.train.global_batch
    if stands_at != begins_at:
        words = f"{path.name} stands at sample {stands_at}, and the step after it begins with sample {begins_at}"
        raise UserError(f"{words}; start anew with --fresh")
    restore(run, path, facts)
    run.recorder.open(step=run.step, run_id=facts["run_id"])


def rewind(run: Run, *, suspect: bool) -> bool:
    """Go back to the newest checkpoint, in this process; False where there is none. Where the newest is ``suspect``,
    it is set aside, and the one before it is taken."""
    run.checkpointer.wait()
    if suspect and run.block.rank == 0 and (path := steps(run.checkpointer.folder).get(run.saved)):
        run.recorder.event(
            "checkpoint_refused", path=str(path), faults=["ranks differed"], moved_to=str(set_aside(path))
        )
    path = newest(run.checkpointer.folder, event=run.recorder.event)
    if path is None:
        return False
    restore(run, path, read_facts(path))
    run.recorder.rewound(run.step)
    return True


def restore(run: Run, path: Path, facts: dict[str, Any]) -> None:
    """What the checkpoint of this very run holds: tensors, step and what was found until then."""
    tensors = run.engine.tensors()
    load(path, tensors)
    run.step = run.saved = facts["step"]
    run.evaluated = None
    if "faults" in facts:  # older checkpoints have none
        run.watch.resume(facts["faults"])
    run.engine.resume_at(run.step, tensors, skipped=run.watch.num_skipped(run.step))
    run.best = run.best_saved()


def save(run: Run) -> None:
    """Begin a checkpoint of the state after ``run.step``."""
    run.block.whereabouts.begin("save", run.step)
    run.saved, best = run.step, run.is_best
    facts = {
        "run_id": run.recorder.run_id,
        "recipe": run.recipe.model_dump(mode="json"),
        "model_config": run.model_config,
        **({"adapter": run.adapter} if run.adapter else {}),
        **({"teacher": run.teacher} if run.teacher else {}),
        "data": {
            "fingerprint": run.dataset.fingerprint,
            "next_sample": run.step * run.recipe.train.global_batch,
            "chat_template": run.chat_template,
        },
        "faults": run.watch.facts(),
        "eval_loss": run.evaluated,
        "versions": run.versions,
        "layout": asdict(run.block.layout),
    }
    run.checkpointer.save(run.step, run.engine.tensors(), facts, best=best)
    if best and run.evaluated is not None:
        run.best = run.evaluated


def _save_is_due(run: Run, *, last: bool) -> bool:
    every = run.recipe.checkpoint.every
    if run.step == run.saved:  # the run went back to it
        return False
    return every > 0 and (last or run.step % every == 0 or run.step == run.recipe.train.steps or run.is_best)


def _evaluation_is_due(run: Run) -> bool:
    return run.step % run.recipe.train.eval_every == 0 or run.step == run.recipe.train.steps


def _replicas(recipe: Recipe, engine: Engine) -> Replicas | None:
    """What several ranks hold, frozen or not; the deepspeed engine keeps its own in buffers that it divides."""
    if not recipe.faults.replicas_every or recipe.parallel.engine == "deepspeed":
        return None
    return Replicas(engine.tensors() | {f"model.{name}": parameter.detach() for name, parameter in engine.parameters})


def _samples(run: Run, step: int, data_ranks: Sequence[int] | None = None) -> str:
    """Which samples the step reads, or these ranks of it, in words."""
    plan = run.recipe.batch_plan
    shares = [plan.samples(step, rank) for rank in data_ranks or ()]
    shares = shares or [range((step - 1) * plan.global_batch, step * plan.global_batch)]
    return "samples " + ", ".join(f"{share.start} to {share.stop - 1}" for share in shares)


def _is_first_here() -> bool:
    """Whether this rank is the first of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _wants_to_stop(run: Run) -> float:
    """1 on rank 0 where the stop file stands; told with the step, so that every rank hears of it at the same edge."""
    return float(run.block.rank == 0 and (run.folder / STOP_FILE).exists())


def _agreed_to_stop(run: Run, result: StepResult) -> str | None:
    """What the stop file says, the same on every rank."""
    if not result.told[0]:
        return None
    words = [(run.folder / STOP_FILE).read_text().strip() if run.block.rank == 0 else ""]
    dist.broadcast_object_list(words, src=0)
    return words[0] or "stop"


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
