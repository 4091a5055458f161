"""What the benchmarks share: random models in memory, interleaved timing, percentiles, tables and JSON."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from models import fp8, sequence
from models.checkpoint import Checkpoint, initialize
from models.config import SIZES, ModelConfig
from models.normalization import Normalizer
from models.policy import Policy
from models.tokenizer import Tokenizer
from models.vqgan import VQGAN
from policy_server.engine import Engine
from policy_server.scheduler import Request

MODELS = ("tiny", "100m", "7b")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def parser(name: str, description: str, models: tuple[str, ...] = MODELS) -> argparse.ArgumentParser:
    """Options of every benchmark of a model: size, device, threads, repeats, JSON file."""
    out = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--model", choices=models, default="tiny", help="7b: random weights, made on the device")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write rows, machine and commit as JSON")
    out.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    out.add_argument(
        "--threads", type=int, default=1, metavar="N", help="torch threads on a CPU (default: 1)"
    )
    out.add_argument("--repeats", type=int, metavar="N", help="rounds a row; default by model and device")
    return out


def device(choice: str, threads: int) -> torch.device:
    """The device `--device` names; sets torch's threads."""
    torch.set_num_threads(threads)
    if choice == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device cuda was asked for, but torch sees no GPU: use --device cpu")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def sized(model: str, action_dim: int = 16) -> ModelConfig:
    """`tiny`, `100m` or `7b` with D = `action_dim` and H = 14."""
    return SIZES[f"vipra_{model}"].with_embodiment(action_dim, 14)


def parts(config: ModelConfig) -> tuple[Tokenizer, Normalizer, str]:
    """Tokenizer, normaliser and embodiment of D joints of unit scale, never clipped."""
    d = config.action_dim
    names, kinds = tuple(f"joint{i + 1}" for i in range(d)), ("joint",) * d
    scale, far = (1.0,) * d, (1e3,) * d
    low = tuple(-x for x in far)
    normalizer = Normalizer(names, kinds, config.representation, "mean_std", (0.0,) * d, scale, low, far)
    embodiment = {
        "name": "benchmark",
        "horizon": config.horizon,
        "rate_hz": 22.0,
        "history_seconds": 2 / 22,
        "dimensions": [{"name": name, "kind": "joint"} for name in names],
    }
    return tokenizer(), normalizer, yaml.safe_dump(embodiment)


def random_checkpoint(config: ModelConfig, device: torch.device) -> Checkpoint:
    """Random weights made on the device tensor by tensor, bf16 on a GPU; actions are not scaled."""
    with torch.device("meta"):
        policy, vqgan = Policy(config, serving=True), VQGAN(config.vqgan)
    policy = policy.to(DTYPES[device.type]).to_empty(device=device)
    vqgan = vqgan.to_empty(device=device)
    initialize(policy, 0)
    initialize(vqgan, 0)
    return Checkpoint(config, policy.eval(), vqgan.eval(), *parts(config), hash="0" * 64)


def engine(checkpoint: Checkpoint, kind: str, max_batch: int = 1) -> Engine:
    """The server's engine, warm, ten Euler steps: `eager`, `graph` (CUDA graphs), `fp8` (graphs and fp8)."""
    quantization = "fp8" if kind == "fp8" else "none"
    out = Engine(checkpoint, max_batch, cuda_graphs=kind != "eager", quantization=quantization)
    out.warm_up()
    return out


def tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges cross spaces: the prompt's fixed text is a few tokens, a digit one each."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    pieces = [*sequence.PROMPT.split("{task}"), "</", "vision", " <", "action"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    inner.train_from_iterator(pieces, trainer)
    return Tokenizer(inner)


def task_of(tokens: int, tokenizer: Tokenizer) -> str:
    """A task whose whole prompt, BOS to `<vision>`, is exactly `tokens` long."""
    for digits in range(1, tokens):
        task = "1" * digits
        if len(sequence.encode_prompt(tokenizer, task)) == tokens:
            return task
    raise ValueError(f"no prompt of {tokens} tokens: the fixed part is longer")


