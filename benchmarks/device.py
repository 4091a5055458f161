"""What the device itself can do, and so the floor under every other number: copy bandwidth, matmul rates.

    python -m benchmarks.device --model tiny|100m|7b [--json FILE]

A chunk's floor (design section 4) is the time of its arithmetic and its memory traffic at these rates:
VQGAN and prefill at the matmul rate measured at prefill's number of rows, then (steps - 1) passes of 14 rows
that read every weight and every key once. The first Euler step rides in prefill and the prompt's keys are
known. Each pass takes at least the larger of bytes / bandwidth and FLOPs / rate: on a GPU the bytes decide at
batch 1, on a CPU the arithmetic does. FLOPs and bytes are counted from ModelConfig.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmarks import common
from models.config import ModelConfig

BRIDGE = 6  # tokens of "</vision> <action>"
STEPS = 10
PRECISIONS = {"cpu": ("fp32",), "cuda": ("bf16", "fp8")}
WIDTH = {"fp32": 4, "bf16": 2, "fp8": 1}  # bytes a weight
PROMPTS = (20, 60)

# counting, from sizes alone


def layer_weights(config: ModelConfig) -> int:
    """Weights of one layer's four matrices."""
    return 4 * config.hidden**2 + 3 * config.hidden * config.mlp_hidden


def vqgan_flops(config: ModelConfig) -> int:
    """Encoding one frame to codes: convolutions, and distances to the codebook."""
    vqgan, side = config.vqgan, config.vqgan.image_size

    def conv(inputs: int, outputs: int, side: int, kernel: int = 3) -> int:
        return 2 * side**2 * inputs * outputs * kernel**2

    def block(inputs: int, outputs: int, side: int) -> int:
        shortcut = conv(inputs, outputs, side, 1) if inputs != outputs else 0
        return conv(inputs, outputs, side) + conv(outputs, outputs, side) + shortcut

    width = vqgan.stem_channels or vqgan.channels[0]
    total = conv(3, width, side)
    for level, channels in enumerate(vqgan.channels):
        for _ in range(vqgan.blocks_per_level):
            total += block(width, channels, side)
            width = channels
        if level < len(vqgan.channels) - 1:
            side //= 2
            total += conv(width, width, side)
    total += 2 * block(width, width, side) + conv(width, vqgan.latent_channels, side)
    total += conv(vqgan.latent_channels, vqgan.latent_channels, side, 1)
    return total + 2 * side**2 * vqgan.latent_channels * vqgan.codebook_size


def pass_flops(config: ModelConfig, rows: int, keys: int) -> int:
    """One pass of `rows` tokens of one robot over `keys` keys, with the action encoder and head.

    The last layer computes queries, output and MLP only for the actions.
    """
    d, h = config.hidden, config.horizon
    layer, attention = layer_weights(config), 2 * 2 * d * keys
    full = (config.layers - 1) * rows * (2 * layer + attention)
    last = 2 * rows * 2 * d**2 + h * (2 * (layer - 2 * d**2) + attention)
    heads = 2 * h * (config.action_dim * d // 2 + 2 * d**2 + d * config.action_dim)
    return full + last + heads


def pass_bytes(config: ModelConfig, keys: int, batch: int, precision: str) -> int:
    """Read in one pass: layers in `precision`; action encoder, keys and values as the activations."""
    wide = 4 if precision == "fp32" else 2
    heads = 2 * config.hidden**2 + config.hidden * config.action_dim * 3 // 2
    cache = 2 * config.layers * keys * config.hidden
    return config.layers * layer_weights(config) * WIDTH[precision] + wide * (heads + batch * cache)


def prefill_rows(config: ModelConfig, prefetched: bool = False) -> int:
    """Tokens that prefill computes once o_t is there: frames (o_t alone if prefetched), bridge, chunk."""
    vision = config.vision_tokens // 2 if prefetched else config.vision_tokens
    return vision + BRIDGE + config.horizon


# measuring


def seconds(run: Callable, device: torch.device, at_least_s: float) -> float:
    """Shortest time of `run`, three times and for `at_least_s`, after a warm-up."""
    run()
    times = []
    while len(times) < 3 or sum(times) < at_least_s:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return min(times)


def bandwidth(device: torch.device, working_set: int, at_least_s: float) -> float:
    """Bytes/s read and written by a copy within the device.

    The working set is as large as the weights, since a CPU keeps a small model in its cache; at most 4 GiB,
    and at least 1 GiB on a GPU.
    """
    size = min(max(working_set, 2**30 if device.type == "cuda" else 2**16), 2**32) // 2
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device, at_least_s)


