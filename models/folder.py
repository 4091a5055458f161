"""A folder of safetensors files and small text files, described and sealed by `manifest.json`.

Notable: tensors are made, written and hashed one at a time, so memory stays at one tensor; a folder is
written beside its place and swapped in when complete; an interrupted write can go on at the next shard.
Nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FORMAT = 1
MANIFEST = "manifest.json"
RESUME = "resume.json"  # in a partial folder: what it is a copy of, and the files that are finished
SHARD_BYTES = 4 << 30
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Progress = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all)


class CheckpointError(ValueError):
    """A checkpoint folder is missing, damaged or does not fit; the message names the file and tensor."""


@dataclass(frozen=True)
class Weights:
    """Tensors to write: their shapes, and a function that makes one by name when its turn comes."""

    shapes: dict[str, torch.Size]
    tensor: Callable[[str], Tensor]
    dtype: torch.dtype

    def bytes(self, name: str) -> int:
        return self.shapes[name].numel() * self.dtype.itemsize


def shards(tensors: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Group (name, bytes) in order so that no group exceeds `limit` unless one tensor does."""
    groups, size = [[]], 0
    for name, count in tensors:
        if groups[-1] and size + count > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups


def digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_replaceable(folder: Path) -> None:
    """Raises CheckpointError where something lies that is not a checkpoint."""
    known = any((folder / name).exists() for name in ("config.json", MANIFEST))
    if folder.exists() and not known and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} holds something that is not a checkpoint: choose another folder")


