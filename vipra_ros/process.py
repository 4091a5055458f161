"""Child processes that cannot outlive us, and addresses that no two runs on a machine share. Linux only.

`python -m vipra_ros.process MODULE ARGUMENTS...` runs a module that ends when its parent does.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class ProcessError(RuntimeError):
    """A supervised process died or did not get ready; the message holds the end of its log."""


def die_with_parent(sig: int = signal.SIGINT) -> None:
    """Ask the kernel to send us `sig` when our parent goes, however it goes.

    Survives exec. A launcher that is killed otherwise leaves its nodes, and so the arms, running. A signal
    that is ignored, as SIGINT in what a shell's `&` started, no longer is.
    """
    if signal.getsignal(sig) is signal.SIG_IGN:
        signal.signal(sig, signal.default_int_handler if sig == signal.SIGINT else signal.SIG_DFL)
    parent = os.getppid()
    if _LIBC.prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it went in between
        os.kill(os.getpid(), sig)


def _child_setup() -> None:
    # A shell that started us with `&` left SIGINT ignored; a child that inherits that cannot be interrupted.
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_DFL)
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)


class Child:
    """One process in a group of its own, its output in a file.

    The kernel interrupts it when the thread that started it ends: start children from the main thread.
    """

    def __init__(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None):
        self.name, self.log = name, Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as output:
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                preexec_fn=_child_setup,
            )
        self.pid = self._process.pid
        self._stopping = False

    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def tail(self, lines: int = 15) -> str:
        """The last `lines` lines of its output."""
        text = self.log.read_bytes()[-20_000:].decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    def find(self, pattern: str) -> re.Match | None:
        """First match of `pattern` (multi-line) in its output."""
        return re.search(pattern, self.log.read_bytes().decode("utf-8", "replace"), re.MULTILINE)

    def check(self) -> None:
        """Raises ProcessError when it has ended without being asked to."""
        code = self.returncode()
        if code is not None and not self._stopping:
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise ProcessError(f"{self.name} ended by itself ({cause}); end of {self.log}:\n{self.tail()}")

    def signal(self, sig: int) -> None:
        """Send `sig` to the whole group; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, sig)

    def stop(self, interrupt_s: float = 8.0, terminate_s: float = 3.0) -> int:
        """SIGINT, after `interrupt_s` SIGTERM, after another `terminate_s` SIGKILL; returns the exit status.

        Whatever the process left in its group is killed too.
        """
        self._stopping = True
        for sig, patience in (
            (signal.SIGINT, interrupt_s),
            (signal.SIGTERM, terminate_s),
            (signal.SIGKILL, None),
        ):
            if self.returncode() is not None:
                break
            self.signal(sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self.signal(signal.SIGKILL)
        return self._process.returncode


def wait_for(
    condition: Callable[[], object],
    timeout_s: float,
    what: str,
    children: Sequence[Child] = (),
    blame: Child | None = None,
    poll_s: float = 0.05,
):
    """Poll until `condition()` is true and return its value, watching that `children` live.

    Raises ProcessError naming `what` (with the end of `blame`'s log) after `timeout_s`, or when a child ends.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            tail = f"; end of {blame.log}:\n{blame.tail()}" if blame else ""
            raise ProcessError(f"{what}: not within {timeout_s:g} s{tail}")
        time.sleep(poll_s)


def stop_all(children: Sequence[Child]) -> None:
    """Stop in reverse order of start, each to its end, whatever happens to the others."""
    with contextlib.ExitStack() as stack:
        for child in children:
            stack.callback(child.stop)


@contextlib.contextmanager
def signals_raise():
    """Inside, the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that `finally` blocks run.

    Further ones are ignored until the block ends: what stops processes must get to its end.
    """

    def interrupt(number, frame):
        for sig in old:
            signal.signal(sig, signal.SIG_IGN)
        raise KeyboardInterrupt

    old = {sig: signal.signal(sig, interrupt) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for sig, handler in old.items():
            signal.signal(sig, handler)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at `host` right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def port_is_free(host: str, port: int) -> bool:
    """Whether a TCP listener could bind `host:port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def domain_is_quiet(domain: int) -> bool:
    """Whether no DDS participant on this machine listens on the discovery port of ROS domain `domain`.

    DDSI-RTPS 9.6.1.1: discovery multicast at UDP 7400 + 250 domain.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", 7400 + 250 * domain))
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Slot:
    """A ROS domain, a name and a /24 of loopback addresses that no other run on this machine has."""

    number: int
    lock: int  # open file descriptor; the reservation ends with the process, or with `release`

    @property
    def domain(self) -> int:
        return self.number

    @property
    def name(self) -> str:
        return f"vipra_{self.number}"

    def host(self, index: int) -> str:
        return f"127.99.{self.number}.{index}"

    def release(self) -> None:
        os.close(self.lock)


def reserve_slot(numbers: Iterable[int] = range(60, 102)) -> Slot:
    """Reserve a free slot; the default range stays below the ephemeral ports of Linux (ROS domains 0..101).

    Raises ProcessError when all are taken.
    """
    for number in numbers:
        path = Path(tempfile.gettempdir()) / f"vipra_slot_{number}.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:  # another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if domain_is_quiet(number):
            return Slot(number, lock)
        os.close(lock)
    raise ProcessError("every ROS domain from 60 to 101 is in use on this machine: stop another run first")


if __name__ == "__main__":
    die_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
