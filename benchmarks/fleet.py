"""How many robots one policy server keeps moving: 22 actions/s, 7 of 14, each in its own time.

    python -m benchmarks.fleet --model 7b --robots 8:32 --json fleet.json

A server process and load processes on this machine, over ZeroMQ. Each simulated robot is the real client with
the real planner: a 30 Hz camera with a phase of its own, the picture sent ahead where the server gains from
it, chunks due from their observation. N robots pass when the 99th percentile from request to chunk is at most
280 ms, no executor tick (200 Hz) lacks an action, the planner never lowers the rate and no request fails.
The largest N is found by doubling, then halving the interval. Latencies are what a robot sees, in its 10 ms
ticks; `lateness` is how far the load processes themselves fell behind those. Where they did not keep up, this
machine is too small for the load and the row says nothing about the server.
"""

import json
import math
import socket
import sys
import time

import numpy as np

from benchmarks.peers import Peer, ready, together
from config.robot import PolicyClient as PolicyConfig
from policy_server.client import PolicyClient
from policy_server.protocol import Chunk
from vipra_ros.execution.history import FrameHistory
from vipra_ros.execution.planner import DELIVERY_S, TICK_S, Planner, Timing

P99_MS = 280.0
RATE_HZ, REPLAN_AFTER = 22.0, 7
CAMERA_HZ, CAMERA_DELAY_S = 30.0, 0.005
EXECUTOR_HZ = 200.0
LATE_MS = 20.0  # load processes that fall behind by more than this measure themselves
WARM_S = 2.0  # not counted
ROBOTS_A_PROCESS = 8
MAX_BATCH = 16
TITLES = {
    "robots": "robots",
    "chunks_per_s": "chunks/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "starved_ticks": "starved",
    "lowered": "lowered",
    "failures": "failed",
    "mean_batch": "batch",
    "prefetched": "hits",
    "lateness_p99_ms": "lateness p99",
    "kept_up": "load kept up",
    "passed": "passed",
}
TASK = "stack the red cup on the blue cup"


class Robot:
    """One robot between camera and executor. Times are monotonic s."""

    def __init__(self, address: str, number: int):
        rng = np.random.default_rng(number)
        config = PolicyConfig(action_rate_hz=RATE_HZ, replan_after=REPLAN_AFTER, server=address)
        self.client = PolicyClient(address, timeout_s=config.deadline_s)
        metadata = self.client.hello(60.0)
        self.planner = Planner(config, metadata.horizon, 1.0 / CAMERA_HZ)
        self.history = FrameHistory(metadata.history_seconds)
        self.ahead, self.history_s = metadata.supports_prefetch, metadata.history_seconds
        self.scene = rng.integers(0, 256, (*metadata.image_size, 3), np.uint8)
        self.phase_s = float(rng.random()) * REPLAN_AFTER / RATE_HZ
        self.captured = math.inf  # stamp of the picture that comes next
        self.asked: dict[int, float] = {}
        self.latencies: list[tuple[float, float]] = []  # asked at, s taken
        self.chunks: list[tuple[float, Timing]] = []  # arrived at
        self.failures: list[str] = []

    def begin(self, now: float) -> None:
        """Switch the camera on, in this robot's own time."""
        self.captured = now + self.phase_s

    def tick(self, now: float) -> None:
        """What the policy node does every 10 ms."""
        for outcome in self.client.poll():
            asked = self.asked.pop(outcome.seq)
            if isinstance(outcome, Chunk):
                self.latencies.append((asked, now - asked))
                self.chunks.append((now, self.planner.received(outcome.seq, now)))
            else:
                self.planner.failed(outcome.seq, now)
                self.failures.append(outcome.code)
        while now >= self.captured + CAMERA_DELAY_S:
            picture = self.scene.copy()  # no two alike, so that no cache takes one for another
            picture.reshape(-1)[:8] = np.frombuffer(np.float64(self.captured).tobytes(), np.uint8)
            self.history.add(picture, self.captured)
            if self.ahead and self.planner.precedes_request(self.history_s, now):
                self.client.prefetch(picture, TASK)
            self.captured += 1.0 / CAMERA_HZ
        pair = self.history.pair()
        if pair is not None and self.planner.should_request(now):
            before, newest, t_obs = pair
            seq = self.client.submit(np.stack((before, newest)), TASK, t_obs)
            self.asked[seq] = now
            self.planner.sent(seq, t_obs, now)


def starved_ticks(chunks: list[tuple[float, Timing]], until: float, delivery_s: float = DELIVERY_S) -> int:
    """Executor ticks without an action due, from the first of `chunks` (arrival, timing) to `until`.

    A chunk runs from its arrival plus `delivery_s` until its last action's period is over.
    """
    starts = [arrived + delivery_s for arrived, _ in chunks[1:]] + [until]
    ends = [timing.t0 + timing.count / timing.rate_hz for _, timing in chunks]
    return sum(
        max(0, math.ceil((start - end) * EXECUTOR_HZ)) for start, end in zip(starts, ends, strict=True)
    )


def load(address: str, first: int, robots: int, seconds: float) -> dict:
    """A load process: robots number `first` and on, and what they saw after WARM_S."""
    fleet = [Robot(address, first + i) for i in range(robots)]
    ready()
    begin = due = time.monotonic()
    for robot in fleet:
        robot.begin(begin)
    counted, end, late = begin + WARM_S, begin + WARM_S + seconds, []
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        for robot in fleet:
            robot.tick(time.monotonic())
        late.append(time.monotonic() - due)
        due += TICK_S
    for robot in fleet:
        robot.client.close()
    timings = [[(at, t) for at, t in robot.chunks if at >= counted] for robot in fleet]
    return {
        "latencies_ms": [1e3 * took for r in fleet for asked, took in r.latencies if asked >= counted],
        "starved": sum(
            starved_ticks(chunks, end) if chunks else round(seconds * EXECUTOR_HZ) for chunks in timings
        ),
        "lowered": sum(timing.rate_hz < RATE_HZ for chunks in timings for _, timing in chunks),
        "failures": [code for robot in fleet for code in robot.failures],
        "lateness_ms": [1e3 * value for value in late],
    }


