import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


FLAKY = """
import pytest

pytestmark = pytest.mark.live
runs = []


@pytest.fixture(autouse=True)
def meter(request):
    meter = request.config.stall_meter
    meter.stall = 0.0

    def worst_s(since):
        stall, meter.stall = meter.stall, 0.0
        return stall

    meter.worst_s = worst_s
    return meter


@pytest.mark.parametrize(("name", "failures", "stall"), [
    ("rare", 1, 0.0), ("broken", 9, 0.0), ("stalled", 3, 0.1), ("ever_stalled", 9, 0.1),
])
def test_it(name, failures, stall, meter):
    runs.append(name)
    meter.stall = stall
    assert runs.count(name) > failures, f"{name} {runs.count(name)}"


def test_runs():
    assert [runs.count(n) for n in ("rare", "broken", "stalled", "ever_stalled")] == [2, 2, 4, 4]
"""


def test_a_failure_without_a_stall_is_tried_once_more_and_told_of(tmp_path):
    (tmp_path / "test_flaky.py").write_text(FLAKY)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "2 failed, 3 passed, 6 warnings" in done.stdout, done.stdout + done.stderr
    told = done.stdout.partition("failed once without a stall: ")[2]
    assert told.startswith("test_flaky.py::test_it[rare-") and "rare 1" in told
    assert "failed once" not in told
