"""Lockstep trials repeat to the bit, survive their server's death, and are safe from torch.

MuJoCo renders, so everything runs in processes of its own.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot
from policy_server import protocol
from policy_server.client import Mismatch
from vipra_ros.evaluate import _digest_of, _policy_digest
from vipra_ros.evaluation.ledger import EvaluationError, Key, Ledger, Void
from vipra_ros.evaluation.lockstep import Waiting
from vipra_ros.evaluation.server import Server
from vipra_ros.process import free_port

# Seed 1 after seed 0, then alone on a new stage: the shipped policy, its own server.
REPEAT = """
import sys
from pathlib import Path
import simulation.render
from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot
from config.task import Task
from simulation.tasks.trial import make_trial
from vipra_ros.evaluate import CACHE, policy_of
from vipra_ros.evaluation.ledger import Ledger
from vipra_ros.evaluation.lockstep import Stage, Waiting, play_policy
from vipra_ros.evaluation.server import Server
out = Path(sys.argv[1])
robot, task = load(Robot, "sim_single"), load(Task, "stack_cups")
out.mkdir()
server = Server("vipra_tiny_single", load(Embodiment, robot.embodiment), out)
server.start()
try:
    for folder, seeds in (("first", (0, 1)), ("second", (1,))):
        stage, ledger = Stage(robot, CACHE), Ledger(out / folder, {})
        for seed in seeds:
            policy = policy_of(robot, None, 150.0).model_copy(update={"seed": seed})
            trial = make_trial(task, seed)
            client = Waiting(server.client, server.check)
            ledger.write(play_policy(stage, trial, ledger, client, policy, 1.5, seed == 0))
        stage.close()
finally:
    server.stop()
assert "torch" not in sys.modules
"""
# A stand-in server is killed before the first attempt at a trial and started again by the repair.
DEATH = """
import sys
from pathlib import Path
import simulation.render
from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot
from config.task import Task
from simulation.tasks.trial import make_trial
from vipra_ros.evaluate import CACHE, policy_of
from vipra_ros.evaluation.ledger import Key, Ledger, run_trials
from vipra_ros.evaluation.lockstep import Stage, Waiting, play_policy
from vipra_ros.evaluation.server import Server
from vipra_ros.process import Child
out, address = Path(sys.argv[1]), sys.argv[2]
robot, task = load(Robot, "sim_single"), load(Task, "stack_cups")
out.mkdir()
argv = [sys.executable, "-m", "tests.vipra_ros.serve_moves", address, "0.0", robot.embodiment]
children = [Child("moves", argv, out / "moves.log")]
server = Server(address, load(Embodiment, robot.embodiment), out)
server.start()
stage, ledger = Stage(robot, CACHE), Ledger(out, {})

def play(key):
    if key.seed == 1 and len(children) == 1:
        children[0].stop(0.1, 0.1)
    policy = policy_of(robot, "7hz", 100.0)
    client = Waiting(server.client, server.check)
    return play_policy(stage, make_trial(task, key.seed), ledger, client, policy, 2.0, True)

def repair():
    children.append(Child("moves", argv, out / "moves_again.log"))
    server.start()

try:
    run_trials(ledger, [Key("seen", 0), Key("seen", 1)], play, repair)
finally:
    server.stop()
    children[-1].stop()
    stage.close()
