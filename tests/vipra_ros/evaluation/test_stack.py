"""One command evaluates the whole stack, through a reflex, a server's death and Ctrl-C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from config.loading import load
from config.task import Task
from simulation.control import SimulationControl
from simulation.lockstep import judge_for
from simulation.tasks.score import things_in
from simulation.tasks.trial import make_trial
from vipra_ros.evaluation.compare import compare
from vipra_ros.evaluation.ledger import Holds, Key, Ledger
from vipra_ros.process import wait_for

pytestmark = pytest.mark.live

LIMIT_S = 1.5
TRIALS = [Key("unseen", seed) for seed in (3, 4, 5)]


class Evaluation:
    """`vipra evaluate --live` in a process of its own; `left` are those it started that still live."""

    def __init__(self, out: Path):
        self.marker = f"VIPRA_TEST_{uuid.uuid4().hex}"
        self.log = out.with_suffix(".log")
        argv = [sys.executable, "-m", "vipra_ros.cli", "evaluate", "stack_cups", "--live"]
        argv += ["--policy", "vipra_tiny_single", "--seeds", "3:6", "--split", "unseen"]
        argv += ["--time-limit", str(LIMIT_S), "--out", str(out)]
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                argv, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, self.marker: "1"}
            )

    def left(self) -> dict[int, str]:
        """Command lines by process."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.marker.encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().decode()
        return found

    def wait(self, path: Path) -> None:
        wait_for(lambda: path.exists() or self.process.poll() is not None, 300, path.name, poll_s=0.01)
        assert self.process.poll() is None, self.log.read_text()


@pytest.fixture
def evaluation(tmp_path):
    started = Evaluation(tmp_path / "out")
    yield started
    for pid in started.left():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.process.wait()


@pytest.mark.timeout(900)  # a busy machine takes minutes to start two policy servers
def test_trials_on_the_whole_stack_survive_a_reflex_their_server_and_an_interrupt(evaluation, tmp_path):
    out = tmp_path / "out"
    trials = out / "trials"
    evaluation.wait(trials / "unseen-0003.mp4")
    wait_for(lambda: any('"sent"' in log.read_text() for log in out.glob("logs/*/*.jsonl")), 300, "a chunk")
    (simulator,) = (words.split("\0") for words in evaluation.left().values() if "simulation.server" in words)
    with contextlib.closing(SimulationControl(simulator[simulator.index("--name") + 1])) as control:
        control.fault("right", "reflex")
    evaluation.wait(trials / "unseen-0004.mp4")  # set up by arms that had to recover
    (server,) = (pid for pid, words in evaluation.left().items() if "policy_server.server" in words)
    os.kill(server, signal.SIGKILL)
    evaluation.wait(trials / "unseen-0004.json")
    evaluation.process.send_signal(signal.SIGINT)
    assert evaluation.process.wait(200) == 130
    said = evaluation.log.read_text()
    assert "interrupted" in said and "0 of 2 succeeded" in said
    wait_for(lambda: not evaluation.left(), 10, "all processes gone")

    report = json.loads((out / "report.json").read_text())
    first, second = report["trials"]
    assert first["seed"] == 3 and not first["success"] and first["interventions"] >= 1
    assert first["ended"].startswith("stopped: arms FAULT") and "reflex" in first["ended"]
    poor = second["ended"].startswith("stopped") and second["interventions"]  # its chunks may jump
    assert second["seed"] == 4 and (second["ended"] == "time limit" or poor)
    reasons = [void["reason"] for void in report["voids"] if void["seed"] == 4]
    assert any("policy_server ended by itself (signal SIGKILL)" in reason for reason in reasons)
    assert Ledger(out, report["settings"]).missing(TRIALS) == TRIALS[2:]
    assert "trials/unseen-0004.mp4" in (out / "report.html").read_text()
    assert compare(out, out).p == 1.0 and compare(out, out).trials == 2

    home = [0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398]
    for number, key in enumerate(TRIALS[:2]):
        trial, result = make_trial(load(Task, "stack_cups"), key.seed, key.split), report["trials"][number]
        assert result["instruction"] == trial.instruction and result["chunks"] > 0
        assert result["seconds"] > 0.1 and 0 < result["real_time_factor"] < 1.5
        with np.load(trials / f"{key}.npz") as played:
            assert np.abs(played["state"][0, 0, :7] - home).max() < 0.05 and played["state"][0, 0, 7] > 0.9
            wanted = [prop.xy for prop in trial.workcell.props]
            assert np.abs(played["poses"][0, :, :2] - wanted).max() < 0.005
            assert played["commanded"].shape == played["state"].shape
            assert np.abs(played["commanded"] - played["state"])[..., :7].max() < 0.2
        with av.open(str(trials / f"{key}.mp4")) as video:
            picture = next(video.decode(video=0)).to_ndarray(format="rgb24")
        for prop in trial.workcell.props:  # its colour is in the picture
            assert coloured(picture, prop.rgb) > 300, prop.rgb


def coloured(picture: np.ndarray, rgb: tuple[float, float, float]) -> int:
    """Pixels [h, w, 3] uint8 of this hue that are no wood."""
    wanted = cv2.cvtColor(np.array([[rgb]], np.float32), cv2.COLOR_RGB2HSV)[0, 0, 0]
    hue, saturation, _ = np.moveaxis(cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV), -1, 0)
    return int(((np.abs((hue - wanted + 180) % 360 - 180) < 20) & (saturation > 0.6)).sum())


def test_truth_of_a_stacked_cup_is_a_success():
    trial = make_trial(load(Task, "stack_cups"), 0)
    judge, top = judge_for(trial), trial.workcell.table.centre_xyz[2]
    still = {"quaternion": [1.0, 0.0, 0.0, 0.0], "velocity": [0.0] * 6}
    objects = {prop.name: {"position": [*prop.xy, top], **still} for prop in trial.workcell.props}
    judge.update(0.0, things_in({"objects": objects}), {"right": np.array([0.3, 0.0, top + 0.5])})
    assert not judge.success and not judge.partial
    moved, target = (objects[trial.task.named(role)] for role in ("moved", "target"))
    moved["position"] = [*target["position"][:2], top + 0.05]
    for time_s in (1.0, 1.6):
        judge.update(time_s, things_in({"objects": objects}), {"right": np.array([0.3, 0.0, top + 0.5])})
    assert judge.success and judge.partial and judge.success_s == 1.6


def test_only_holds_of_the_safety_checks_count():
    holds = Holds()
    for state, code in (
        *(("RUNNING", ""), ("HOLDING", "starved"), ("RUNNING", ""), ("HOLDING", "workspace")),
        *(("HOLDING", "workspace"), ("HOLDING", "let_go"), ("IDLE", ""), ("HOLDING", "tracking")),
    ):
        holds.see(state, code)
    assert holds.count == 2
