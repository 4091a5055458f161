"""`--dry-run`: does a run fit, and how long does a step take? One step is traced on torch's meta device,
which counts the arithmetic and the bytes kept for the backward pass without computing anything.
"""

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from config.training import Recipe
from training.loop import Stage

UTILISATION = 0.45  # of the peak, what a tuned 7B run reaches; unmeasured here
HEADROOM = 1.10  # allocator and collective buffers
GIB = 2**30


@dataclass(frozen=True)
class Trace:
    """One micro-batch, forward and backward."""

    flops: float  # multiply-adds count twice; recomputation included
    kept: int  # bytes held for the backward pass at once


def trace(stage: Stage, recipe: Recipe) -> Trace:
    """Moves the stage's module to meta for good. Attention counts as if its matrix were kept, and a stage
    that trains under autocast is traced in float32: upper bounds.
    """
    module = stage.module.to("meta").train()
    if recipe.precision == "bfloat16" and stage.sharded:
        module.to(torch.bfloat16)
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    held: dict[int, torch.Tensor] = {}
    total = 0

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in held:
            held[storage._cdata] = tensor  # keeps the address from being used again
            total += storage.nbytes()
        return tensor

    inside, inputs, marks = [], [], []
    hooks = []
    for layer in stage.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, args: marks.append((total, args[0].nbytes))))
        hooks.append(layer.register_forward_hook(lambda *_: inside.append(total - marks[-1][0])))
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module(stage.example(recipe.micro_batch), 1)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    for hook in hooks:
        hook.remove()
    flops, inputs = counter.get_total_flops(), [size for _, size in marks]
    if recipe.activation_checkpointing and inside:
        return Trace(flops + forward, total - sum(inside) + sum(inputs) + max(inside))
    return Trace(flops, total)


def memory(stage: Stage, recipe: Recipe, gpus: int, kept: int) -> dict[str, float]:
    """Bytes a GPU, by what they hold."""
    shared = gpus if stage.sharded else 1
    trained = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    bytes_of = {True: 4, False: 2 if recipe.precision == "bfloat16" and _adapters(recipe) else 4}
    stored = sum(p.numel() * bytes_of[p.requires_grad] for p in stage.module.parameters())
    parts = {
        "weights": stored / shared,
        "gradients": 4 * trained / shared,
        "optimiser": 8 * trained / shared,
        "activations": kept,
    }
    if recipe.ema:
        parts["averaged weights"] = 4 * trained / shared
    if stage.sharded and stage.layers:
        width = 2 if recipe.precision == "bfloat16" else 4
        layer = sum(p.numel() for p in stage.layers[0].parameters())
        rest = sum(p.numel() for p in stage.module.parameters()) - layer * len(stage.layers)
        parts["gathered layers"] = width * (2 * layer + rest) + 4 * layer  # and one layer's gradient sum
    return parts


def _adapters(recipe: Recipe) -> bool:
    return getattr(recipe, "lora", None) is not None


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product here."""
    n = 4096 if device == "cuda" else 768
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def available() -> tuple[str, float]:
    """(device, bytes it has in all)."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(0).total_memory
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return "cpu", int(fields["MemTotal"].split()[0]) * 1024


def show(
    stage: Stage, recipe: Recipe, gpu_memory: float | None, gpu_tflops: float | None, gpus: int | None
) -> bool:
    """Print the plan; returns whether it fits."""
    gpus = gpus or 1
    parameters = sum(p.numel() for p in stage.module.parameters())
    trained = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    found = trace(stage, recipe)
    parts = memory(stage, recipe, gpus, found.kept)
    need = HEADROOM * sum(parts.values())
    device, has = available()
    if gpu_memory:
        has = gpu_memory * GIB
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    if gpu_tflops:
        rate, how = gpu_tflops * 1e12 * UTILISATION, f"{UTILISATION:.0%} of {gpu_tflops:g} TFLOP/s"
    else:
        measured = matmul_rate(device, dtype)
        rate, how = measured / 2, f"half the {measured / 1e12:.3g} TFLOP/s a matrix product reaches here"
    work = found.flops * recipe.global_batch / recipe.micro_batch
    seconds = work / gpus / rate
    table = Table(title=f"{recipe.stage}, {recipe.model}, {gpus} x {has / GIB:.4g} GiB", show_header=False)
    table.add_row("parameters", f"{parameters / 1e6:,.1f} M, trained {trained / 1e6:,.1f} M")
    for name, size in parts.items():
        table.add_row(name, f"{size / GIB:.3g} GiB")
    table.add_row(
        "needed each", f"{need / GIB:.3g} GiB: {'fits' if need <= has else 'DOES NOT FIT'}", style="bold"
    )
    table.add_row("arithmetic a step", f"{work / 1e12:.4g} TFLOP for {recipe.global_batch} samples")
    table.add_row("step, about", f"{seconds:.3g} s ({how})")
    table.add_row("run, about", f"{seconds * recipe.steps / 3600:.3g} h for {recipe.steps} steps")
    console = Console()
    console.print(table)
    if stage.uncounted:
        console.print(f"Not counted, in memory or time: {', '.join(stage.uncounted)}.")
    if need > has:
        fixes = ["lower micro_batch", "more GPUs"]
        fixes += [] if recipe.activation_checkpointing else ["activation_checkpointing: true"]
        fixes += ["lora: {}"] if hasattr(recipe, "lora") and recipe.lora is None else []
        console.print(f"It does not fit: {', '.join(fixes)}.")
    return need <= has
