"""The training loop, one for all stages.

Sample number n decides everything about that sample: `samples[n]` is a pure function of (seed, n), and
torch's generator is seeded from (seed, n) before each micro-batch, so noise and dropout are too. A global
batch is cut into the same micro-batches whatever the number of ranks. Hence one rank and many see the same
training, and resuming needs the step only.
"""

import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from config.training import Recipe, Schedule
from training import distributed
from training.data.loader import Loader, collate
from training.distributed import Average, Ranks
from training.run import Run, TrainingError

Batch = dict[str, object]  # tensors [B, ...] and lists of B
Skipped = dict[str, object]  # episode, error, times


class Stage:
    """What the loop needs of a stage; subclasses are in tokenizer, latent, pretrain, finetune.

    module: `forward(batch, step)` -> scalars by name, averaged and logged; "loss" is minimised. May be
    on meta when `source(name)` gives the initial value of each parameter. layers: sharded and
    recomputed one by one.
    """

    module: nn.Module
    layers: Sequence[nn.Module] = ()
    sharded = True  # FSDP2; False: replicated, gradients averaged
    source: Callable[[str], Tensor] | None = None
    uncounted: Sequence[str] = ()  # frozen networks that --dry-run leaves out
    tokens_per_sample = 0  # about: a text counts with a fixed length

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """One micro-batch from the loader, ready for `module`."""
        return to_device(batch, device)

    def groups(self, recipe: Recipe) -> list[dict]:
        """AdamW's parameter groups; `scale` multiplies the learning rate."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], "scale": 1.0}]

    def after_step(self, step: int, ranks: Ranks) -> dict[str, float]:
        """Hook after the optimiser step `step` (from 1), on every rank."""
        return {}

    def validate(self, step: int, run: Run, ranks: Ranks, recipe: Recipe) -> dict[str, float]:
        """Numbers on held-out samples, and pictures through `run`. Every rank calls it."""
        return {}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def rows(batch: Batch, start: int, end: int) -> Batch:
    return {key: value[start:end] for key, value in batch.items() if key != "errors"}


def seed_for(seed: int, n: int) -> int:
    """Generator seed of the micro-batch whose first sample is number n."""
    return int(np.random.SeedSequence([seed, n]).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """Multiplier at optimiser step `step`, counted from 0."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    part = (step - schedule.warmup) / max(steps - schedule.warmup, 1)
    return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * part))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGTERM and SIGINT; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number, _frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def averaged(average: Average | None, module: nn.Module) -> Iterator[None]:
    """Evaluation mode, with the averaged weights where there are some."""
    module.eval()
    if average:
        average.swap()
    try:
        yield
    finally:
        if average:
            average.swap()
        module.train()


def check_batches(recipe: Recipe, ranks: Ranks) -> None:
    parts = recipe.global_batch // recipe.micro_batch
    if parts % ranks.size:
        raise TrainingError(
            f"global_batch {recipe.global_batch} is {parts} micro-batches of {recipe.micro_batch}, which "
            f"{ranks.size} ranks cannot share: set micro_batch to a divisor of "
            f"{recipe.global_batch}/{ranks.size}"
        )


def set_up(stage: Stage, recipe: Recipe, ranks: Ranks) -> torch.optim.AdamW:
    """Shard and fill the module, make its optimiser."""
    check_batches(recipe, ranks)
    if recipe.activation_checkpointing:
        for layer in stage.layers:
            distributed.recompute(layer)
    if recipe.compile:
        for layer in stage.layers:
            layer.compile()
    if stage.sharded:
        distributed.shard(stage.module, stage.layers, ranks, recipe.precision == "bfloat16")
    if stage.source:
        distributed.fill(stage.module, stage.source, ranks)
    stage.module.to(ranks.device).train()
    optimizer = recipe.optimizer
    groups = [{**g, "lr": optimizer.learning_rate * g["scale"]} for g in stage.groups(recipe)]
    return torch.optim.AdamW(groups, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True)


