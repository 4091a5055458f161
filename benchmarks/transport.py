"""What the policy server's transport costs beyond inference, on localhost, each peer in a process of its own.

    python -m benchmarks.transport --json transport.json

Two raw 256x256x3 frames in, 14x16 float32 out. `overhead` asks a policy that computes nothing, alternating
with a plain ZeroMQ REP socket that receives and sends the same bytes and does nothing else, so that both see
the same machine. The rest: several clients at once, ping while an inference runs, two robots on one slow
policy, and how long a robot is without chunks when the server is killed and started again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import zmq
from rich.console import Console
from rich.table import Table

from config.embodiment import Embodiment
from config.loading import load
from policy_server.client import PolicyClient
from policy_server.protocol import Error, Limits, Metadata, pack_array
from policy_server.scheduler import Request, Result
from policy_server.server import serve

SIZE = (256, 256)
FRAMES = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
TASK = "stack the red cup on the blue cup"


class Still:
    """A policy that takes `delay_s` and computes nothing."""

    def __init__(self, delay_s: float):
        body = load(Embodiment, "franka_bimanual")
        bound = (0.0,) * body.action_dim
        self.delay_s, self.max_batch = delay_s, 8
        self.metadata = Metadata.describe(
            body,
            model="still",
            parameters=0,
            checkpoint="none",
            image_size=SIZE,
            needs_state=False,
            limits=Limits(action_low=bound, action_high=bound),
        )
        self.result = Result(np.zeros((body.horizon, body.action_dim), np.float32))

    def warm_up(self) -> float:
        return self.delay_s * 1e3

    def infer(self, requests: list[Request]) -> list[Result]:
        if self.delay_s:
            time.sleep(self.delay_s)
        return [self.result] * len(requests)

    def prefetch(self, task: str, image: np.ndarray) -> None:
        pass


def plain_rep(address: str) -> None:
    """The peer: a REP socket that unpacks the frames and answers with actions."""
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(address)
    print("ready", flush=True)
    actions = np.zeros((14, 16), np.float32)
    while True:
        request = msgpack.unpackb(socket.recv())
        images = np.frombuffer(request["images"], np.uint8).reshape(request["shape"])
        socket.send(msgpack.packb({"seq": request["seq"], "n": len(images), "actions": actions.tobytes()}))


class Peer:
    """This file in another process, ready to answer; killed at the end."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "benchmarks.transport", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Peer":
        line = self.process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError(f"a peer did not start: {self.process.args}")
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self) -> list[float]:
        """Let a client process run; its latencies, ms."""
        return json.loads(self.process.stdout.readline())


def percentiles(values_ms: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values_ms, (50, 95, 99))
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "n": len(values_ms)}


def asked(client: PolicyClient, count: int) -> list[float]:
    """Latencies of `count` requests one after the other, ms."""
    latencies = []
    for seed in range(count):
        start = time.perf_counter()
        client.infer(FRAMES, TASK, seed=seed)
        latencies.append((time.perf_counter() - start) * 1e3)
    return latencies


def overhead(host: str, rounds: int) -> dict:
    ours, jpeg, plain = [], [], []
    with (
        Peer("--serve", f"tcp://{host}:47001", "--delay", "0"),
        Peer("--rep", f"tcp://{host}:47002"),
        PolicyClient(f"tcp://{host}:47001") as client,
        PolicyClient(f"tcp://{host}:47001", jpeg_quality=90) as compressed,
        zmq.Context() as context,
        context.socket(zmq.REQ) as socket,
    ):
        client.hello()
        compressed.hello()
        socket.connect(f"tcp://{host}:47002")

        def ask_plain(count: int) -> list[float]:
            latencies = []
            for seq in range(count):
                start = time.perf_counter()
                # the same work: build, send, receive, unpack
                request = {
                    "seq": seq,
                    "task": TASK,
                    "shape": FRAMES.shape,
                    "images": pack_array(FRAMES)["data"],
                }
                socket.send(msgpack.packb(request), copy=False)
                reply = msgpack.unpackb(socket.recv())
                np.frombuffer(reply["actions"], np.float32).reshape(14, 16)
                latencies.append((time.perf_counter() - start) * 1e3)
            return latencies

        for _ in range(rounds + 1):
            ours.append(asked(client, 100))
            plain.append(ask_plain(100))
            jpeg.append(asked(compressed, 10))
    # the first round warms up
    ours, plain, jpeg = (
        percentiles([v for part in parts[1:] for v in part]) for parts in (ours, plain, jpeg)
    )
    return {
        "vipra": ours,
        "plain_rep": plain,
        "vipra_jpeg": jpeg,
        "ratio_p50": round(ours["p50"] / plain["p50"], 3),
    }


def many(host: str, counts: tuple[int, ...], requests: int) -> dict:
    """Client processes at once, each in closed loop."""
    report = {}
    address = f"tcp://{host}:47003"
    for count in counts:
        with Peer("--serve", address, "--delay", "0"):
            clients = [Peer("--ask", address, "--requests", str(requests)).__enter__() for _ in range(count)]
            for client in clients:
                client.process.stdin.write("go\n")
                client.process.stdin.flush()
            latencies = [value for client in clients for value in client.finish()]
            for client in clients:
                client.__exit__()
        report[str(count)] = percentiles(latencies)
    return report