def write(
    folder: Path | str,
    weights: dict[str, Weights],
    texts: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
    resume: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Write a folder, replacing a checkpoint that is there, and return its hash. Raises CheckpointError.

    weights: by file name (`vqgan.safetensors`), or by stem for `stem-00001-of-0000n.safetensors`. resume:
    identifies the content, so that a later call with the same text goes on where this one was interrupted;
    None: always from the start.
    """
    folder = Path(folder)
    require_replaceable(folder)
    partial = folder.with_name(folder.name + ".partial")
    plan = {}  # file name -> (weights, tensor names)
    for key, part in weights.items():
        if key.endswith(".safetensors"):
            plan[key] = (part, list(part.shapes))
            continue
        groups = shards(((name, part.bytes(name)) for name in part.shapes), shard_bytes)
        for i, names in enumerate(groups, 1):
            plan[f"{key}-{i:05d}-of-{len(groups):05d}.safetensors"] = (part, names)
    finished = _finished(partial, resume) if resume else {}
    if not finished:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    sizes = {file: sum(map(part.bytes, names)) for file, (part, names) in plan.items()}
    total, done = sum(sizes.values()), sum(sizes[file] for file in finished if file in sizes)
    _require_space(partial, total - done, bool(resume))
    try:
        for file, (part, names) in plan.items():
            if file in finished:
                continue
            finished[file] = _write_shard(partial / file, part, names, progress, done, total)
            done += sizes[file]
            if resume:
                _replace(partial / RESUME, json.dumps({"of": resume, "files": finished}))
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        value = write_manifest(partial, finished)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _require_space(partial, max(total - done, _free(partial) + 1), bool(resume))
        raise CheckpointError(f"{partial} could not be written: {error}") from error
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    (folder / RESUME).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    return value


def _finished(partial: Path, resume: str) -> dict[str, dict]:
    """Files of an interrupted write of the same content that are still as they were written."""
    try:
        data = json.loads((partial / RESUME).read_text())
        if data["of"] != resume:
            return {}
        return {
            name: entry
            for name, entry in data["files"].items()
            if (partial / name).stat().st_size == entry["bytes"] and digest(partial / name) == entry["sha256"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_shard(
    path: Path, part: Weights, names: list[str], progress: Progress | None, done: int, total: int
) -> dict:
    """One safetensors file, tensor by tensor; its manifest entry."""
    header, end = {}, 0
    for name in names:
        start, end = end, end + part.bytes(name)
        shape = list(part.shapes[name])
        header[name] = {"dtype": DTYPES[part.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with path.open("wb") as file:

        def put(data) -> None:
            file.write(data)
            sha.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = part.tensor(name)
            if tensor.shape != part.shapes[name]:
                raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(part.shapes[name])}")
            put(tensor.detach().to("cpu", part.dtype).reshape(-1).view(torch.uint8).numpy())
            done += part.bytes(name)
            if progress:
                progress("writing checkpoint", done, total)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": sha.hexdigest()}


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _require_space(partial: Path, needed: int, resumable: bool) -> None:
    free = _free(partial)
    if needed <= free:
        return
    hint = "finished shards are kept, run the same command again" if resumable else "then run it again"
    raise CheckpointError(
        f"{partial} needs {needed / 2**30:.2f} GiB more, the disk has {free / 2**30:.2f} GiB free: "
        f"free {(needed - free) / 2**30:.2f} GiB; {hint}"
    )


def _replace(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def write_manifest(folder: Path, entries: dict[str, dict] | None = None) -> str:
    """Seal a folder: size and SHA-256 of every file in it. Returns its hash.

    entries: files whose {"bytes", "sha256"} are known already.
    """
    entries, files = entries or {}, {}
    for path in sorted(path for path in folder.iterdir() if path.name not in (MANIFEST, RESUME)):
        path.chmod(0o644)  # a server under another account must read them
        files[path.name] = entries.get(path.name) or {"bytes": path.stat().st_size, "sha256": digest(path)}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    _replace(folder / MANIFEST, text)
    (folder / MANIFEST).chmod(0o644)
    return hashlib.sha256(text.encode()).hexdigest()


def read_text(folder: Path, name: str) -> str:
    """Raises CheckpointError."""
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / name} is missing: not a complete checkpoint") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / name} is not readable: {error}") from error


def read_hash(folder: Path | str) -> str:
    """Content hash of a folder, from its manifest alone. Raises CheckpointError."""
    return hashlib.sha256(read_text(Path(folder), MANIFEST).encode()).hexdigest()


def read_manifest(folder: Path, verify: bool = True) -> dict[str, str]:
    """File name -> SHA-256. Checks names and sizes, and contents when `verify`. Raises CheckpointError."""
    try:
        data = json.loads(read_text(folder, MANIFEST))
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in data["files"].items()}
        version = data["format"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {version}, this version reads {FORMAT}")
    for name, (size, sha256) in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing: not a complete checkpoint")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {size}: copy it again"
            )
        if verify:
            require_digest(path, digest(path), sha256)
    return {name: sha256 for name, (_, sha256) in files.items()}


def require_digest(path: Path, found: str | Future, expected: str) -> None:
    """Raises CheckpointError unless the file's SHA-256, perhaps still being computed, is the expected one."""
    if (found.result() if isinstance(found, Future) else found) != expected:
        raise CheckpointError(f"{path} differs from its manifest (SHA-256): copy it again")


def _tensors(paths: list[Path]) -> Iterator[tuple[Path, str, "safe_open"]]:
    for path in paths:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield path, name, file
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


@torch.no_grad()
def fill(
    module: nn.Module,
    paths: list[Path],
    skip: frozenset[str] | set[str] = frozenset(),
    advance: Callable[[int], None] | None = None,
) -> None:
    """Copy tensors from memory-mapped files straight into the module's storage. Raises CheckpointError.

    skip: known but unused names. advance: called with the bytes of each tensor passed.
    """
    wanted = dict(module.named_parameters())
    seen, unknown = set(), []
    for path, name, file in _tensors(paths):
        if name in seen:
            raise CheckpointError(f"{path}: tensor {name} appears twice")
        seen.add(name)
        if name not in wanted:
            if name not in skip:
                unknown.append(name)
            continue
        tensor, parameter = file.get_tensor(name), wanted[name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {name} is {list(tensor.shape)}, the model needs {list(parameter.shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, not a floating-point tensor")
        parameter.copy_(tensor)
        if not parameter.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite weights")
        if advance:
            advance(tensor.nbytes)
    missing = sorted(set(wanted) - seen)
    if unknown or missing:
        where = paths[0].parent if paths else "no files"
        raise CheckpointError(f"{where}: unknown tensors {sorted(unknown)}, missing tensors {missing}")
