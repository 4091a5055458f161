"""What the KV cache saves: a chunk with its prefix cached, against recomputing it at every Euler step.

    python -m benchmarks.kv_cache --model tiny|100m [--json FILE]

Random weights, batch 1, ten Euler steps, images already tokenised; prompt and image grow from row to row.
`cached` takes the prompt's keys and values as known (the server keeps them per task), `new task`
computes them first. Runs alternate and the fastest of each is compared, so other load on the machine matters
little; the actions of both are compared too.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.checkpoint import initialize
from models.config import SIZES, ModelConfig
from models.policy import Policy

BRIDGE = [3, 4, 5, 6, 7, 8]
ROWS = {  # (prompt tokens, image side in px)
    "tiny": ((20, 64), (60, 64), (120, 64), (60, 96), (60, 128)),
    "100m": ((60, 128), (20, 256), (60, 256), (120, 256)),
}


def fastest_ms(variants: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Shortest wall time of each callable, ms, interleaved; run each once before."""
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: min(values) for name, values in times.items()}


def measure(config: ModelConfig, prompt: int, repeats: int, steps: int = 10) -> dict:
    """One row of the table: times in ms, ratio, and the largest difference of the actions."""
    policy = Policy(config, serving=True)
    initialize(policy, 0)
    policy.eval()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.vqgan.codebook_size, (1, 2, config.frame_tokens), generator=generator)
    noise = torch.randn(1, config.horizon, config.action_dim, generator=generator)
    text = [1, 1, *(10 + i % 200 for i in range(prompt - 2))]
    known, cache = policy.encode_text(text), policy.new_cache(1, BRIDGE)

    def recompute():
        return policy.sample_recomputing([text], codes, noise, BRIDGE, steps)

    def cached(prefix=known):
        return policy.sample([prefix], codes, noise, cache, BRIDGE, steps)

    difference = (cached() - recompute()).abs().max().item()
    variants = {"recompute": recompute, "cached": cached, "new": lambda: cached(policy.encode_text(text))}
    ms = fastest_ms(variants, repeats)
    return {
        "prompt_tokens": prompt,
        "image_px": config.vqgan.image_size,
        "prefix_tokens": prompt + config.vision_tokens + len(BRIDGE),
        "recompute_ms": ms["recompute"],
        "cached_ms": ms["cached"],
        "cached_new_task_ms": ms["new"],
        "ratio": ms["recompute"] / ms["cached"],
        "max_difference": difference,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["tiny", "100m"], default="tiny")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and machine as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--action-dim", type=int, default=16, metavar="D")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    config = SIZES[f"vipra_{arguments.model}"].with_embodiment(arguments.action_dim, 14)
    rows = []
    for prompt, side in track(ROWS[arguments.model], config.name):
        vqgan = dataclasses.replace(config.vqgan, image_size=side)
        sized = dataclasses.replace(config, vqgan=vqgan, max_positions=2048)
        rows.append(measure(sized, prompt, arguments.repeats))
    table = Table(
        title=f"{config.name}: a chunk of 10 Euler steps, ms, fp32, {arguments.threads} CPU thread(s)"
    )
    titles = (
        "prompt",
        "image px",
        "prefix",
        "recompute ms",
        "cached ms",
        "new task ms",
        "ratio",
        "max diff.",
    )
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("prompt_tokens", "image_px", "prefix_tokens")),
            *(f"{row[key]:.1f}" for key in ("recompute_ms", "cached_ms", "cached_new_task_ms")),
            f"{row['ratio']:.2f}",
            f"{row['max_difference']:.1e}",
        )
    Console().print(table)
    if arguments.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        report = {
            "benchmark": "kv_cache",
            "model": config.name,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "machine": machine,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