def busy(host: str, seconds: float) -> dict:
    """Pings while a 500 ms inference runs all the time."""
    address = f"tcp://{host}:47004"
    stop = threading.Event()
    with Peer("--serve", address, "--delay", "0.5"), PolicyClient(address) as pinger:
        pinger.hello()

        def keep_busy():
            with PolicyClient(address) as client:
                client.hello()
                while not stop.is_set():
                    client.infer(FRAMES, TASK)

        thread = threading.Thread(target=keep_busy)
        thread.start()
        while pinger.stats().running == 0:
            time.sleep(0.01)
        pings, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            pings.append(pinger.ping() * 1e3)
            time.sleep(0.005)
        chunks = pinger.stats().counts["chunk"]
        stop.set()
        thread.join()
    return percentiles(pings) | {"chunks_meanwhile": chunks}


def shared(host: str, rounds: int) -> dict:
    """Two client processes in closed loop on a 500 ms policy that takes batches."""
    address = f"tcp://{host}:47005"
    with Peer("--serve", address, "--delay", "0.5"), PolicyClient(address) as watcher:
        watcher.hello(10.0)
        alone = asked(watcher, 2)
        clients = [Peer("--ask", address, "--requests", str(rounds)).__enter__() for _ in range(2)]
        for client in clients:
            client.process.stdin.write("go\n")
            client.process.stdin.flush()
        latencies = [client.finish() for client in clients]
        for client in clients:
            client.__exit__()
        batches = watcher.stats().batches
    means = [round(statistics.mean(part), 1) for part in latencies]
    return {"alone_ms": round(statistics.mean(alone), 1), "mean_ms": means, "batches": batches}


def restart(host: str, times: int) -> dict:
    """Kill the server, start it again: when the loss is noticed, and when chunks flow after it listens."""
    address = f"tcp://{host}:47006"
    noticed, recovered = [], []
    with PolicyClient(address, timeout_s=10.0) as client:
        for _ in range(times):
            with Peer("--serve", address, "--delay", "0.5") as server:
                client.hello(10.0)
                client.submit(FRAMES, TASK, 0.0)
                time.sleep(0.05)
                start = time.perf_counter()
                server.process.kill()
                (lost,) = client.poll(10.0)
                if not isinstance(lost, Error) or lost.code != "disconnected":
                    raise RuntimeError(f"a killed server gave {lost}")
                noticed.append((time.perf_counter() - start) * 1e3)
            with Peer("--serve", address, "--delay", "0"):
                start = time.perf_counter()
                client.hello(10.0)
                client.infer(FRAMES, TASK)
                recovered.append((time.perf_counter() - start) * 1e3)
    return {
        "loss_noticed_ms": round(statistics.median(noticed), 1),
        "first_chunk_after_ready_ms": round(statistics.median(recovered), 1),
        "worst_ms": round(max(recovered), 1),
        "n": times,
    }


def ask(address: str, requests: int) -> None:
    """A client process: hello, wait for the word, ask, print latencies."""
    with PolicyClient(address, timeout_s=10.0) as client:
        client.hello(10.0)
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(asked(client, requests)), flush=True)
        sys.stdin.readline()


def tables(report: dict) -> Table:
    table = Table(title="Policy server transport, localhost, 2 x 256x256x3 uint8 in, 14x16 float32 out")
    for column in ("what", "p50 ms", "p95 ms", "p99 ms", "n"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def row(name: str, values: dict) -> None:
        table.add_row(name, *(f"{values[key]:.2f}" for key in ("p50", "p95", "p99")), str(values["n"]))

    row("zero-compute policy", report["overhead"]["vipra"])
    row("plain ZeroMQ REP", report["overhead"]["plain_rep"])
    row("zero-compute policy, JPEG 90 (noise: worst case)", report["overhead"]["vipra_jpeg"])
    for count, values in report["clients"].items():
        row(f"{count} client(s) at once", values)
    row("ping while a 500 ms inference runs", report["ping_while_busy"])
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--host", default="127.0.0.1", help="loopback address to use (ports 47001 to 47006)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--delay", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--rep", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=100, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        return serve(Still(arguments.delay), arguments.serve)
    if arguments.rep:
        plain_rep(arguments.rep)
    if arguments.ask:
        ask(arguments.ask, arguments.requests)
        return 0
    quick, host = arguments.quick, arguments.host
    report = {
        "machine": {
            "cpus": os.cpu_count(),
            "load_1min": os.getloadavg()[0],
            "processor": platform.processor(),
        },
        "versions": {"python": platform.python_version(), "pyzmq": zmq.__version__, "zmq": zmq.zmq_version()},
        "overhead": overhead(host, 1 if quick else 10),
        "clients": many(host, (1, 2) if quick else (1, 2, 4, 8), 20 if quick else 200),
        "ping_while_busy": busy(host, 1.0 if quick else 5.0),
        "two_robots_500ms": shared(host, 2 if quick else 6),
        "restart": restart(host, 1 if quick else 5),
    }
    console = Console()
    console.print(tables(report))
    two, again = report["two_robots_500ms"], report["restart"]
    console.print(f"ours / plain REP, p50: {report['overhead']['ratio_p50']:.2f}")
    console.print(f"two robots on a 500 ms policy: {two['mean_ms']} ms each, alone {two['alone_ms']} ms")
    console.print(
        f"server killed and restarted: noticed in {again['loss_noticed_ms']} ms, "
        f"first chunk {again['first_chunk_after_ready_ms']} ms after ready (worst {again['worst_ms']} ms)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
