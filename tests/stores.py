"""Tensors over a block of ranks whose every bit follows from their names: what the checkpoint tests save and expect.

And what happens to them: a flipped bit, a kill at any file operation.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import model_config
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cuboid.parallel.data import replicate
from cuboid.parallel.gradients import local
from cuboid.parallel.layout import Layout
from cuboid.parallel.local import owned_slices
from cuboid.parallel.mesh import Block, connect
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.checkpoint import Checkpointer
from cuboid.trainer.manifest import MANIFEST, FileRecord, Manifest, encode_manifest
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import config_of
from cuboid.trainer.publish import write_json
from cuboid.trainer.recipe import Recipe

NUM_LAYERS = 6
SHAPES: dict[str, tuple[int, ...]] = {"embedding": (32, 6)}
for layer in range(NUM_LAYERS):
    SHAPES |= {
        f"layers.{layer}.column": (12, 6),  # divided by outputs
        f"layers.{layer}.row": (7, 12),  # divided by inputs; 7 rows do not divide by 2, 3 or 4 data ranks
        f"layers.{layer}.norm": (3,),  # fewer elements than 4 data ranks
    }
PARTS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")

Events = list[tuple[str, dict[str, Any]]]
"""What a checkpointer told: (kind, fields)."""

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
"""Audit events of Python; the first argument is the path, or a folder's descriptor."""
_FOLDER_OF = {"os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}
"""Which argument is the descriptor of the folder that the path is relative to; -1 where it is relative to none."""


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Random bits as a tensor, the same for a name everywhere; any bit lost or moved shows."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    return torch.randn(shape, generator=generator).to(dtype)


def placed(layout: Layout, block: Block | None, *, shard: bool = True) -> dict[str, Tensor]:
    """Zeros, placed as a run places them: stages, tensor parallelism, FSDP2; the embedding stands on both end stages.

    Names as in a run: parameters, and two moments beside each.
    """
    stage = block.coordinate.pipeline if block else 0
    module = nn.ParameterDict()
    for name, shape in SHAPES.items():
        ends = (0, layout.pipeline - 1)
        if stage in (ends if name == "embedding" else (int(name.split(".")[1]) * layout.pipeline // NUM_LAYERS,)):
            tensor: Tensor = torch.zeros(shape)
            if block and layout.tensor > 1:
                placement = Shard(1) if name.endswith("row") else Replicate() if name.endswith("norm") else Shard(0)
                tensor = distribute_tensor(tensor, block.mesh["tensor"], [placement], src_data_rank=None)
            module[name.replace(".", "_")] = nn.Parameter(tensor)
    if block and layout.data > 1:
        (fully_shard if shard else replicate)(module, mesh=block.mesh["data"])
    names = [name for name in SHAPES if name.replace(".", "_") in module]
    return {f"{part}.{name}": _like(module[name.replace(".", "_")]) for part in PARTS for name in names}


def fill(tensors: dict[str, Tensor], *, generation: int = 0) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        local(tensor).copy_(_expected(name, tensor, generation))
    return tensors


def differing(tensors: dict[str, Tensor], *, generation: int = 0) -> list[str]:
    """Names whose part on this rank is not, bit for bit, what `fill` gave."""
    return [
        name for name, tensor in tensors.items() if not torch.equal(local(tensor), _expected(name, tensor, generation))
    ]


def listener() -> tuple[Events, Callable[..., None]]:
    """A list, and an event callback that appends to it."""
    events: Events = []
    return events, lambda kind, **fields: events.append((kind, fields))


def save(folder: Path, tensors: dict[str, Tensor], *steps: int, **settings: Any) -> Events:
    """Save generation n of the tensors as step n; the events."""
    events, listen = listener()
    options: dict[str, Any] = {"keep": 9, "asynchronous": False} | settings
    with Checkpointer(folder, event=listen, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, fill(tensors, generation=step), {"run_id": "abc", "generation": step})
    return events


def flip(path: Path, position: int | None = None, bit: int = 0) -> None:
    """Change one bit of a file, in the middle unless said otherwise."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


def sign(path: Path, **records: FileRecord) -> None:
    """Write the manifest of a changed checkpoint anew, so that it vouches for what is there."""
    files = {file.name: _write_again(file) for file in path.iterdir() if file.name != MANIFEST and file.is_file()}
    step = int(path.name.removeprefix("step-"))
    (path / MANIFEST).write_bytes(encode_manifest(Manifest(step, 0.0, files | records)))


def _write_again(file: Path) -> FileRecord:
    content = file.read_bytes()
    file.unlink()
    return write_json(file, content)


def kill_at_file_operation(number: int, *, folder: Path, begin: str = "") -> list[str]:
    """From now on this process counts its file operations below ``folder`` and dies of SIGKILL at the ``number``-th.

    With ``begin`` it counts from the first path on that has these letters.
    """
    seen: list[str] = []

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_OPERATIONS:
            return
        path = _audited_path(event, arguments)
        if path.startswith(str(folder)) and (seen or begin in path):
            seen.append(event)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
    return seen


def _audited_path(event: str, arguments: tuple[Any, ...]) -> str:
    path, folder = arguments[0], arguments[_FOLDER_OF[event]] if event in _FOLDER_OF else -1
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    text = os.fsdecode(path) if isinstance(path, bytes | str | os.PathLike) else ""
    return text if folder == -1 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{text}"


def _like(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.zeros_like(parameter).detach()
    shard = torch.zeros_like(parameter.detach().to_local())
    arguments = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, **arguments)


def _expected(name: str, tensor: Tensor, generation: int) -> Tensor:
    return value(f"{name}/{generation}", tuple(tensor.shape), tensor.dtype)[owned_slices(tensor)]


def make_model(*, tied: bool = False, vocab_size: int = 264, family: str = "llama") -> Any:
    """A small model of transformers with values of its own."""
    torch.manual_seed(1)
    values = model_config(family, tied) | {"vocab_size": vocab_size}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()


def save_model(
    model: Any,
    folder: Path,
    *steps: int,
    tokenizer: str = "auto",
    pretrained: str | None = None,
    prune: dict[str, Any] | None = None,
) -> None:
    """Checkpoints of the model as a run leaves them in ``folder``."""
    facts = {
        "recipe": {"data": {"tokenizer": tokenizer}, "model": {"pretrained": pretrained}, "prune": prune},
        "model_config": model.config.to_dict(),
    }
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"optimizer.exp_avg.{name.removeprefix('model.')}": tensor for name, tensor in tensors.items()}
    with Checkpointer(folder / "checkpoints", keep=9, asynchronous=False) as checkpointer:
        for step in steps:
            checkpointer.save(step, tensors, facts)


def save_first_weights(recipe: Recipe, folder: Path) -> None:
    """In every rank: a checkpoint of a real model, before its first step."""
    with connect(recipe.layout, timeout_seconds=60) as block:
        config = config_of(recipe)
        blueprint = draw_blueprint(config)
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        facts = {"recipe": recipe.model_dump(mode="json"), "model_config": config.to_dict()}
        with Checkpointer(folder / "checkpoints", keep=1, asynchronous=True) as checkpointer:
            checkpointer.save(1, engine.tensors(), facts)
