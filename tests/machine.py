"""Was this machine there while a test ran? A process that only sleeps notes when it is woken late.

Tests with a simulator, 1 kHz loops and dead-men in real time fail rightly when the machine stops for 100 ms.
That says nothing about the code, so `tests/conftest.py` runs such a test again; a failure without a stall
stands.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

STALL_S = 0.015  # the shortest that can matter: an arm's state may be 20 ms old
_SCRIPT = """
import contextlib, os, sys, time
with contextlib.suppress(PermissionError):  # as the processes under test
    os.setpriority(os.PRIO_PROCESS, 0, -10)
parent = os.getppid()
with open(sys.argv[1], "w", buffering=1) as log:
    before = time.monotonic()
    while os.getppid() == parent:
        time.sleep(0.005)
        now = time.monotonic()
        if now - before > 0.005 + float(sys.argv[2]):
            log.write(f"{now} {now - before - 0.005}\\n")
        before = now
"""


class StallMeter:
    """Runs until closed. `worst_s(since)`: longest stall after `since` (CLOCK_MONOTONIC), s; 0 if none."""

    def __init__(self):
        handle, name = tempfile.mkstemp(prefix="stalls")
        os.close(handle)
        self.path = Path(name)
        self.process = subprocess.Popen([sys.executable, "-S", "-E", "-c", _SCRIPT, name, str(STALL_S)])

    def worst_s(self, since: float) -> float:
        stalls = [tuple(map(float, line.split())) for line in self.path.read_text().splitlines()]
        return max((length for end, length in stalls if end >= since), default=0.0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.path.unlink(missing_ok=True)