"""


def script(text, *arguments):
    done = subprocess.run([sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_seed_gives_the_same_trajectory_to_the_bit_whatever_ran_before(tmp_path):
    script(REPEAT, tmp_path / "out")
    ledgers = [Ledger(tmp_path / "out" / folder, {}) for folder in ("first", "second")]
    key = Key("seen", 1)
    one, two = (np.load(ledger.file(key, ".npz")) for ledger in ledgers)
    assert set(one.files) == set(two.files) and all(
        np.array_equal(one[name], two[name]) for name in one.files
    )
    assert len(one["time_s"]) >= 22 and np.ptp(one["state"][:, 0, :7], axis=0).max() > 0.01  # it moves
    results = [{r.key: r for r in ledger.results()} for ledger in ledgers]
    assert results[0][key] == results[1][key] and results[0][key].chunks >= 2
    assert ledgers[0].file(Key("seen", 0), ".mp4").stat().st_size > 1000
    assert not ledgers[0].file(key, ".mp4").exists() and ledgers[0].file(key, ".jpg").exists()


def test_a_trial_whose_server_is_killed_is_void_and_repeated(tmp_path):
    out = tmp_path / "out"
    script(DEATH, out, f"tcp://127.0.0.1:{free_port()}")
    ledger = Ledger(out, {})
    assert [(r.seed, r.ended) for r in ledger.results()] == [(0, "time limit"), (1, "time limit")]
    assert not any(r.interventions for r in ledger.results()), "waiting for the next chunk is none"
    (void,) = ledger.voids()
    assert void["seed"] == 1 and "the policy server is gone" in void["reason"]
    state = np.load(ledger.file(Key("seen", 1), ".npz"))["state"]
    assert state[-1, 0, 0] - state[0, 0, 0] == pytest.approx(0.002 * 13, abs=0.004)  # one chunk of 14 actions


class Answering:
    """A client whose server answers every request with `outcome`."""

    def __init__(self, metadata, outcome=None):
        self.metadata, self._outcome = metadata, outcome

    def hello(self, timeout_s):
        return self.metadata

    def submit(self, *_, **__):
        return self._outcome.seq

    def poll(self, timeout_s):
        return [self._outcome]


def test_a_trial_that_another_checkpoint_would_play_is_not_begun(tmp_path):
    server = Server("tcp://127.0.0.1:1", load(Embodiment, "franka_single"), tmp_path)
    server.metadata = SimpleNamespace(model="vipra_sim", checkpoint="aaaa")
    server.client = Answering(SimpleNamespace(model="vipra_sim", checkpoint="bbbb"))
    with pytest.raises(EvaluationError, match="now has checkpoint 'bbbb', this evaluation's is 'aaaa'"):
        Waiting(server.client, server.check).hello()
    server.client.metadata = server.metadata
    assert Waiting(server.client, server.check).hello().checkpoint == "aaaa"


def test_a_server_that_fails_voids_the_trial_and_a_chunk_of_nonsense_does_not():
    failed = protocol.Error(seq=3, code="inference_failed", message="out of memory")
    with pytest.raises(Void, match="the policy server fails: out of memory"):
        Waiting(Answering(None, failed)).submit()
    nonsense = protocol.Error(seq=3, code="non_finite", message="NaN")
    client = Waiting(Answering(None, nonsense))
    assert client.submit() == 3 and client.poll() == [nonsense]


@pytest.mark.parametrize("code", ["busy", "expired", "internal", "not_ready", "timeout"])
def test_a_server_that_does_not_answer_is_not_scored_as_the_policy(code):
    with pytest.raises(Void, match="the policy server "):
        Waiting(Answering(None, protocol.Error(code=code, message="why", seq=3))).submit()


def test_a_server_started_again_with_another_robots_policy_ends_the_evaluation():
    class Other:
        def hello(self, timeout_s):
            raise Mismatch(["embodiment is a, the robot's is b"])

    with pytest.raises(EvaluationError, match="does not fit this robot: embodiment is a"):
        Waiting(Other()).hello()


def test_a_robot_or_a_policy_file_that_was_edited_is_another_evaluation(tmp_path):
    robot = load(Robot, "sim_single")
    camera = robot.camera.model_copy(update={"rate_hz": 15})
    assert _digest_of(robot) == _digest_of(load(Robot, "sim_single"))
    assert _digest_of(robot) != _digest_of(robot.model_copy(update={"camera": camera}))
    file = tmp_path / "mine.yaml"
    digests = []
    for noise in (1.0, 0.0, 1.0):
        file.write_text(f"checkpoint: {tmp_path}\nnoise_scale: {noise}\n")
        digests.append(_policy_digest(str(file)))
    assert digests[0] == digests[2] != digests[1]
    assert _policy_digest("tcp://gpu:5555") == ""


def test_the_expert_is_evaluated_by_the_command(tmp_path):
    argv = [sys.executable, "-m", "vipra_ros.cli", "evaluate", "pick_place", "--policy", "expert"]
    argv += ["--seeds", "0:1", "--split", "unseen", "--no-video", "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 1 succeeded" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (trial,) = report["trials"]
    assert trial["success"] and trial["partial"] and trial["split"] == "unseen" and trial["seconds"] < 30
    assert report["success_rate"] == 1.0 and report["interval95"] == [0.025, 1.0]
    assert -4 < trial["spectral_arc_length"] < -1 and 0 < trial["jerk_rms"] < 100
    again = subprocess.run(argv, capture_output=True, text=True)  # nothing is played twice
    assert again.returncode == 0 and "success after" not in again.stdout
    other = subprocess.run([*argv, "--time-limit", "20"], capture_output=True, text=True)
    assert other.returncode == 1 and "time_limit_s 30.0, not 20.0" in other.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["stack_cups", "--policy", "expert", "--out", "x"], "--seeds is missing"),
        (["--policy", "expert", "--seeds", "0:1", "--out", "x"], "TASK is missing"),
        (
            ["stack_cups", "--live", "--policy", "expert", "--seeds", "0:1", "--out", "x"],
            "lockstep simulation only",
        ),
    ],
)
def test_what_is_missing_is_named(argv, said, capsys):
    from vipra_ros.evaluate import main

    with pytest.raises(SystemExit):
        main(argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seeds", "5:5"], "'5:5' is not A:B"),
        (["--seeds", "0:1", "--time-limit", "0"], "time limit 0 s: must be above 0"),
        (
            ["--seeds", "0:1", "--robot", "sim_bimanual"],
            "sim_bimanual has workcell bimanual: stack_cups needs",
        ),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(more, said, tmp_path):
    argv = [sys.executable, "-m", "vipra_ros.cli", "evaluate", "stack_cups", "--policy", "nobody"]
    done = subprocess.run([*argv, "--out", str(tmp_path / "x"), *more], capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / "x").exists()