def trial(address: str, robots: int, seconds: float) -> dict:
    """One row: `robots` robots for `seconds`."""
    peers = [
        Peer("benchmarks.fleet", "load", address=address, first=first, robots=count, seconds=seconds)
        for first, count in groups(robots)
    ]
    with PolicyClient(address) as watcher:
        watcher.hello(60.0)
        before = watcher.stats()
        parts = together(peers)
        after = watcher.stats()
    latencies = [value for part in parts for value in part["latencies_ms"]]
    late = [value for part in parts for value in part["lateness_ms"]]
    batches = {int(size): n - before.batches.get(size, 0) for size, n in after.batches.items()}
    served = sum(size * n for size, n in batches.items())
    hits = after.counts.get("prefetch_hit", 0) - before.counts.get("prefetch_hit", 0)
    row = {
        "robots": robots,
        "chunks_per_s": round(len(latencies) / seconds, 2),
        "p50_ms": _quantile(latencies, 0.50),
        "p99_ms": _quantile(latencies, 0.99),
        "starved_ticks": sum(part["starved"] for part in parts),
        "lowered": sum(part["lowered"] for part in parts),
        "failures": sum(len(part["failures"]) for part in parts),
        "mean_batch": round(served / max(1, sum(batches.values())), 2),
        "prefetched": round(hits / max(1, served), 2),
        "lateness_p99_ms": _quantile(late, 0.99),
        "lateness_max_ms": round(max(late), 2),
    }
    return row | {"passed": passed(row), "kept_up": row["lateness_p99_ms"] <= LATE_MS}


def passed(row: dict) -> bool:
    return row["p99_ms"] <= P99_MS and not (row["starved_ticks"] or row["lowered"] or row["failures"])


def groups(robots: int) -> list[tuple[int, int]]:
    """(first robot, how many) of each load process, as even as can be."""
    parts = np.array_split(np.arange(robots), math.ceil(robots / ROBOTS_A_PROCESS))
    return [(int(part[0]), len(part)) for part in parts]


def largest(low: int, high: int, passes) -> int:
    """The largest n up to `high` with `passes(n)`, taking it that all below it pass; tries `low` first."""
    good, n = 0, low
    while passes(n):
        good = n
        if n == high:
            return good
        n = min(2 * n, high)
    bad = n
    while bad - good > 1:
        n = (good + bad) // 2
        good, bad = (n, bad) if passes(n) else (good, n)
    return good


def _quantile(values: list[float], p: float) -> float:
    return round(float(np.quantile(values, p, method="higher")), 2) if values else math.inf


def serve(model: str, address: str, device: str, threads: int, fp8: bool, delay_s: float) -> int:
    """The server process; `still` computes nothing and takes `delay_s`."""
    from policy_server import server

    server.set_up_logging(level="WARNING")
    if model == "still":
        from benchmarks.standin import StandIn

        return server.serve(StandIn("franka_bimanual", delay_s, max_batch=MAX_BATCH), address)

    def make():
        from benchmarks import common

        checkpoint = common.random_checkpoint(common.sized(model), common.device(device, threads))
        return common.engine(checkpoint, "fp8" if fp8 else "graph", MAX_BATCH)

    return server.serve(make, address)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    roles = {"serve": serve, "load": lambda **options: print(json.dumps(load(**options)), flush=True)}
    if argv and argv[0] in roles:
        return roles[argv[0]](**json.loads(argv[1])) or 0
    from benchmarks import common

    parser = common.parser("fleet", __doc__, (*common.MODELS, "still"))
    parser.add_argument(
        "--robots", metavar="A:B", help="where to begin and end the search (default: GPU 8:32, CPU 1:16)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="a trial, after warm-up (default: 10)")
    parser.add_argument("--fp8", action="store_true", help="weights and activations of the model in fp8")
    parser.add_argument("--delay-ms", type=float, default=50.0, help="of model `still` (default: 50)")
    given = parser.parse_args(argv)
    place = common.device(given.device, given.threads)
    low, _, high = (given.robots or ("8:32" if place.type == "cuda" else "1:16")).partition(":")
    rows: list[dict] = []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    options = {
        "device": given.device,
        "threads": given.threads,
        "fp8": given.fp8,
        "delay_s": given.delay_ms / 1e3,
    }
    with Peer("benchmarks.fleet", "serve", model=given.model, address=address, **options) as server:

        def passes(robots: int) -> bool:
            rows.append(trial(address, robots, given.seconds))
            print(
                f"{robots} robots: p99 {rows[-1]['p99_ms']} ms, {'ok' if rows[-1]['passed'] else 'too many'}"
            )
            return rows[-1]["passed"]

        most = largest(int(low), int(high or low), passes)
    rows.sort(key=lambda row: row["robots"])
    report = common.header(
        "fleet", common.device(given.device, given.threads), model=given.model, fp8=given.fp8
    )
    report |= {"server": server.said.strip(), "seconds": given.seconds, "largest_fleet": most, "rows": rows}
    common.show(f"Robots at {RATE_HZ:g} actions/s, {REPLAN_AFTER} of 14, on {given.model}", rows, TITLES)
    beyond = "; the range tried ends there" if most == int(high or low) else ""
    print(f"largest fleet with p99 at most {P99_MS:g} ms and no starved tick: {most}{beyond}")
    common.write_json(given.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