def request(config: ModelConfig, task: str, seed: int = 0) -> Request:
    """Two frames of noise on the host."""
    size = config.vqgan.image_size
    images = np.random.default_rng(seed).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    return Request(images, task, seed)


@dataclass
class Times:
    """What each round of one variant took, ms, by number of the round."""

    wall: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)  # of this process: other load takes nothing of it

    @property
    def percentiles(self) -> dict[str, float]:
        return percentiles(self.wall.values())

    def ratio(self, reference: "Times", device: torch.device) -> float:
        """Median over the rounds that both ran in: of wall time on a GPU, of processor time on a CPU."""
        kind = "cpu" if device.type == "cpu" else "wall"
        own, other = getattr(self, kind), getattr(reference, kind)
        return round(float(np.median([own[i] / other[i] for i in own if i in other])), 4)


def interleave(
    variants: dict[str, Callable],
    rounds: int,
    before: dict[str, Callable] | None = None,
    rare: tuple[str, ...] = (),
    every: int = 5,
) -> dict[str, Times]:
    """Time every callable in every round; the order turns from round to round.

    All variants share a round's disturbances, so their ratios hold on a busy machine. `before` runs untimed
    ahead of its variant; `rare` variants run in every `every`-th round.
    """
    times = {name: Times() for name in variants}
    names = list(variants)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name in rare and i % every:
                continue
            (before or {}).get(name, lambda: None)()
            start = time.perf_counter(), time.process_time()
            variants[name]()
            times[name].wall[i] = (time.perf_counter() - start[0]) * 1e3
            times[name].cpu[i] = (time.process_time() - start[1]) * 1e3
    return times


def percentiles(values: Iterable[float]) -> dict[str, float]:
    p50, p99 = np.percentile(list(values), (50, 99))
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4)}


def header(benchmark: str, device: torch.device | str = "cpu", **more) -> dict:
    """What every result file begins with: benchmark, date, commit, machine."""
    cuda = torch.device(device).type == "cuda"
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        **more,
    }


def commit() -> str:
    """Short hash of the checkout, with + where it has changes; "unknown" outside git."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def write_json(path: Path | None, report: dict) -> None:
    """Write a report where `--json` was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def columns(rows: list[dict], titles: dict[str, str]) -> list[list[str]]:
    """Cells of `rows` in the order of `titles` {key: title}; a missing value is a dash."""
    return [[_cell(row.get(key)) for key in titles] for row in rows]


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
        )
    return str(value)


def show(title: str, rows: list[dict], titles: dict[str, str]) -> None:
    """Print `rows` as a table."""
    table = Table(title=title)
    for name in titles.values():
        table.add_column(name, justify="right")
    for cells in columns(rows, titles):
        table.add_row(*cells)
    console = Console()
    console = console if console.is_terminal else Console(width=150)  # a log needs no narrow columns
    console.print(table)


def skipped(variant: str, device: torch.device) -> str | None:
    """Why a variant cannot run on this device, or None."""
    if device.type != "cuda" and variant == "graph":
        return "CUDA graphs need a GPU: a CPU runs `eager`"
    if "fp8" in variant and not (device.type == "cuda" and fp8.supported(device)):
        return "fp8 products need a GPU of compute capability 9.0 (Hopper) or later"
    return None


def reasons(rows: list[dict]) -> list[str]:
    """Why rows are empty, each reason once."""
    return list(dict.fromkeys(f"{row['variant']}: {row['skipped']}" for row in rows if "skipped" in row))


def markdown(rows: list[dict], titles: dict[str, str]) -> str:
    """`rows` as a markdown table, for docs/benchmarks.md."""
    lines = [list(titles.values()), ["---"] * len(titles), *columns(rows, titles)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
