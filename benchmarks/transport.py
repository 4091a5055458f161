"""What the policy server's transport costs beyond inference, on localhost, each peer in a process of its own.

    python -m benchmarks.transport --json transport.json

Two raw 256x256x3 frames in, 14x16 float32 out, a policy that computes nothing. `overhead` alternates with a
plain ZeroMQ REP socket that receives and sends the same bytes and does nothing else, so that both see the
same machine. The rest: 1 to 8 clients at once, ping while an inference runs, two robots on one slow policy,
and how long robots are without chunks when the server is killed and started again.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import zmq

from benchmarks.peers import Peer, ready, together
from benchmarks.standin import StandIn
from policy_server.client import PolicyClient
from policy_server.protocol import Error, pack_array
from policy_server.server import serve

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
TASK = "stack the red cup on the blue cup"
ROBOTS = 4  # that a restart is measured with
TITLES = {"what": "what", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "max_ms": "max ms", "n": "n"}


# --- Peers


def stand_in(address: str, delay_s: float = 0.0) -> int:
    return serve(StandIn("franka_bimanual", delay_s, max_batch=8), address)


def plain_rep(address: str) -> None:
    """A REP socket that unpacks the frames and answers with actions."""
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(address)
    print("ready", flush=True)
    actions = np.zeros((14, 16), np.float32)
    while True:
        request = msgpack.unpackb(socket.recv())
        images = np.frombuffer(request["images"], np.uint8).reshape(request["shape"])
        socket.send(msgpack.packb({"seq": request["seq"], "n": len(images), "actions": actions.tobytes()}))


def ask(address: str, requests: int) -> None:
    """Closed loop; prints the latencies, ms."""
    with PolicyClient(address, timeout_s=10.0) as client:
        client.hello(10.0)
        ready()
        print(json.dumps(asked(client, requests)), flush=True)


def server(address: str, delay_s: float = 0.0) -> Peer:
    return Peer("benchmarks.transport", "serve", address=address, delay_s=delay_s)


def clients(address: str, count: int, requests: int) -> list[list[float]]:
    """Latencies of `count` client processes at once."""
    return together(
        [Peer("benchmarks.transport", "ask", address=address, requests=requests) for _ in range(count)]
    )


# --- Measurements


def percentiles(values_ms: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values_ms, (50, 99))
    return {
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "max_ms": round(max(values_ms), 3),
        "n": len(values_ms),
    }


def asked(client: PolicyClient, count: int) -> list[float]:
    """Latencies of `count` requests one after the other, ms."""
    latencies = []
    for seed in range(count):
        start = time.perf_counter()
        client.infer(FRAMES, TASK, seed=seed)
        latencies.append((time.perf_counter() - start) * 1e3)
    return latencies


def asked_plain(socket: zmq.Socket, count: int) -> list[float]:
    """The same of a REP peer, with the same work: build, send, receive, unpack."""
    latencies = []
    for seq in range(count):
        start = time.perf_counter()
        images = pack_array(FRAMES)["data"]
        request = {"seq": seq, "task": TASK, "shape": FRAMES.shape, "images": images}
        socket.send(msgpack.packb(request), copy=False)
        reply = msgpack.unpackb(socket.recv())
        np.frombuffer(reply["actions"], np.float32).reshape(14, 16)
        latencies.append((time.perf_counter() - start) * 1e3)
    return latencies


def overhead(host: str, rounds: int) -> list[dict]:
    ours, jpeg, plain = [], [], []
    with (
        server(f"tcp://{host}:47001"),
        Peer("benchmarks.transport", "rep", address=f"tcp://{host}:47002"),
        PolicyClient(f"tcp://{host}:47001") as client,
        PolicyClient(f"tcp://{host}:47001", jpeg_quality=90) as compressed,
        zmq.Context() as context,
        context.socket(zmq.REQ) as socket,
    ):
        client.hello()
        compressed.hello()
        socket.connect(f"tcp://{host}:47002")
        for number in range(rounds + 1):
            parts = asked(client, 100), asked_plain(socket, 100), asked(compressed, 10)
            if number:  # the first round warms up
                for values, part in zip((ours, plain, jpeg), parts, strict=True):
                    values += part
    return [
        {"what": "zero-compute policy"} | percentiles(ours),
        {"what": "plain ZeroMQ REP"} | percentiles(plain),
        {"what": "zero-compute policy, JPEG 90 of noise"} | percentiles(jpeg),
    ]


def many(host: str, counts: tuple[int, ...], requests: int) -> list[dict]:
    """Client processes at once, each in closed loop."""
    rows, address = [], f"tcp://{host}:47003"
    for count in counts:
        with server(address):
            latencies = [value for part in clients(address, count, requests) for value in part]
        rows.append({"what": f"{count} client(s) at once"} | percentiles(latencies))
    return rows


def busy(host: str, seconds: float) -> dict:
    """Pings while a 500 ms inference runs all the time."""
    address, stop = f"tcp://{host}:47004", threading.Event()
    with server(address, 0.5), PolicyClient(address) as pinger:
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
        stop.set()
        thread.join()
    return {"what": "ping while a 500 ms inference runs"} | percentiles(pings)


def shared(host: str, rounds: int) -> dict:
    """Two client processes in closed loop on a 500 ms policy that takes batches."""
    address = f"tcp://{host}:47005"
    with server(address, 0.5), PolicyClient(address) as watcher:
        watcher.hello(10.0)
        alone = asked(watcher, 2)
        latencies = clients(address, 2, rounds)
        batches = watcher.stats().batches
    means = [round(statistics.mean(part), 1) for part in latencies]
    return {"alone_ms": round(statistics.mean(alone), 1), "mean_ms": means, "batches": batches}


def restart(host: str, times: int) -> list[dict]:
    """SIGKILL the server amid a request of each robot, start it again: who is without chunks for how long."""
    address = f"tcp://{host}:47006"
    noticed, after_ready, outage = [], [], []
    robots = [PolicyClient(address, timeout_s=10.0) for _ in range(ROBOTS)]
    try:
        for _ in range(times):
            with server(address, 0.5) as first:
                for robot in robots:
                    robot.hello(10.0)
                    robot.submit(FRAMES, TASK, 0.0)
                time.sleep(0.05)
                killed = time.perf_counter()
                first.process.kill()
                noticed += _each(robots, killed, _lost)
            with server(address):
                listens = time.perf_counter()
                back = _each(robots, listens, _answered)
                after_ready += back
                outage += [(listens - killed) * 1e3 + value for value in back]
    finally:
        for robot in robots:
            robot.close()
    return [
        {"what": f"server killed: noticed ({ROBOTS} robots)"} | percentiles(noticed),
        {"what": "started again: ready to first chunk, each robot"} | percentiles(after_ready),
        {"what": "the whole outage, with the server's own start"} | percentiles(outage),
    ]


def _each(robots: list[PolicyClient], start: float, happened) -> list[float]:
    """When it `happened` to each robot, ms after `start`."""
    at: dict[int, float] = {}
    while len(at) < len(robots):
        for number, robot in enumerate(robots):
            if number not in at and happened(robot):
                at[number] = (time.perf_counter() - start) * 1e3
        time.sleep(0.001)
    return list(at.values())


def _lost(robot: PolicyClient) -> bool:
    outcomes = robot.poll()
    if any(not isinstance(outcome, Error) or outcome.code != "disconnected" for outcome in outcomes):
        raise RuntimeError(f"a killed server gave {outcomes}")
    return bool(outcomes)


def _answered(robot: PolicyClient) -> bool:
    """Polls, and asks as soon as there is a connection."""
    outcomes = robot.poll()
    if robot.connected and not outcomes:
        robot.infer(FRAMES, TASK)
        return True
    return False


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    roles = {"serve": stand_in, "rep": plain_rep, "ask": ask}
    if argv and argv[0] in roles:
        return roles[argv[0]](**json.loads(argv[1])) or 0
    from benchmarks import common

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--host", default="127.0.0.1", help="loopback address to use (ports 47001 to 47006)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    given = parser.parse_args(argv)
    quick, host = given.quick, given.host
    rows = overhead(host, 1 if quick else 10)
    ratio = round(rows[0]["p50_ms"] / rows[1]["p50_ms"], 2)
    rows += many(host, (1, 2) if quick else (1, 2, 4, 8), 20 if quick else 200)
    rows.append(busy(host, 1.0 if quick else 5.0))
    rows += restart(host, 1 if quick else 5)
    two = shared(host, 2 if quick else 6)
    common.show("Policy server, localhost, 2 x 256x256x3 uint8 in, 14x16 float32 out", rows, TITLES)
    print(f"ours / plain REP, p50: {ratio}")
    print(f"two robots on a 500 ms policy: {two['mean_ms']} ms each, alone {two['alone_ms']} ms")
    versions = {"pyzmq": zmq.__version__, "zmq": zmq.zmq_version()}
    report = common.header("transport", **versions) | {"rows": rows, "ratio_p50": ratio, "two_robots": two}
    common.write_json(given.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
