"""The demo works from one command, or says why it did not, and leaves nothing running."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import av
import pytest

from simulation.control import SimulationControl
from vipra_ros.demo import Settings
from vipra_ros.process import wait_for

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
KEYS = {
    *("control_ticks", "late_ticks", "starved_ticks", "chunk_latency_ms", "tracking_error_rad"),
    *("arm_skew_ms_p99", "interventions", "faults", "limit_violations_1khz", "real_time_factor"),
    *("frames_per_second", "versions"),
}


class Demo:
    """`vipra demo` as its own process; `left` are the pids of everything it started that still lives."""

    def __init__(self, out, *options):
        self.out, self.marker = out, f"VIPRA_TEST_{uuid.uuid4().hex}"
        self.log = out.with_suffix(".log")
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vipra_ros.cli", "demo", "--out", str(out), *options],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, self.marker: "1"},
            )

    def left(self):
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.marker.encode() in (path / "environ").read_bytes():
                    found.append((int(path.name), (path / "cmdline").read_bytes().decode()))
            except OSError:
                continue
        return found

    def said(self):
        return self.log.read_text()


@pytest.fixture
def demo(tmp_path):
    started = []

    def start(*options):
        started.append(Demo(tmp_path / f"demo{len(started)}", *options))
        return started[-1]

    yield start
    for one in started:
        for pid, _ in one.left():
            with contextlib.suppress(ProcessLookupError):  # it was ending
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (None, ("asynchronous", "observation", 10.0, 7, 0.0, "vipra_tiny_bimanual")),
        ("7hz", ("synchronous", "observation", 15.0, 14, 2.0, "vipra_tiny_bimanual")),
        ("22hz", ("asynchronous", "append", 22.0, 14, 0.0, "vipra_tiny_bimanual_relative")),
    ],
)
def test_a_preset_decides_the_schedule_and_the_policy_that_fits(preset, expected):
    settings = Settings(rate_hz=10.0).following(preset, policy=None)
    fields = ("mode", "anchor", "rate_hz", "replan_after", "min_cycle_s", "policy")
    assert tuple(getattr(settings, name) for name in fields) == expected
    assert settings.following(preset, policy="mine").policy == "mine"


def test_demo_runs_both_arms_and_reports(demo):
    run = demo("--duration", "4", "--rate", "10")
    status = run.process.wait(200)
    assert status == 0, run.said()
    report = json.loads((run.out / "report.json").read_text())
    assert set(report) == KEYS
    assert report["control_ticks"] > 0.8 * 4 * 200
    assert report["faults"] == [] and report["limit_violations_1khz"] == 0
    assert report["chunk_latency_ms"]["p50"] > 0
    with av.open(str(run.out / "front_camera.mp4")) as video:
        frames = sum(1 for _ in video.decode(video=0))
    assert frames > 20
    page = (run.out / "report.html").read_text()
    assert "worked" in page and "data:image/png" in page and "data:image/jpeg" in page
    assert (run.out / "joints.png").stat().st_size > 20_000
    assert run.left() == []


def test_interrupt_stops_everything(demo):
    run = demo("--duration", "60")
    wait_for(lambda: "time left" in run.said() or run.process.poll() is not None, 120, "demo running")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(40) == 130, run.said()
    assert "no report" in run.said()
    wait_for(lambda: not run.left(), 10, "all processes gone")


def test_a_stall_is_recovered_and_reported(demo):
    run = demo("--duration", "4", "--rate", "10")
    wait_for(lambda: "time left" in run.said() or run.process.poll() is not None, 120, "demo running")
    assert run.process.poll() is None, run.said()
    (simulator,) = (command for _, command in run.left() if "simulation.server" in command)
    words = simulator.split("\0")
    control = SimulationControl(words[words.index("--name") + 1])
    control.fault("left", "freeze_state")
    wait_for(lambda: "too busy" in run.said(), 20, "the demo noticing")
    control.clear_fault("left")
    control.close()
    assert run.process.wait(200) == 0, run.said()
    report = json.loads((run.out / "report.json").read_text())
    assert any("no new state" in fault["reason"] for fault in report["faults"])
    assert "no new state" in (run.out / "report.html").read_text()


def test_lost_process_is_the_reason_given(demo):
    run = demo("--duration", "60")
    wait_for(lambda: "time left" in run.said() or run.process.poll() is not None, 120, "demo running")
    assert run.process.poll() is None, run.said()
    (arms,) = (pid for pid, command in run.left() if "vipra_ros.nodes.arms" in command)
    os.kill(arms, signal.SIGKILL)
    assert run.process.wait(40) == 1
    assert "arms ended by itself (signal SIGKILL)" in run.said()
    wait_for(lambda: not run.left(), 10, "all processes gone")
