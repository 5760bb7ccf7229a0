"""Linear layers as products of two narrow ones, by singular value decomposition.

Of all matrices of rank r the first r singular values and vectors are nearest to a weight in the Frobenius norm (Eckart
and Young 1936, "The approximation of one matrix by another of lower rank"). Those of the weight times the Cholesky
factor of X'X give the nearest outputs for the inputs X of a calibration set (Wang et al. 2024, "SVD-LLM:
Truncation-aware singular value decomposition for large language model compression", section 3.1).

Shapes: O outputs, I inputs, K = min(O, I), r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cuboid.parallel.errors import FieldError, UserError, one_of
from cuboid.trainer.calibration import Calibration, visit_linears
from cuboid.trainer.data import Batch
from cuboid.trainer.low_rank_format import Product, load_low_rank, products, write_low_rank
from cuboid.trainer.model_folder import Config, Model, linears, load_model, on_meta


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Which linear layers become products, and how narrow: exactly one of ``rank`` and ``energy`` is given."""

    rank: int | None = None
    energy: float | None = None
    """The least share of a weight's squared singular values that is kept; each layer has a rank of its own. Calibrated,
    it is the least share of its squared outputs."""
    modules: tuple[str, ...] = ()
    """Last names of the layers, as q_proj; none: every linear layer but the head."""
    calibration: Calibration | None = None
    """For the nearest outputs; None: the nearest weight."""

    def check(self, config: Config) -> None:
        """Raises UserError where nothing would become smaller."""
        if (self.rank is None) == (self.energy is None):
            raise UserError("--to lowrank needs one of --rank and --energy, as --rank 64 or --energy 0.9")
        layers = dict(linears(on_meta(config)))
        named = sorted({_last(name) for name in layers})
        if not named:
            raise UserError(f"{config.model_type} keeps its matrices in other modules than linear layers; use --to hf")
        if unknown := sorted(set(self.modules) - set(named)):
            raise FieldError("--module", unknown[0], "is no linear layer of this model", f"use {one_of(named)}")
        widest = max(_widest(linear) for name, linear in layers.items() if self._takes(name))
        if self.rank is not None and self.rank > widest:
            constraint = "makes no layer smaller: two factors of that rank have no fewer numbers than the weight"
            raise FieldError("--rank", self.rank, constraint, f"use at most {widest}")

    @torch.no_grad()
    def apply(self, folder: Path, calibration: Batch | None) -> Model:
        """The model of ``folder`` with products; a layer that would not become smaller stays."""
        model = load_model(folder)
        made: dict[str, Product] = {}

        def narrow(name: str, linear: nn.Linear, hessian_II: Tensor | None = None) -> None:
            if self._takes(name) and (product := self._product(linear, hessian_II)) is not None:
                made[name] = product
                linear.weight.copy_(product.wide.weight @ product.narrow.weight)

        if calibration is not None:
            visit_linears(model, calibration, narrow)
        else:
            for name, linear in linears(model):
                narrow(name, linear)
        if not made:
            raise FieldError("--energy", self.energy, "makes no layer smaller", "use less")
        for name, product in made.items():
            model.set_submodule(name, product)
        return model

    def save(self, model: Model, folder: Path) -> None:
        write_low_rank(model, folder)

    def load(self, folder: Path) -> Model:
        return load_low_rank(folder)

    def words(self, model: Model) -> Sequence[str]:
        """Ranks and errors of each kind of layer; those of each layer stand in config.json."""
        made = products(model)
        kinds: dict[str, list[Product]] = {}
        for name, product in made.items():
            kinds.setdefault(_last(name), []).append(product)
        whose = "outputs'" if self.calibration else "weight's"
        lines = [f"{'products of':<16}{'layers':>6}  {'rank':>11}  error: mean, largest (of the {whose} norm)"]
        for kind, found in kinds.items():
            ranks, errors = [product.rank for product in found], [product.error for product in found]
            span = f"{min(ranks)} to {max(ranks)}"
            mean = sum(errors) / len(errors)
            lines.append(f"{kind:<16}{len(found):>6}  {span:>11}  {mean:.3f}, {max(errors):.3f}")
        kept = [name for name, _ in linears(model) if self._takes(name) and name.rpartition(".")[0] not in made]
        if kept:
            lines.append(f"{len(kept)} layers stay whole: as products they would not be smaller")
        return [*lines, "only cuboid reads this folder: transformers has no such layers"]

    def _takes(self, name: str) -> bool:
        return not self.modules or _last(name) in self.modules

    @torch.no_grad()
    def _product(self, linear: nn.Linear, hessian_II: Tensor | None) -> Product | None:
        """W [O, I] = U S V, or W R = U S V with X'X = R R'; the first r of the singular values S divided evenly between
        both factors, and R taken out again."""
        weight_OI = linear.weight.float()
        root_II = torch.eye(linear.in_features) if hessian_II is None else torch.linalg.cholesky(hessian_II)
        u_OK, s_K, v_KI = torch.linalg.svd(weight_OI @ root_II, full_matrices=False)
        share_K = s_K.square().cumsum(0) / s_K.square().sum()
        rank = self.rank if self.energy is None else int((share_K < self.energy).sum()) + 1
        assert rank is not None
        if rank > _widest(linear):
            return None
        product = Product(linear, rank, (1 - share_K[rank - 1]).clamp(min=0).sqrt().item())
        root_r = s_K[:rank].sqrt()
        narrow_rI = root_r[:, None] * v_KI[:rank]
        product.narrow.weight.copy_(torch.linalg.solve_triangular(root_II, narrow_rI, upper=False, left=False))
        product.wide.weight.copy_(u_OK[:, :rank] * root_r)
        if linear.bias is not None:
            product.wide.bias.copy_(linear.bias)
        return product


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _widest(linear: nn.Linear) -> int:
    """The largest rank with which two factors have fewer numbers than the weight."""
    outputs, inputs = linear.weight.shape
    return (outputs * inputs - 1) // (outputs + inputs)
