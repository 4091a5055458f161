"""A run's folder, `runs/<stage>/<name>/`, and its progress bar.

config.yaml        the recipe as resolved: files, overrides and defaults together
environment.json   git commit, versions, machine, command line, ranks
metrics.jsonl      one object a log line: step, samples, losses, learning rate, samples/s
skipped.json       unreadable episodes that all ranks met, and how often, up to the newest checkpoint
images/            pictures, as files; also in TensorBoard (events.out.*)
checkpoints/       training state to resume from (training.distributed)
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.progress import TimeRemainingColumn as Eta

from config.loading import root
from config.training import Recipe

PACKAGES = ("torch", "numpy", "torchvision", "peft", "tokenizers", "safetensors", "pyarrow", "av")
MAY_CHANGE = {"steps", "log_every", "checkpoint_every", "keep", "workers", "validation"}  # on resume


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message names what and the fix."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints (step, path) in a run's `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step-*") if p.suffix != ".partial" and (p / "progress.json").is_file()]
    return sorted((int(p.name.removeprefix("step-")), p) for p in found)


def intact(folder: Path) -> str:
    """What a run whose disk is full still has in its `checkpoints` folder."""
    earlier = checkpoints(folder)
    return f"{earlier[-1][1]} is intact" if earlier else "there is no earlier checkpoint"


def flat(data: object, prefix: str = "") -> dict[str, object]:
    """Nested maps and lists -> {"a.b.0": value}."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        return {prefix: data}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}".strip(".")).items()}


def differences(a: dict, b: dict) -> dict[str, tuple[object, object]]:
    """Keys whose values differ between two configurations: {key: (in a, in b)}."""
    a, b = flat(a), flat(b)
    return {key: (a.get(key), b.get(key)) for key in [*a, *(b.keys() - a.keys())] if a.get(key) != b.get(key)}


def environment(world: int) -> dict:
    """What is needed to make this run again, besides the data."""

    def git(*command: str) -> str | None:
        try:
            return subprocess.check_output(
                ["git", *command], cwd=root(), text=True, stderr=subprocess.DEVNULL
            ).strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_changed_files": len((git("status", "--porcelain") or "").splitlines()),
        "python": platform.python_version(),
        "machine": f"{platform.platform()} {platform.machine()}, {os.cpu_count()} CPUs",
        "ranks": world,
        "packages": {name: installed(name) for name in PACKAGES},
    }


def read_config(folder: Path) -> dict:
    """Raises TrainingError."""
    try:
        return yaml.safe_load((folder / "config.yaml").read_text())
    except OSError as error:
        raise TrainingError(
            f"{error.filename} cannot be read ({error.strerror}): not a run's folder"
        ) from error


class Run:
    """Owns the folder and the bar. Only rank 0 writes; on others every method does nothing."""

    def __init__(self, folder: Path, recipe: Recipe, rank: int = 0, world: int = 1, wandb: bool = False):
        self.folder, self.rank, self.steps, self.name = folder, rank, recipe.steps, recipe.stage
        self.console = Console(stderr=True, quiet=rank > 0)
        self.tensorboard = self.wandb = self.progress = None
        self.stopped_by = 0  # signal that ended training early
        config = recipe.model_dump(mode="json")
        known = folder / "config.yaml"
        if checkpoints(folder / "checkpoints"):
            self._check_same(config, read_config(folder))
        if rank > 0:
            return
        (folder / "images").mkdir(parents=True, exist_ok=True)
        partial = known.with_suffix(".partial")  # other ranks may be reading
        partial.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        partial.replace(known)
        with (folder / "environment.json").open("a") as file:
            file.write(json.dumps(environment(world)) + "\n")
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(folder))
        if wandb:
            try:
                import wandb as weights_and_biases
            except ImportError as error:
                raise TrainingError("--wandb: the package is not installed: pip install wandb") from error
            self.wandb = weights_and_biases.init(
                project="vipra",
                name=f"{recipe.stage}-{folder.name}",
                config=config,
                dir=folder,
                resume="allow",
            )

    def _check_same(self, config: dict, before: dict) -> None:
        changed = differences(before, config)
        changed = {key: pair for key, pair in changed.items() if key.split(".")[0] not in MAY_CHANGE}
        if changed:
            key, (old, new) = next(iter(changed.items()))
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise TrainingError(
                f"{self.folder} was started with {key} {old}, now it is {new}{more}: "
                "give --run another folder, or delete this one"
            )

    def start(self, step: int) -> None:
        """Show the bar from `step` on and drop log lines of steps that will be run again."""
        if self.rank > 0:
            return
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept))
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Eta(),
            console=self.console,
        )  # fmt: skip
        self.bar = self.progress.add_task(self.name, total=self.steps, completed=step)
        self.progress.start()

    def track(self, items, what: str):
        """`items` with a bar, before training starts."""
        return track(items, what, console=self.console, transient=True) if self.rank == 0 else items

    def advance(self, step: int) -> None:
        if self.progress:
            self.progress.update(self.bar, completed=step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, one point a metric in TensorBoard, and the bar's text."""
        if self.rank > 0:
            return
        entry = {"step": step, "time": round(time.time(), 3), **{k: float(v) for k, v in metrics.items()}}
        with self._writing("metrics.jsonl") as path, path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        with self._writing("events.out"):
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(metrics), step=step)
        if self.progress and "loss" in metrics:
            text = f"{self.name} loss {metrics['loss']:.4f}, {metrics['samples_per_s']:.1f}/s"
            self.progress.update(self.bar, description=text)
            if not self.console.is_terminal:
                self.say(f"step {step}/{self.steps}: {text}")

    def last(self) -> dict[str, float]:
        """Newest value of every metric."""
        return summary(self.folder)[1]

    def say(self, text: str) -> None:
        (self.progress.console if self.progress else self.console).print(text, markup=False, highlight=False)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 RGB [h, w, 3] -> images/<name>-<step>.png and TensorBoard."""
        if self.rank > 0:
            return
        from PIL import Image

        with self._writing(f"images/{name}-{step:06d}.png") as path:
            Image.fromarray(image).save(path)
        with self._writing("events.out"):
            self.tensorboard.add_image(name, image, step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(image)}, step=step)

    def figure(self, step: int, name: str, figure) -> None:
        """A matplotlib figure as a picture; closes it."""
        import matplotlib.pyplot as plt

        figure.canvas.draw()
        self.picture(step, name, np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)

    def write(self, name: str, text: str) -> None:
        if self.rank == 0:
            with self._writing(name) as path:
                path.write_text(text, encoding="utf-8")

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The path of `name` in the folder. Raises TrainingError where it cannot be written."""
        path = self.folder / name
        try:
            yield path
        except OSError as error:
            left = intact(self.folder / "checkpoints")
            raise TrainingError(
                f"{path} was not written ({error.strerror or error}); {left}: free some space"
            ) from error

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
        if self.tensorboard:
            with suppress(
                OSError
            ):  # a full disk, which has ended the run; metrics.jsonl has the same numbers
                self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def summary(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and newest value of every metric in a run's folder; ({}, {}) where nothing was logged."""
    first, last = {}, {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill
            continue
        first, last = entry | first, last | entry
    return first, last


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return 1 << 62