def train(
    stage: Stage,
    recipe: Recipe,
    run: Run,
    ranks: Ranks,
    samples,
) -> bool:
    """Train from the newest checkpoint in the run's folder, or from the start, to `recipe.steps`.

    samples: endless, `samples[n]` a pure function of n (training.data.sampling). On return the module
    holds what is to be exported (averaged weights if any). Returns False when a signal ended it early:
    a checkpoint is then written, and `run.stopped_by` is the signal. Raises TrainingError.
    """
    optimizer = set_up(stage, recipe, ranks)
    average = Average(stage.module, recipe.ema) if recipe.ema else None
    folder = run.folder / "checkpoints"
    start, skipped = 0, []
    if existing := distributed.checkpoints(folder):
        step, path = existing[-1]
        progress = distributed.load(path, stage.module, optimizer, average)
        start, skipped = progress["step"], progress.get("skipped", [])
        if start > recipe.steps:
            raise TrainingError(
                f"{run.folder} is already at step {start}, {recipe.steps} are asked for: choose another "
                f"--run, or steps={start} or more"
            )
        run.say(f"continuing from {path}")

    def save(step: int) -> list[Skipped]:
        found = unreadable(skipped, loader, ranks)
        progress = {"samples": step * recipe.global_batch, "skipped": found}
        distributed.save(folder, step, stage.module, optimizer, average, progress, recipe.keep, ranks)
        run.write("skipped.json", json.dumps(found, indent=1, ensure_ascii=False))
        return found

    run.start(start)
    meter, unread = Meter(recipe, ranks, stage.tokens_per_sample), skipped
    with stop_signals() as signals:
        loader = Loader(
            samples, recipe.global_batch, start, recipe.steps - start, ranks.rank, ranks.size, recipe.workers
        )
        feed = iter(loader)
        for step in range(start + 1, recipe.steps + 1):
            asked = time.perf_counter()
            batch = next(feed)
            meter.waited += time.perf_counter() - asked
            outputs, norm = optimise(stage, recipe, ranks, optimizer, batch, step)
            extra = stage.after_step(step, ranks)
            if average:
                average.update(step)
            meter.add(outputs, norm)
            last = step == recipe.steps
            stopping = bool(ranks.sum([len(signals)])[0])
            due = step % recipe.checkpoint_every == 0 or last or stopping
            if step % recipe.log_every == 0 or due:
                metrics = {**meter.read(), **extra, "learning_rate": optimizer.param_groups[0]["lr"]}
                check_finite(metrics, step)
                run.log(step, metrics | {"samples": step * recipe.global_batch})
            if due:
                unread = save(step)
            if step % recipe.validation.every == 0 or last:
                with averaged(average, stage.module):
                    measured = stage.validate(step, run, ranks, recipe)
                if measured:
                    run.log(step, {f"validation/{key}": value for key, value in measured.items()})
                meter.restart()
            run.advance(step)
            if stopping and not last:
                run.stopped_by = signals[0] if signals else signal.SIGTERM  # on another rank
                name = signal.Signals(run.stopped_by).name
                run.say(
                    f"stopped by {name} after step {step}: the same command with --run {run.folder} goes on"
                )
                break
    for line in unread:
        run.say(f"skipped {line['times']:5d} x {line['error']}")
    if run.stopped_by:
        return False
    stage.module.eval()
    if average:
        average.swap()
    return True


def unreadable(before: list[Skipped], loader: Loader, ranks: Ranks) -> list[Skipped]:
    """What could not be read and how often it was met: `before` this start of the run, and by every rank
    since.
    """
    broken = Counter(loader.samples.broken)  # every rank knows these from the start
    counts = Counter({(line["episode"], line["error"]): line["times"] for line in before})
    for errors in ranks.gather(loader.errors - broken):
        counts += errors
    return [{"episode": e, "error": text, "times": n} for (e, text), n in (counts | broken).most_common()]