def matmul_rate(
    config: ModelConfig, rows: int, precision: str, device: torch.device, at_least_s: float
) -> float:
    """FLOP/s over a layer's four matrices at `rows` rows, random values; `fp8` by torch._scaled_mm.

    Raises RuntimeError where the device or torch has no such product.
    """
    d, m = config.hidden, config.mlp_hidden
    kind = {"device": device, "dtype": torch.float32 if precision == "fp32" else torch.bfloat16}
    products = []
    for inputs, outputs in ((d, 3 * d), (d, d), (d, 2 * m), (m, d)):
        x, w = torch.randn(rows, inputs, **kind), torch.randn(outputs, inputs, **kind) * 0.02
        if precision == "fp8":
            padded = -(-rows // 16) * 16  # rows beyond `rows` are not counted
            x = torch.randn(padded, inputs, **kind).to(torch.float8_e4m3fn)
            w, one = w.to(torch.float8_e4m3fn), torch.ones((), device=device)
            products.append(
                (torch._scaled_mm, (x, w.T), {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16})
            )
        else:
            products.append((F.linear, (x, w), {}))

    def run() -> None:
        for product, arguments, options in products:
            product(*arguments, **options)

    with torch.inference_mode():
        return 2 * rows * layer_weights(config) / seconds(run, device, at_least_s)


@dataclass(frozen=True)
class Rates:
    """What the device reached."""

    bandwidth: float  # bytes/s
    matmul: dict[str, dict[int, float]]  # precision -> rows -> FLOP/s
    missing: dict[str, str]  # precision -> why it could not be measured

    def best(self, precision: str) -> float:
        """Highest FLOP/s seen in `precision`, at any shape."""
        return max(self.matmul[precision].values())

    def at(self, precision: str, rows: int) -> float:
        """FLOP/s at `rows` rows: the best of that shape and of fewer rows, as products can be split."""
        measured = self.matmul[precision]
        return max(rate for seen, rate in measured.items() if seen <= max(rows, min(measured)))


def measure(
    config: ModelConfig, device: torch.device, batches: Sequence[int] = (1,), at_least_s: float = 0.5
) -> Rates:
    """Rates at the shapes of prefill (o_{t-1} known or not) and of an Euler step, at each batch size.

    `at_least_s` is spent on each: on a busy CPU a short look underestimates what the device can do.
    """
    per_robot = (config.horizon, prefill_rows(config, True), prefill_rows(config))
    rows = sorted({batch * rows for batch in batches for rows in per_robot})
    matmul, missing = {}, {}
    for precision in PRECISIONS[device.type]:
        try:
            matmul[precision] = {n: matmul_rate(config, n, precision, device, at_least_s) for n in rows}
        except RuntimeError as error:
            missing[precision] = str(error).splitlines()[0]
    precision = PRECISIONS[device.type][0]
    weights = pass_bytes(config, 0, 1, precision)
    return Rates(bandwidth(device, weights, at_least_s), matmul, missing)


@dataclass(frozen=True)
class Floor:
    """No chunk (of the whole batch) is faster on this device, ms."""

    encode_ms: float
    prefill_ms: float
    integrate_ms: float

    @property
    def total_ms(self) -> float:
        return self.encode_ms + self.prefill_ms + self.integrate_ms


def floor(
    config: ModelConfig,
    rates: Rates,
    prompt_tokens: int,
    precision: str,
    batch: int = 1,
    prefetched: bool = False,
    steps: int = STEPS,
) -> Floor:
    """Floor of a chunk for each of `batch` robots. The VQGAN never runs in fp8."""
    rows = prefill_rows(config, prefetched)
    keys = prompt_tokens + prefill_rows(config)
    first = batch * pass_flops(config, rows, keys) / rates.at(precision, batch * rows)
    step_flops = batch * pass_flops(config, config.horizon, keys) / rates.best(precision)
    reading = pass_bytes(config, keys, batch, precision) / rates.bandwidth
    frames = batch * (1 if prefetched else 2)
    encode = frames * vqgan_flops(config) / rates.best("bf16" if precision == "fp8" else precision)
    return Floor(encode * 1e3, max(first, reading) * 1e3, (steps - 1) * max(step_flops, reading) * 1e3)


RATE_TITLES = {"precision": "precision", "rows": "rows M", "tflop_per_s": "TFLOP/s"}
FLOOR_TITLES = {
    "precision": "precision",
    "batch": "batch",
    "prompt_tokens": "prompt",
    "prefetched": "o_{t-1} known",
    "encode_ms": "encode ms",
    "prefill_ms": "prefill ms",
    "integrate_ms": "integrate ms",
    "floor_ms": "floor ms",
}


def report(config: ModelConfig, rates: Rates, batches: Sequence[int]) -> tuple[list[dict], list[dict]]:
    """Rows of rates and rows of floors."""
    speeds = [
        {"precision": precision, "rows": rows, "tflop_per_s": rate / 1e12}
        for precision, measured in rates.matmul.items()
        for rows, rate in measured.items()
    ]
    floors = []
    for precision in rates.matmul:
        for batch, prompt, known in [(b, p, k) for b in batches for p in PROMPTS for k in (False, True)]:
            found = floor(config, rates, prompt, precision, batch, known)
            floors.append(
                {
                    "precision": precision,
                    "batch": batch,
                    "prompt_tokens": prompt,
                    "prefetched": known,
                    "encode_ms": found.encode_ms,
                    "prefill_ms": found.prefill_ms,
                    "integrate_ms": found.integrate_ms,
                    "floor_ms": found.total_ms,
                }
            )
    return speeds, floors


def main(argv: list[str] | None = None) -> int:
    parser = common.parser("device", __doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="B")
    arguments = parser.parse_args(argv)
    device, config = common.device(arguments.device, arguments.threads), common.sized(arguments.model)
    rates = measure(config, device, arguments.batch, 0.05 * (arguments.repeats or 10))
    speeds, floors = report(config, rates, arguments.batch)
    print(f"copy, read and written: {rates.bandwidth / 1e9:.1f} GB/s")
    for precision, reason in rates.missing.items():
        print(f"{precision} not measured: {reason}")
    common.show(f"{config.name}: matrix products of one layer", speeds, RATE_TITLES)
    common.show(
        f"{config.name}: floor of a chunk, {STEPS} Euler steps, D = {config.action_dim}", floors, FLOOR_TITLES
    )
    common.write_json(
        arguments.json,
        common.header("device", device, model=config.name)
        | {
            "bandwidth_bytes_per_s": rates.bandwidth,
            "missing": rates.missing,
            "matmul": speeds,
            "floors": floors,
            "flops": {
                "vqgan_frame": vqgan_flops(config),
                "prefill": pass_flops(config, prefill_rows(config), PROMPTS[0] + prefill_rows(config)),
                "step": pass_flops(config, config.horizon, PROMPTS[0] + prefill_rows(config)),
            },
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
