"""What the KV cache saves: a chunk with its prefix cached, against recomputing it at every Euler step.

    python -m benchmarks.kv_cache --model tiny|100m [--json FILE]

Random weights, batch 1, ten Euler steps, images already tokenised; prompt and image grow from row to row.
`cached` takes the prompt's keys and values as known (the server keeps them per task), `new task`
computes them first. Runs alternate and the fastest of each is compared, so other load on the machine matters
little; the actions of both are compared too.
"""

import dataclasses

import torch
from rich.progress import track

from benchmarks import common
from models.checkpoint import initialize
from models.config import ModelConfig
from models.policy import Policy

BRIDGE = [3, 4, 5, 6, 7, 8]
ROWS = {  # (prompt tokens, image side in px)
    "tiny": ((20, 64), (60, 64), (120, 64), (60, 96), (60, 128)),
    "100m": ((60, 128), (20, 256), (60, 256), (120, 256)),
}


def measure(config: ModelConfig, prompt: int, repeats: int, where: torch.device, steps: int = 10) -> dict:
    """One row of the table: times in ms, ratio, and the largest difference of the actions."""
    policy = Policy(config, serving=True).to(where)
    initialize(policy, 0)
    policy.eval()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.vqgan.codebook_size, (1, 2, config.frame_tokens), generator=generator)
    noise = torch.randn(1, config.horizon, config.action_dim, generator=generator)
    codes, noise = codes.to(where), noise.to(where)
    text = [1, 1, *(10 + i % 200 for i in range(prompt - 2))]
    known, cache = policy.encode_text(text), policy.new_cache(1, BRIDGE)

    def recompute():
        return policy.sample_recomputing([text], codes, noise, BRIDGE, steps)

    def cached(prefix=known):
        return policy.sample([prefix], codes, noise, cache, BRIDGE, steps)

    difference = (cached() - recompute()).abs().max().item()
    variants = {"recompute": recompute, "cached": cached, "new": lambda: cached(policy.encode_text(text))}
    times = common.interleave(variants, repeats)
    ms = {name: min(taken.wall.values()) for name, taken in times.items()}
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


TITLES = {
    "prompt_tokens": "prompt",
    "image_px": "image px",
    "prefix_tokens": "prefix",
    "recompute_ms": "recompute ms",
    "cached_ms": "cached ms",
    "cached_new_task_ms": "new task ms",
    "ratio": "ratio",
    "max_difference": "max diff.",
}


def main(argv: list[str] | None = None) -> int:
    parser = common.parser("kv_cache", __doc__, tuple(ROWS))
    parser.add_argument("--action-dim", type=int, default=16, metavar="D")
    arguments = parser.parse_args(argv)
    where = common.device(arguments.device, arguments.threads)
    config, rows = common.sized(arguments.model, arguments.action_dim), []
    for prompt, side in track(ROWS[arguments.model], config.name):
        vqgan = dataclasses.replace(config.vqgan, image_size=side)
        sized = dataclasses.replace(config, vqgan=vqgan, max_positions=2048)
        rows.append(measure(sized, prompt, arguments.repeats or 3, where))
    report = common.header("kv_cache", where, model=config.name) | {"rows": rows}
    common.show(f"{config.name}: a chunk of 10 Euler steps, fp32, {report['device']}", rows, TITLES)
    common.write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
