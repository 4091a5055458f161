"""`vipra serve`: load a policy, say what that is doing, and serve it until a signal or a fault.

    python -m policy_server.server --policy vipra_tiny_bimanual --bind tcp://127.0.0.1:5555

Exit status: 0 after a signal, 1 when the policy cannot be loaded or the server fails, 2 for wrong options, 3
when the device fails (a CUDA error): only a new process gets it back, so let a supervisor start one.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from policy_server.keys import KeyFileError
from policy_server.router import ServeError, Server
from policy_server.scheduler import DeviceFailed, Policy

log = logging.getLogger("policy_server")

DEVICE_FAILED = 3  # exit status
TELL_S = 5.0  # between log lines of a stage of start-up


class _Human(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = (f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        return " ".join((super().formatMessage(record), *fields))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(as_json: bool = False, level: int = logging.INFO) -> None:
    """Log to stderr: for people, or one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    human = _Human("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(_Json() if as_json else human)
    logging.basicConfig(handlers=[handler], level=level, force=True)


class StartUp:
    """What loading is doing: `show(stage, done, total)`, a bar each stage or, without `bars`, log lines.

    A total of a mebibyte or more is bytes. Called from the thread that loads, closed by any other.
    """

    def __init__(self, bars: bool):
        self._tasks: dict[str, int] = {}
        self._told: dict[str, float] = {}
        self._closed, self._bars = False, None
        if bars:
            columns = TextColumn("{task.description:20}"), BarColumn(), TextColumn("{task.fields[amount]}")
            console = Console(stderr=True)
            self._bars = Progress(*columns, TimeElapsedColumn(), console=console)

    def show(self, stage: str, done: int, total: int) -> None:
        amount = _amount(done, total)
        if self._closed:
            return
        if self._bars is None:
            now = time.monotonic()
            if stage not in self._told or done >= total or now - self._told[stage] >= TELL_S:
                self._told[stage] = now
                log.info(stage, extra={"fields": {"done": amount}})
            return
        if stage not in self._tasks:
            self._bars.start()
            self._tasks[stage] = self._bars.add_task(stage, total=total, amount=amount)
        self._bars.update(self._tasks[stage], completed=done, total=total, amount=amount)

    def close(self) -> None:
        """Leave what is shown as it is; later calls of `show` show nothing."""
        self._closed = True
        if self._bars is not None:
            self._bars.stop()


def _amount(done: int, total: int) -> str:
    if total < 2**20:
        return f"{done}/{total}"
    unit, size = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    return f"{done / size:.1f}/{total / size:.1f} {unit}"


def serve(
    policy: Policy | Callable[[], Policy],
    bind: str = "tcp://127.0.0.1:5555",
    keys: str | Path | None = None,
    insecure: bool = False,
    gather_ms: float | None = None,
    start_up: StartUp | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM, from the main thread; returns the exit status (see the module).

    `policy` may be a function that loads it, so that a wrong address is noticed before a long load.
    `start_up` is what that function reports to, closed when it is done. Prints one line `ready model=...
    embodiment=... device=... warm_latency_ms=... bind=...` to stdout when it answers.
    Raises ServeError and KeyFileError if it cannot listen.
    """
    load = policy if callable(policy) else lambda: policy
    # threads that compute in Python give way to the I/O thread after 1 ms instead of 5
    sys.setswitchinterval(0.001)
    finished = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: finished.set())
    with Server(load, bind, keys, insecure, gather_ms) as server:
        log.info("loading", extra={"fields": {"bind": server.endpoint}})
        announced = False
        # woken by signals at once; the short wait is only for the two events that have no signal
        while not finished.wait(0.1) and not server.stopped.is_set():
            if server.ready.is_set() and not announced:
                announced = True
                if start_up:
                    start_up.close()
                _announce(server)
        if start_up:
            start_up.close()
        log.info("stopping")
    if isinstance(server.failure, DeviceFailed):
        log.error("stopped: %s; only a new process gets the device back", _line(server.failure))
        _leave(DEVICE_FAILED)  # what is left of the device's context may hang or crash an orderly exit
    if (failure := server.failure) is not None:
        # what goes wrong before `ready` is a wrong file or a missing device: the message is enough
        trace = failure if announced or log.isEnabledFor(logging.DEBUG) else None
        log.error("stopped: %s", _line(failure), exc_info=trace)
        return 1
    log.info("stopped", extra={"fields": dict(server.record.counts)})
    if server.stuck:
        log.warning("the policy did not return in time; leaving without it")
        _leave(0)  # a thread inside the model's kernels would crash the interpreter's own shutdown
    return 0


def _line(error: BaseException) -> str:
    """An error in one line; our own messages need no type."""
    text = " ".join(str(error).split())
    ours = type(error).__module__.partition(".")[0] in ("config", "models", "policy_server")
    return text if ours and text else f"{type(error).__name__}: {text}"


def _leave(status: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _announce(server: Server) -> None:
    metadata = server.metadata
    fields = {
        "model": metadata.model,
        "embodiment": metadata.embodiment,
        "device": metadata.device.replace(" ", "_"),
        "warm_latency_ms": round(metadata.warm_latency_ms, 1),
        "parameters": metadata.parameters,
        **{f"{use}_mib": round(size / 2**20, 1) for use, size in server.memory.items()},
        "bind": server.endpoint,
    }
    print("ready", *(f"{key}={value}" for key, value in fields.items()), flush=True)
    log.info("ready", extra={"fields": fields})


def main(argv: list[str] | None = None) -> int:
    """`vipra serve`, `python -m policy_server.server`."""
    parser = argparse.ArgumentParser(
        prog="vipra serve",
        description="Serve a policy to robots over ZeroMQ. Prints a line `ready ...` when it answers.",
        epilog="Same machine:   vipra serve --policy vipra_tiny_bimanual\n"
        "Another machine: vipra keys server --out keys; vipra keys robot --out keys;\n"
        "                 vipra serve --policy vipra_7b --bind tcp://0.0.0.0:5555 --keys keys\n"
        "                 then copy keys/server.key and keys/robot.key_secret to the robot PC.\n"
        "Exit status:     0 stopped, 1 it cannot be served, 2 wrong options, 3 the GPU failed: start again",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--policy",
        required=True,
        metavar="NAME|FILE|FOLDER",
        help="file in config/policies, its path, or a checkpoint folder",
    )
    parser.add_argument(
        "--bind", default="tcp://127.0.0.1:5555", help="ZeroMQ address (default: %(default)s)"
    )
    parser.add_argument(
        "--keys",
        metavar="FOLDER",
        help="CURVE: server.key_secret is this server's, every other *.key in it a robot that may connect",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="listen to other machines without keys: anybody may ask"
    )
    parser.add_argument(
        "--gather-ms",
        type=float,
        metavar="MS",
        help="how long a batch waits for other robots seen lately (default: 2%% of the latency)",
    )
    parser.add_argument("--log-json", action="store_true", help="log JSON lines to stderr")
    parser.add_argument("--verbose", action="store_true", help="log debug messages too")
    arguments = parser.parse_args(argv)
    set_up_logging(arguments.log_json, logging.DEBUG if arguments.verbose else logging.INFO)

    from config.loading import ConfigError, load
    from config.policy import Policy as PolicyConfig

    try:
        folder = Path(arguments.policy).expanduser()
        if folder.is_dir():
            policy = PolicyConfig(checkpoint=str(folder.resolve()))
        else:
            policy = load(PolicyConfig, arguments.policy)

        start_up = StartUp(bars=sys.stderr.isatty() and not arguments.log_json)

        def load_engine() -> Policy:
            from policy_server.engine import Engine  # torch: only here, and only once the address is ours

            return Engine.from_policy(policy, start_up.show)

        return serve(
            load_engine,
            arguments.bind,
            arguments.keys,
            arguments.insecure,
            arguments.gather_ms,
            start_up,
        )
    except (ConfigError, ServeError, KeyFileError) as error:
        print(f"vipra serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
