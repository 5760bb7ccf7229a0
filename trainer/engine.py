"""What every engine shares of one exact optimizer step over the block of ranks, and the native engine.

An engine differs from another in how gradients meet over the data axis and how parameters are updated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cuboid.parallel.expert import Experts, Measures
from cuboid.parallel.gradients import TiedWeights, clip, close_sums, local, squared_norm
from cuboid.parallel.layer_terms import LayerTerms
from cuboid.parallel.loss import IGNORE, SummedCrossEntropy
from cuboid.parallel.mesh import Block
from cuboid.parallel.pipeline import Pipeline
from cuboid.parallel.quantization import FakeQuantization
from cuboid.parallel.stages import Stage
from cuboid.parallel.structures import influence
from cuboid.trainer.data import Batch
from cuboid.trainer.optimizer import ShardedAdamW
from cuboid.trainer.preference import Preference, Preferences
from cuboid.trainer.prune import Pruner, StructurePruner
from cuboid.trainer.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself, the same on every rank."""

    loss: float
    """Mean over the valid tokens of the global batch, or its pairs, before the update."""
    grad_norm: float
    """Global norm of the gradient of that mean, before clipping."""
    tokens: int
    """Valid (predicted) tokens of the global batch."""
    told: tuple[float, ...] = ()
    """What the ranks told each other with the step, each number summed over all ranks."""
    measures: Measures | None = None
    """Of a model with experts."""
    preferences: Preferences | None = None
    """Of preference tuning."""


class Untrusted(RuntimeError):
    """Nothing should be learned from a step; the parameters were not touched. The same on every rank.

    ``data_ranks`` are those whose samples are to blame; None: it may be any.
    """

    kind: str

    def __init__(self, what: str, result: StepResult, data_ranks: Sequence[int] | None = None) -> None:
        self.result, self.data_ranks = result, data_ranks
        super().__init__(what)


class NotFinite(Untrusted):
    """The loss or the gradient norm of a step is NaN or infinite."""

    kind = "not_finite"


class Evaluation(NamedTuple):
    """What a model makes of batches that it is not trained on, the same on every rank."""

    loss: float
    """Mean over their valid tokens, or their pairs."""
    tokens: int
    preferences: Preferences | None = None


