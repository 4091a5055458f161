"""What fewer bits cost: final actions of one policy in bf16 and fp8 against higher precision, all else equal.

    python -m benchmarks.accuracy --model tiny|100m|7b [--json FILE]

Random weights of the chosen size, and the trained small policies that ship in `checkpoints/`. For those the
error is also in rad, to be held against the arms' own tracking error, a few 1e-3 rad (docs/benchmarks.md).
Frames are smoothed noise. A CPU emulates fp8.
"""

import dataclasses
import gc

import numpy as np
import torch
from rich.progress import track

from benchmarks import common
from config.loading import root
from models import checkpoint as checkpoints
from models import fp8
from models.checkpoint import Checkpoint
from policy_server.engine import Engine
from policy_server.scheduler import Request

TRAINED = ("vipra_tiny_single", "vipra_tiny_bimanual")
ROUNDS = 16
TITLES = {
    "weights": "weights",
    "compared": "compared",
    "relative": "relative error",
    "max_normalised": "max, normalised",
    "rms_rad": "RMS rad",
    "max_rad": "max rad",
    "requests": "chunks",
}


def frames(size: int, seed: int) -> np.ndarray:
    """Two smooth random pictures, uint8 [2, size, size, 3]."""
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def actions(engine: Engine, count: int) -> torch.Tensor:
    """Normalised actions [count, H, D] of `count` different requests."""
    size, normalizer = engine.config.vqgan.image_size, engine.normalizer
    state = np.zeros(len(normalizer.names), np.float32) if normalizer.needs_state else None
    chunks = [engine.infer([Request(frames(size, i), "1", i, state)])[0].actions for i in range(count)]
    states = None if state is None else np.tile(state, (count, 1))
    return torch.from_numpy(normalizer.normalize(np.stack(chunks), states))


def compare(name: str, engines: dict[str, Engine], pairs: list[tuple[str, str]], count: int) -> list[dict]:
    """One row for each (approximate, exact) pair of engines."""
    found = {precision: actions(engine, count) for precision, engine in engines.items()}
    normalizer = next(iter(engines.values())).normalizer
    rows = []
    for low, high in pairs:
        error = dataclasses.asdict(fp8.action_error(found[high], found[low], normalizer))
        if name.startswith("random"):
            error["rms_rad"] = error["max_rad"] = None  # random weights have no joints
        rows.append({"weights": name, "compared": f"{low} against {high}"} | error | {"requests": count})
    return rows


def trained(name: str, where: torch.device, count: int) -> list[dict]:
    """A policy that ships: fp32, bf16, and fp8 over bf16 (on a CPU over fp32)."""

    def load(dtype: torch.dtype) -> Checkpoint:
        return checkpoints.load(root() / "checkpoints" / name, where, dtype, serving=True)

    exact, short = load(torch.float32), load(torch.bfloat16)
    engines = {"fp32": common.engine(exact, "eager"), "bf16": common.engine(short, "eager")}
    if not fp8.supported(where):
        return compare(name, engines, [("bf16", "fp32")], count)
    engines["fp8"] = common.engine(short if where.type == "cuda" else exact, "fp8")
    pairs = [("bf16", "fp32"), ("fp8", "fp32")]
    return compare(name, engines, [*pairs, ("fp8", "bf16")] if where.type == "cuda" else pairs, count)


def random(model: str, where: torch.device, count: int) -> list[dict]:
    """Random weights of a size: fp8 against what they are quantised from."""
    if not fp8.supported(where):
        return []
    checkpoint = common.random_checkpoint(common.sized(model, 8), where)
    high = "bf16" if where.type == "cuda" else "fp32"
    engines = {high: common.engine(checkpoint, "eager"), "fp8": common.engine(checkpoint, "fp8")}
    return compare(f"random {model}", engines, [("fp8", high)], count)


def main(argv: list[str] | None = None) -> int:
    arguments = common.parser("accuracy", __doc__).parse_args(argv)
    where, rows = common.device(arguments.device, arguments.threads), []
    count = arguments.repeats or ROUNDS
    for name in track((*TRAINED, None), "accuracy"):
        rows += trained(name, where, count) if name else random(arguments.model, where, count)
        gc.collect()
    report = common.header("accuracy", where, model=arguments.model) | {"rows": rows}
    common.show(f"Final actions, ten Euler steps, {report['device']}", rows, TITLES)
    common.write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
