"""Ranks, sharding, and training checkpoints that survive kills and full disks.

Every run is distributed: one process is a group of one (gloo on CPU, NCCL for GPU tensors), so that
one rank and many run the same code. A training checkpoint is a folder in
torch.distributed.checkpoint's format plus `progress.json`; it is written as `<name>.partial`, then
renamed, so a final name means it is complete.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from training.run import TrainingError, checkpoints, intact

OPTIONS = StateDictOptions(ignore_frozen_params=True)  # frozen weights come from where training started
TIMEOUT = timedelta(minutes=60)  # rank 0 may validate and export alone for long


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks."""
        total = torch.tensor(values, dtype=torch.float64)  # on the CPU: no GPU synchronisation
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: object) -> list:
        """Every rank's `value`, in order, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.all_reduce(torch.zeros(1))


def start(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes, else a group of one. Raises TrainingError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise TrainingError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: no CUDA GPU here; use --device cpu")
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    here = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    return Ranks(dist.get_rank(), dist.get_world_size(), here, mesh)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def recompute(layer: nn.Module) -> None:
    """Keep only the layer's inputs for the backward pass (activation checkpointing)."""
    forward = layer.forward

    def again(*args, **kwargs):
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = again


def shard(module: nn.Module, layers: Sequence[nn.Module], ranks: Ranks, bfloat16: bool) -> None:
    """FSDP2 over `layers` and the rest of `module`. bfloat16: of the arithmetic; parameters stay as they
    are.

    Inputs are not cast: actions, noise and RoPE angles stay float32.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bfloat16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    fully_shard(module, mesh=ranks.mesh, mp_policy=policy)


@torch.no_grad()
def fill(module: nn.Module, source, ranks: Ranks) -> None:
    """Storage for a module built on meta, and its parameters from `source(name) -> Tensor`, one at a time."""
    module.to_empty(device=ranks.device)
    for name, parameter in module.named_parameters():
        full = source(name).to(ranks.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)


def average_gradients(module: nn.Module, ranks: Ranks) -> None:
    """For modules that are replicated, not sharded."""
    for parameter in module.parameters():
        if ranks.size > 1 and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks.size


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, on rank 0's CPU (an empty dict elsewhere). Every rank must call it."""
    first, weights = dist.get_rank() == 0, {}
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            weights[name] = value.cpu().clone()
    return weights


class Average:
    """Exponential moving average of the trainable parameters (EMA), sharded as they are."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.slow = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step` (from 1); the first steps weigh more, since the start is random."""
        decay = min(self.decay, step / (9 + step))
        for name, parameter in self.live.items():
            _local(self.slow[name]).lerp_(_local(parameter.detach()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live weights; calling it again undoes it."""
        for name, parameter in self.live.items():
            a, b = _local(self.slow[name]), _local(parameter.detach())
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# training checkpoints


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _state(module: nn.Module, optimizer: Optimizer, average: Average | None) -> dict:
    weights, moments = get_state_dict(module, optimizer, options=OPTIONS)
    return {"model": weights, "optimizer": moments, **({"average": average.slow} if average else {})}


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    average: Average | None,
    progress: dict,
    keep: int,
    ranks: Ranks,
) -> Path:
    """Write a checkpoint beside its place, swap it in, drop all but the `keep` newest.

    Raises TrainingError (full disk and the like); what was there before stays loadable.
    """
    final = folder / _name(step)
    partial = final.with_suffix(".partial")
    if ranks.first:
        for old in folder.glob("*.partial"):
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    try:
        dcp.save(_state(module, optimizer, average), checkpoint_id=partial)
        problem = None
        if ranks.first:
            (partial / "progress.json").write_text(json.dumps({"step": step, **progress}))
            _sync(partial)
    except (CheckpointException, OSError) as error:
        problem = error
    if ranks.sum([problem is not None])[0]:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"checkpoint {final} was not written ({_reason(problem)}); {intact(folder)}: free some space"
        )
    if ranks.first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    return final


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _reason(error: Exception | None) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if error else "another rank failed"


def load(path: Path, module: nn.Module, optimizer: Optimizer, average: Average | None) -> dict:
    """Restore what `save` wrote, at any number of ranks; returns the progress. Raises TrainingError."""
    state = _state(module, optimizer, average)
    try:
        progress = json.loads((path / "progress.json").read_text())
        dcp.load(state, checkpoint_id=path)
    except (CheckpointException, OSError, json.JSONDecodeError) as error:
        raise TrainingError(
            f"{path} cannot be read ({_reason(error)}): delete it to use the one before"
        ) from error
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )  # fmt: skip
    return progress