@dataclass(kw_only=True)
class Engine(ABC):
    """Pipeline, gradients and update of this rank; ``parameters`` have global names."""

    block: Block
    pipeline: Pipeline
    loss: SummedCrossEntropy
    parameters: Sequence[tuple[str, nn.Parameter]]
    tied: TiedWeights
    experts: Experts | None = None
    """Of a model that has any."""
    teacher: Teacher | None = None
    """Whose predictions the loss of a step takes."""
    layer_terms: LayerTerms | None = None
    """Where layers are compared with the teacher's too."""
    preference: Preference | None = None
    """Where the loss is one of pairs of answers."""
    quantization: FakeQuantization | None = None
    """Where linears compute with rounded weights."""
    averaged_over: int = 1
    """Ranks over which gradients are averaged and not summed: each rank's loss is that many times larger."""
    saves_frozen: bool = True
    """False where frozen parameters have their values from elsewhere: an adapter's base."""
    _own_loss: float = 0.0
    """This rank's share of the newest loss; without layers to compare 0 away from the last stage."""

    @property
    def saved(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that a checkpoint holds."""
        return [named for named in self.parameters if self.saves_frozen or named[1].requires_grad]

    @abstractmethod
    def close_gradients(self) -> None:
        """After the schedule: make the gradients of this data rank's samples those of the global batch."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """This rank's share of the squared global gradient norm, float64: the sum over all ranks is the whole."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Between `backward` and `update`, of every parameter by global name, None where none came; plain or DTensor,
        one after another, since one may have to be gathered. All ranks ask together."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of this rank by global name, like `gradients`."""

    @abstractmethod
    def update(self, result: StepResult, *, learning_rate: float) -> None:
        """Clip by the global norm and step the optimizer."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds as tensors, by global name, plain or DTensor: names and placements are the
        same at each call, and all ranks ask together. To load, fill them and hand them to `resume_at`."""

    @abstractmethod
    def resume_at(self, step: int, tensors: Mapping[str, Tensor], *, skipped: int = 0) -> None:
        """Go on after ``step`` steps, of which so many were ``skipped`` and updated nothing, with the values that were
        loaded into what `tensors` gave."""

    def begin_step(self, step: int) -> None:
        """Before the step of this number: what it computes with is rounded, where the recipe says so from it on."""
        if self.quantization:
            self.quantization.begin(step)

    def prune(self, step: int, batch: Batch) -> float | None:
        """Before the step of this number: zero what is to be zero from now on, where the recipe says so; ``batch`` is
        this data rank's share of it, by which layers are judged. Returns the share of zeros among what is pruned, and
        None where nothing was done."""
        return None

    def step(
        self,
        batch: Batch,
        *,
        learning_rate: float,
        told: Sequence[float] = (),
        judge: Callable[[StepResult], None] | None = None,
    ) -> StepResult:
        """One update from this data rank's share of the global batch.

        Args:
            batch: at most as many samples as the plan gives a data rank, of any length that the tensor ranks divide
                (the same on every rank of a pipeline). With fewer, or none, the step is that of those alone.
            told: numbers of this rank that travel with the loss, as many on every rank; the result has their sums.
            judge: is shown the result before the update, and raises Untrusted where there should be none; without one,
                `refuse_not_finite` is asked.

        Raises:
            Untrusted: before the update, on every rank at once. To go on, call `drop_gradients`.
        """
        result = self.backward(batch, told=told)
        (judge or self.refuse_not_finite)(result)
        self.block.whereabouts.at("update")
        self.update(result, learning_rate=learning_rate)
        return result

    def backward(self, batch: Batch, *, told: Sequence[float] = ()) -> StepResult:
        """Loss, complete gradients and their global norm; nothing is updated."""
        self.block.whereabouts.at("count of tokens")
        tokens = self._count_tokens(batch.labels)
        # a batch without a single valid token has loss 0 and gradient 0
        self.loss.num_valid_tokens = max(tokens, 1) / self.averaged_over
        if self.preference:
            self.preference.loss.num_pairs = max(self._count_pairs(self.preference, batch), 1) / self.averaged_over
        if self.layer_terms:
            self.layer_terms.num_valid_tokens = self.loss.num_valid_tokens
        own_loss = self._through(self.pipeline.step, batch, tokens=tokens)
        self._own_loss = (own_loss + (self.layer_terms.take() if self.layer_terms else 0.0)) / self.averaged_over
        self.block.whereabouts.at("gradient sum")
        self.close_gradients()
        self.block.whereabouts.at("gradient norm")
        return self._sum_over_block(tokens, told)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Of this data rank's ``batches``, as many on every rank, and all others' together. Nothing is updated. To be
        called between two steps: the next forward takes over what is gathered."""
        self.block.whereabouts.begin("evaluation")
        total, tokens = 0.0, 0
        self.loss.num_valid_tokens = 1  # sums, divided once below
        if self.preference:
            self.preference.loss.num_pairs = 1
        for batch in batches:
            total += self._through(self.pipeline.evaluate, batch)
            tokens += int((batch.labels != IGNORE).sum()) if self.pipeline.is_last else 0
        sums = torch.cat([torch.tensor([total, tokens], dtype=torch.float64), self._of_pairs()])
        # every tensor rank computed the same
        sums = sums.to(self.block.device) / self.block.layout.tensor
        dist.all_reduce(sums)
        preferences = Preferences.of(sums[2:]) if self.preference else None
        count = preferences.pairs if preferences else sums[1].item()
        return Evaluation(sums[0].item() / max(count, 1.0), round(sums[1].item()), preferences)

    def _through(self, run: Callable[..., Tensor | None], batch: Batch, *, tokens: int | None = None) -> float:
        """This rank's share of the loss, 0 away from the last stage; ``run`` is the pipeline's step or evaluation.
        ``tokens``, the valid ones of the global batch, comes with a step: layers with experts weigh sequences by it."""
        ends, full = self.pipeline, batch.filled_up(self.pipeline.rows).to(self.block.device)
        told, targets = {"position_ids": full.position_ids}, {"labels": full.labels}
        if self.experts and tokens is not None:
            told["sequence_share"] = (full.labels != IGNORE).sum(1).float() / max(tokens, 1)
        if self.teacher and tokens is not None:
            targets |= self.teacher.targets(full)
        if self.layer_terms and tokens is not None:
            told |= {"rows": torch.arange(len(full.labels)), "predicted": full.labels != IGNORE}
        if self.preference:
            targets |= self.preference.targets(full)
        loss = run(full.input_ids if ends.is_first else None, targets if ends.is_last else None, **told)
        return 0.0 if loss is None else float(loss)

    def _count_tokens(self, labels: Tensor) -> int:
        count = (labels != IGNORE).sum().to(self.block.device)
        dist.all_reduce(count, group=self.block.data_group)
        return int(count)

    def _count_pairs(self, preference: Preference, batch: Batch) -> int:
        count = preference.loss.count(batch.labels, batch.position_ids).to(self.block.device)
        dist.all_reduce(count, group=self.block.data_group)
        return int(count)

    def _of_pairs(self) -> Tensor:
        """This rank's sums over pairs since the last call, on the CPU; none without preferences."""
        return self.preference.loss.take() if self.preference else torch.zeros(0, dtype=torch.float64)

    def _sum_over_block(self, tokens: int, told: Sequence[float]) -> StepResult:
        """One small exchange makes loss, squared norm and what is told the same numbers on every rank."""
        # every tensor rank computed the same loss
        shares = torch.tensor([self._own_loss / self.block.layout.tensor, 0.0, *told], dtype=torch.float64)
        own_rows = self.experts.take() if self.experts else shares.new_zeros(0)
        own_pairs = self._of_pairs() / self.block.layout.tensor
        shares = torch.cat([shares, own_rows, own_pairs]).to(self.block.device)
        shares[1] = self.squared_norm()
        dist.all_reduce(shares)
        shares, rows, pairs = shares.cpu().split([2 + len(told), len(own_rows), len(own_pairs)])
        loss, squared, *sums = shares.tolist()
        measures = self.experts.measures(rows) if self.experts else None
        preferences = Preferences.of(pairs) if self.preference else None
        return StepResult(loss, math.sqrt(squared), tokens, tuple(sums), measures, preferences)

    def drop_gradients(self) -> None:
        """In place of `update`. The deepspeed engine keeps sums of its own, so that a recipe with it stops instead."""
        for _, parameter in self.parameters:
            parameter.grad = None

    def refuse_not_finite(self, result: StepResult) -> None:
        """Raises NotFinite, which tells the rank that it came from, where the step's numbers are no numbers."""
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return
        bad = [name for name, grad in self.gradients() if grad is not None and not local(grad).isfinite().all()]
        found: list[tuple[float, str]] = [(0.0, "")] * dist.get_world_size()
        dist.all_gather_object(found, (self._own_loss, bad[0] if bad else ""))
        layout = self.block.layout
        losses = [rank for rank, (loss, _) in enumerate(found) if not math.isfinite(loss)]
        if losses:
            data_ranks = sorted({layout.coordinate(rank).data for rank in losses})
            raise NotFinite(f"the loss is {result.loss}, first on rank {losses[0]}", result, data_ranks)
        gradients = [f"rank {rank} in {name}" for rank, (_, name) in enumerate(found) if name]
        where = f", first on {gradients[0]}" if gradients else ""
        raise NotFinite(f"the gradient norm is {result.grad_norm}{where}", result)


@dataclass(kw_only=True)
class NativeEngine(Engine):
    """FSDP2 reduces the gradients, and AdamW updates the shards."""

    optimizer: ShardedAdamW
    clip_grad_norm: float | None
    pruner: Pruner | StructurePruner | None = None

    def prune(self, step: int, batch: Batch) -> float | None:
        stages = cast("list[Stage]", list(self.pipeline.modules.values()))
        judge = partial(influence, stages, partial(self.evaluate, [batch]), self.block)
        return self.pruner.prune(step, judge) if self.pruner else None

    def close_gradients(self) -> None:
        close_sums(parameter for _, parameter in self.parameters)
        self.tied.sum_gradients()
        if self.pruner:
            self.pruner.pruning.mask_gradients()

    def squared_norm(self) -> Tensor:
        counted = [parameter for _, parameter in self.parameters if parameter is not self.tied.second]
        return squared_norm(counted, self.block.layout.data * self.block.layout.tensor)

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        return ((name, parameter.grad) for name, parameter in self.parameters)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.parameters)

    def update(self, result: StepResult, *, learning_rate: float) -> None:
        if self.clip_grad_norm is not None:
            clip((p for _, p in self.parameters), norm=result.grad_norm, limit=self.clip_grad_norm)
        with self.pruner.pruning.kept() if self.pruner else nullcontext():
            self.optimizer.step(learning_rate)
        self.tied.follow()
        if self.experts and result.measures:
            self.experts.rebalance(result.measures)

    def tensors(self) -> dict[str, Tensor]:
        """The engine's own memory: what is loaded into it is in place."""
        state: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in self.saved}
        assert len(state) == len(self.saved), "two parameters of one rank share a name: only one would be loaded"
        beside = self.experts.tensors() if self.experts else {}
        return state | beside | {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}

    def resume_at(self, step: int, tensors: Mapping[str, Tensor], *, skipped: int = 0) -> None:
        self.optimizer.set_step(step - skipped)
        self.tied.follow()
        if self.pruner:
            self.pruner.resume_at(step)
