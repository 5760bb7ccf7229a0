"""A checkpoint's folder: its names, its manifest, and how a file of it is opened. Imports no torch.

    checkpoints/
      latest                      one line, the name of the newest complete folder
      best                        the same, of the one with the lowest loss on held-out text (checkpoint.best)
      step-00000020/
        shard-00003-00000.safetensors   tensors that rank 3 wrote
        tensors.json              every tensor: dtype, shape, and where its pieces lie
        facts.json                step, run, recipe, data position, versions, layout
        manifest.json             size and SHA-256 of each file above, and of itself; written last
      .partial-00000040-1f0c...   a save under way, or what a killed one left

``latest`` and ``best`` are files and no symbolic links: they survive copying, archives and shared file systems without
links, and nothing here ever follows a link.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from cuboid.parallel.errors import UserError
from cuboid.trainer.foreign import JSON_BYTES, open_plain, parse_json

FORMAT = 1
MANIFEST, FACTS, TENSORS, LATEST, BEST = "manifest.json", "facts.json", "tensors.json", "latest", "best"
PARTIAL = ".partial-"
REFUSED = ".refused"
_STEP = re.compile(r"step-(\d{8,18})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class CheckpointError(UserError):
    """A checkpoint that is broken, hostile, not one at all, or of another model; the message names the path."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: the step, when it was saved (seconds since 1970), and every other file."""

    step: int
    time: float
    files: Mapping[str, FileRecord]

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.files.values())


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a folder's name, None where it is not a checkpoint's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint that was completed once, newest first; nothing is checked."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {step: Path(folder) / name for name in names if (step := step_of(name)) is not None}
    return dict(sorted(found.items(), reverse=True))


def marked(folder: Path, mark: str) -> Path | None:
    """The checkpoint that ``latest`` or ``best`` names, None where it names none; nothing is checked."""
    try:
        with open_file(folder, mark) as file:
            name = file.read(64).decode("ascii", "replace").strip()
    except CheckpointError:
        return None
    return Path(folder) / name if step_of(name) is not None else None


def refused(folder: Path) -> list[str]:
    """Names of the checkpoints of ``folder`` that were found broken and renamed."""
    return sorted(path.name for path in Path(folder).glob(f"step-*{REFUSED}*"))


def open_file(folder: Path, name: str) -> BufferedReader:
    """Open one file of a checkpoint: a plain file inside the folder, reached through no link.

    Raises:
        CheckpointError: the name leaves the folder, or is a link, a device, missing or unreadable.
    """
    if not _FILE.fullmatch(name):
        raise CheckpointError(f"{folder} names the file {name!r}, which is not a plain name inside the folder; refused")
    try:
        return open_plain(Path(folder) / name, follow=False)
    except OSError as error:
        link = os.path.islink(Path(folder) / name)
        refusal = "is a link; refused" if link else error.strerror if error.errno else f"{error.strerror}; refused"
        raise CheckpointError(f"{folder}: {name}: {refusal}") from error


def read_json(folder: Path, name: str, record: FileRecord, *, beside: int = 0) -> dict[str, Any]:
    """One JSON object of a checkpoint, checked against its manifest's ``record``; ``beside`` as for `parse_json`."""
    return _parse(_content(folder, name, record, beside), f"{folder}: {name}", beside)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint at ``folder``.

    Raises:
        CheckpointError: missing, changed in any byte, of another format, or naming something outside the folder.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; refused")
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} {what_instead(folder)}")
    content, where = _content(folder, MANIFEST, None), f"{folder}: {MANIFEST}"
    parsed = _parse(content, where)
    if parsed.get("format") != FORMAT:
        raise CheckpointError(f"{where} has format {parsed.get('format')!r}; this version reads {FORMAT}")
    try:
        files = {name: FileRecord(int(r["size"]), str(r["sha256"])) for name, r in parsed["files"].items()}
        manifest = Manifest(int(parsed["step"]), float(parsed["time"]), files)
        unchanged = content == encode_manifest(manifest)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where} does not have the fields of a manifest") from error
    if not unchanged:
        raise CheckpointError(f"{where} was changed after it was written (SHA-256 differs)")
    if step_of(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"{folder} holds step {manifest.step}: it was renamed")
    for name in files:
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(f"{where} names {name!r}, which is not a file of this folder; refused")
    if missing := {FACTS, TENSORS} - files.keys():
        raise CheckpointError(f"{where} lists no {' and no '.join(sorted(missing))}")
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: one way to write each manifest, with its own SHA-256, so that no byte can change
    unseen."""
    plain = {"format": FORMAT, **asdict(manifest)}
    own = hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return json.dumps({**plain, "sha256": own}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def incomplete(folder: Path) -> str:
    """Why this cannot be a whole checkpoint, judged by manifest and sizes alone; empty where nothing is wrong."""
    try:
        for name, record in read_manifest(folder).files.items():
            with open_file(folder, name) as file:
                size = os.fstat(file.fileno()).st_size
            if size != record.size:
                return f"{folder}: {name} has {size} bytes instead of {record.size}"
    except CheckpointError as error:
        return str(error)
    return ""


def what_instead(path: Path) -> str:
    """Words for something that is not a checkpoint of ours."""
    if not os.path.lexists(path):
        return "does not exist"
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(8)
        if head.startswith((b"PK\x03\x04", b"\x80")):
            return "is a pickle (torch.save), which can run code when read; refused: cuboid reads safetensors only"
        return f"is a file; a checkpoint is a folder with {MANIFEST}"
    names = os.listdir(path)
    if any(name == ".metadata" or Path(name).suffix in _PICKLES for name in names):
        return "holds pickles (torch.save), which can run code when read; refused: cuboid reads safetensors only"
    if any(name.endswith(".safetensors") for name in names):
        return f"has no {MANIFEST}: it was never completed, or is a Hugging Face folder (name that as model.pretrained)"
    return "holds no complete checkpoint"


_PICKLES = {".distcp", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


def _content(folder: Path, name: str, record: FileRecord | None, beside: int = 0) -> bytes:
    with open_file(folder, name) as file:
        content = file.read(JSON_BYTES + beside + 1)
    if record and hashlib.sha256(content).hexdigest() != record.sha256:
        raise CheckpointError(f"{folder}: {name} is not what its manifest says (SHA-256 differs)")
    return content


def _parse(content: bytes, where: str, beside: int = 0) -> dict[str, Any]:
    try:
        parsed = parse_json(content, beside=beside)
    except ValueError as error:
        raise CheckpointError(f"{where} is not the JSON it should be ({error})") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return parsed
