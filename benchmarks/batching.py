"""Chunks a second when several robots share one policy: the engine at batch 1, 2, 4, 8, 16.

    python -m benchmarks.batching --model tiny|100m|7b [--json FILE]

Full batches back to back, frames on the host to actions on the host; different frames, one prompt of 20
tokens, D = 8. `graph` and `fp8` run on a GPU only. Rounds over the batch sizes are interleaved.
"""

import gc
from functools import partial

from rich.progress import track

from benchmarks import common, device

KINDS = ("eager", "graph", "fp8")
BATCHES = (1, 2, 4, 8, 16)
ROUNDS = {("tiny", "cpu"): 10, ("100m", "cpu"): 3, ("7b", "cuda"): 50}
PROMPT, DIM = 20, 8
TITLES = {
    "variant": "variant",
    "batch": "batch",
    "chunks_per_s": "chunks/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "floor_ms": "floor ms",
    "of_floor": "p50 / floor",
}


def measure(engine, kind: str, rates: device.Rates, batches: list[int], rounds: int) -> list[dict]:
    """One row a batch size; a row's latency is that of the whole batch."""
    config = engine.config
    task = common.task_of(PROMPT, engine.tokenizer)
    requests = [common.request(config, task, seed) for seed in range(max(batches))]
    runs = {n: partial(engine.infer, requests[:n]) for n in batches}
    for run in runs.values():
        run()
    times = common.interleave(runs, rounds)
    precision = device.PRECISIONS[engine.device.type][kind == "fp8"]
    rows = []
    for n in batches:
        floor = device.floor(config, rates, PROMPT, precision, n).total_ms
        latencies = times[n].percentiles
        speed = 1e3 * n * len(times[n].wall) / sum(times[n].wall.values())
        rows.append(
            {"variant": kind, "batch": n, "chunks_per_s": round(speed, 3)}
            | latencies
            | {"floor_ms": floor, "of_floor": latencies["p50_ms"] / floor}
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = common.parser("batching", __doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="B")
    arguments = parser.parse_args(argv)
    where = common.device(arguments.device, arguments.threads)
    rounds = arguments.repeats or ROUNDS.get((arguments.model, where.type), 10)
    config, batches = common.sized(arguments.model, DIM), sorted(arguments.batch)
    rates = device.measure(config, where, batches, min(1.0, 0.05 * rounds))
    checkpoint, rows = common.random_checkpoint(config, where), []
    for kind in track(KINDS, "batching"):
        if reason := common.skipped(kind, where):
            empty = dict.fromkeys(key for key in TITLES if key not in ("variant", "batch"))
            rows += [{"variant": kind, "batch": n} | empty | {"skipped": reason} for n in batches]
            continue
        engine = common.engine(checkpoint, kind, max(batches))
        rows += measure(engine, kind, rates, batches, rounds)
        engine = None  # its cache and graphs, before the next one's
        gc.collect()
    report = common.header("batching", where, model=arguments.model) | {
        "bandwidth_bytes_per_s": rates.bandwidth,
        "rows": rows,
    }
    common.show(f"vipra_{arguments.model}: full batches, {report['device']}", rows, TITLES)
    for reason in common.reasons(rows):
        print(f"skipped {reason}")
    common.write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