def optimise(
    stage: Stage, recipe: Recipe, ranks: Ranks, optimizer: torch.optim.Optimizer, batch: Batch, step: int
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """One optimiser step on this rank's share of a global batch. Returns every micro-batch's outputs and
    the gradient's norm before clipping.
    """
    share = recipe.global_batch // ranks.size
    mixed = recipe.precision == "bfloat16" and not stage.sharded
    outputs = []
    for at in range(0, share, recipe.micro_batch):
        part = rows(batch, at, at + recipe.micro_batch)
        torch.manual_seed(seed_for(recipe.seed, int(part["n"][0])))
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=mixed):
            out = stage.module(stage.prepare(part, ranks.device), step)
        (out["loss"] * (recipe.micro_batch / share)).backward()
        outputs.append({key: value.detach() for key, value in out.items()})
    if not stage.sharded:
        distributed.average_gradients(stage.module, ranks)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.clip)
    factor = learning_rate(recipe.schedule, step - 1, recipe.steps)
    for group in optimizer.param_groups:
        group["lr"] = recipe.optimizer.learning_rate * group["scale"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outputs, norm


def check_finite(metrics: dict[str, float], step: int) -> None:
    bad = [key for key, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"step {step}: {', '.join(bad)} not finite; the last checkpoint is from before: lower "
            "optimizer.learning_rate or optimizer.clip, or look at the data (vipra data check)"
        )


class Meter:
    """Means over the steps since the last reading, over all ranks."""

    def __init__(self, recipe: Recipe, ranks: Ranks, tokens_per_sample: int):
        self.batch, self.ranks, self.tokens = recipe.global_batch, ranks, tokens_per_sample
        self.restart()

    def restart(self) -> None:
        self.since, self.waited = time.perf_counter(), 0.0
        self.outputs: list[dict[str, Tensor]] = []
        self.norms: list[Tensor] = []

    def add(self, outputs: list[dict[str, Tensor]], norm: Tensor) -> None:
        self.outputs += outputs
        self.norms.append(norm)

    def read(self) -> dict[str, float]:
        keys = list(self.outputs[0])
        sums = [torch.stack([out[key].float() for out in self.outputs]).double().mean() for key in keys]
        means = self.ranks.sum([float(value) / self.ranks.size for value in sums])
        norm = torch.stack([_whole(n) for n in self.norms]).mean().item()
        seconds = time.perf_counter() - self.since
        per_second = len(self.norms) * self.batch / seconds
        read = {
            **dict(zip(keys, means, strict=True)),
            "gradient_norm": norm,
            "samples_per_s": per_second,
            "data_wait": self.waited / seconds,
        }
        if self.tokens:
            read["tokens_per_s"] = per_second * self.tokens
        self.restart()
        return read


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def evaluate(
    stage: Stage,
    samples: list[Batch],
    ranks: Ranks,
    recipe: Recipe,
    measure: Callable[[Batch], dict[str, Tensor]],
) -> dict[str, np.ndarray]:
    """Mean over held-out `samples` of what `measure(prepared batch)` returns per row [B, ...].

    Every rank runs the same number of batches (sharded modules need that) and each batch counts once.
    """
    cuts = [samples[i : i + recipe.micro_batch] for i in range(0, len(samples), recipe.micro_batch)]
    sums: dict[str, np.ndarray] = {}
    for turn in range(math.ceil(len(cuts) / ranks.size)):
        mine = turn * ranks.size + ranks.rank
        part = collate([{**sample, "errors": []} for sample in cuts[min(mine, len(cuts) - 1)]])
        torch.manual_seed(seed_for(recipe.seed + 1, mine))
        for key, value in measure(stage.prepare(part, ranks.device)).items():
            counted = value.double().sum(0).cpu().numpy() * (mine < len(cuts))
            sums[key] = sums.get(key, 0.0) + counted
    means = {}
    for key, value in sums.items():
        total = ranks.sum(np.ravel(value).tolist())
        means[key] = np.reshape(total, np.shape(value)) / len(samples)
    return means
