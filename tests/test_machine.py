import os
import signal
import time

from tests.machine import StallMeter


def test_a_stall_is_seen_and_only_by_who_was_there():
    meter = StallMeter()
    try:
        deadline = time.monotonic() + 20
        began = time.monotonic()
        while meter.worst_s(began) < 0.1 and time.monotonic() < deadline:
            os.kill(meter.process.pid, signal.SIGSTOP)
            time.sleep(0.15)
            os.kill(meter.process.pid, signal.SIGCONT)
            time.sleep(0.05)
        assert meter.worst_s(began) >= 0.1
        assert meter.worst_s(time.monotonic() + 60) == 0
    finally:
        meter.close()
