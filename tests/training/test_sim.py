"""vipra_sim's own steps: states and pictures of trials, the gate, and what stops and goes on."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from config.dataset import DatasetConfig
from config.embodiment import Embodiment
from config.loading import load, root
from config.robot import Robot
from config.task import Task
from episodes import demonstration, layout
from episodes.writer import Writer
from simulation.lockstep import Lockstep
from simulation.tasks.trial import make_trial
from training import gate, sim_summary
from training.run import TrainingError
from training.scripted import moments, read_states
from training.seen import ABSENT, NAMES, PLACES
from training.sim import (
    FULL,
    SMALL,
    OutOfTime,
    Plan,
    attention,
    check_gate,
    checkpoints,
    choose,
    corrections,
    draft,
    evaluate,
    finetune,
    shared,
)

# MuJoCo's renderer and torch do not share a process.
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import simulation.render as render
from training.scripted import Demonstrator, film, make_trial, play, read_states, shard_path, write_shard
import numpy as np
from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot
from config.task import Task
from episodes.reader import Dataset
from policy_server.images import cut
from training.seen import ABSENT, PLACES

out, robot, body = Path(sys.argv[1]), load(Robot, "sim_single"), load(Embodiment, "franka_single_workspace")
task = load(Task, "stack_cups").model_copy(update={"time_limit_s": 1.2})
trial = make_trial(task, 100003, template=None)
played = play(trial, Demonstrator(trial), body.names)
assert np.abs(played.action[0] - played.state[0]).max() < 1e-3, "an action is the reference of its own moment"
assert np.abs(np.diff(played.action[:, :7], axis=0)).max() < 0.2
(out / "states").mkdir()
write_shard(shard_path(out / "states", "stack_cups", 100003), [played])
(again,) = read_states(out / "states")
assert np.abs(again.qpos - played.qpos).max() < 1e-4 and again.seed == 100003

again = film(out / "states", out / "videos", robot, body, Path.home() / ".cache" / "vipra_ros", workers=1)
data = Dataset(out / "videos")
assert again == len(data) == 1 and data.vectors == (PLACES,), "videos carry no actions"
frames = data.frames(0, data.cameras[0], [0, 5])
assert frames.shape == (2, 224, 224, 3) and frames.std() > 20
size = robot.camera.width, robot.camera.height
meshes = render.live_meshes(Path.home() / ".cache" / "vipra_ros")
whole = render.Painter(trial.workcell, *size, meshes)
seen = cut(whole.paint(played.qpos[5].astype(float)), body.crop).astype(int)
whole.close()
part = render.Painter(trial.workcell, *size, meshes, body.crop.of(*size[::-1]))
assert np.abs(part.paint(played.qpos[5].astype(float)) - seen).max() <= 1, "the crop, drawn alone"
assert np.abs(frames[1] - seen).mean() < 4, "and encoded"
places = data.values(0, PLACES).reshape(-1, 5, 3)[0]
assert (places[1:, 2] == ABSENT).sum() == 1 and np.abs(places[0] - played.hands[0, 0]).max() < 1e-4
again = film(out / "states", out / "videos", robot, body, Path.home() / ".cache" / "vipra_ros", workers=1)
assert again == 1 and len((out / "videos" / "trials.txt").read_text().splitlines()) == 1, "filmed once"
other = replace(played, task="stack_cups", qpos=played.qpos[:6] + 1e-3)  # a file that comes before it
cut_short = {key: getattr(other, key)[:6] for key in ("state", "action", "hands")}
write_shard(shard_path(out / "states", "stack_cups", 100001), [replace(other, seed=100001, **cut_short)])
for _ in range(2):
    again = film(out / "states", out / "videos", robot, body, Path.home() / ".cache" / "vipra_ros", workers=1)
    assert again == 2 and [row.length for row in Dataset(out / "videos").rows] == [len(played.qpos), 6]
none = film(
    out / "states", out / "acts", robot, body, Path.home() / ".cache" / "vipra_ros", actions=True, workers=1
)
assert none == 0, "a trial that failed is no demonstration"
"""


def test_trials_become_states_and_states_become_videos(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], cwd=root(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_expert_takes_over_where_a_policy_went(tmp_path):
    """Here the policy is an expert's trial; a fallen cup is nobody's to correct."""
    run = [sys.executable, "-m"]
    how = ["--policy", "expert", "--robot", "sim_single_marks", "--seeds", "210000:210001", "--no-video"]
    played = tmp_path / "played"
    evaluate = [*run, "vipra_ros.cli", "evaluate", "stack_cups_narrow", *how, "--out", played]
    correct = [*run, "training.scripted", "--workers", "1", "correct", played, "--each", "2"]
    for command in (evaluate, [*correct, "--out", tmp_path / "states"]):
        done = subprocess.run(command, cwd=root(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (played / "trials").glob("*.npz")
    with np.load(path) as data:
        trial = dict(data)
    corrections = list(read_states(tmp_path / "states"))
    assert len(corrections) == 2 and all(c.success and c.seed == 210000 for c in corrections)
    for correction in corrections:
        there = np.abs(trial["state"][:, 0, :7] - correction.state[0, :7]).max(1)
        assert there.min() < 0.05, "it begins where the trial was"

    trial["poses"][5:, 0, 3:] = 0.7071, 0.7071, 0.0, 0.0
    np.savez_compressed(path, **trial)
    assert len(moments(path, 10)) == 5
    settings, shipped = played / "settings.json", json.loads((played / "settings.json").read_text())
    for other, problem in (
        (shipped | {"scene": "of another file"}, "was played with another stack_cups_narrow"),
        (shipped | {"task": "mine"}, "config/tasks/mine.yaml does not exist"),
        (None, "no folder of vipra evaluate"),
    ):
        if other is None:
            path.rename(path.with_name("seen-1000.npz"))
            settings.write_text(json.dumps(shipped))
            done = subprocess.run(
                [*correct, "--out", tmp_path / "none"], cwd=root(), capture_output=True, text=True
            )
            assert done.returncode == 2 and "trial 1000: below 10000 is for tests" in done.stderr
        settings.write_text(json.dumps(other)) if other else settings.unlink()
        done = subprocess.run(
            [*correct, "--out", tmp_path / "none"], cwd=root(), capture_output=True, text=True
        )
        assert done.returncode == 2 and problem in done.stderr


def dots(count: int) -> gate.Seen:
    """A bright dot on 32 px; places in m are its place in the picture; the second thing is never there."""
    random = np.random.default_rng(0)
    at = random.uniform(6, 26, (count, 2))
    y, x = np.mgrid[0:32, 0:32]
    blob = np.exp(-((x - at[:, :1, None]) ** 2 + (y - at[:, 1:, None]) ** 2) / 8)
    frames = np.repeat((255 * blob).astype(np.uint8)[..., None], 3, -1)
    places = np.full((count, 2, 3), gate.ABSENT, np.float32)
    places[:, 0] = np.concatenate([at / 100, np.zeros((count, 1))], 1)
    return gate.Seen(frames, places, ("dot", "ghost"), np.arange(count) % 5 == 0)


def test_the_gate_looks_all_over_a_dataset_and_judges_what_is_there(tmp_path):
    """Two tasks, one after the other: the first shows no blue cup, neither shows a yellow one."""
    features = demonstration.features(("x",), 32, 32)
    features = {demonstration.CAMERA: features[demonstration.CAMERA]}
    features[PLACES] = layout.vector([f"{name}_{axis}" for name in NAMES for axis in "xyz"])
    with Writer.create(tmp_path, 15, features, "test") as writer:
        for episode in range(12):
            places = np.full((len(NAMES), 3), ABSENT, np.float32)
            shown = ("hand", "red") if episode < 6 else ("hand", "red", "blue")
            places[[NAMES.index(name) for name in shown]] = 0.1 * episode
            for _ in range(5):
                picture = np.full((32, 32, 3), 20 * episode, np.uint8)
                writer.add({demonstration.CAMERA: picture, PLACES: places.ravel()}, "look")
            writer.save()
    seen = gate.read(DatasetConfig(path=str(tmp_path)), 32, 0.3, every=1, episodes=4)
    assert seen.names == ("hand", "red", "blue") and seen.places.shape == (20, 3, 3)
    np.testing.assert_allclose(seen.places[::5, 0, 0], [0.0, 0.4, 0.7, 1.1], atol=1e-6)


def test_a_probe_finds_what_is_in_the_pictures_and_nothing_where_they_are_blind():
    torch.set_num_threads(1)
    seen = dots(500)
    chance = 1000 * np.median(np.linalg.norm(seen.places[:, 0] - seen.places[:, 0].mean(0), axis=-1))
    found = gate.from_pixels(seen, 120, "cpu")
    assert found["dot"] < 0.15 * chance and np.isnan(found["ghost"])
    features = torch.zeros(len(seen.frames), 4, 4, 4)
    blind = gate.distances(
        lambda rows: features[rows], lambda: gate.Probe(torch.nn.Identity(), 4, 2), seen, 60, "cpu"
    )
    assert blind["dot"] > 0.7 * chance


def test_a_failed_gate_stops_unless_told_otherwise(tmp_path: Path, capsys):
    path = tmp_path / "gate.json"
    with pytest.raises(TrainingError, match="run --only gate first"):
        check_gate(path, ignore=True)
    found, failed = gate.report({"hand": 1.0, "red": 2.0}, {"hand": 4.0, "red": 21.0})
    path.write_text(json.dumps(found))
    assert failed == ["red 21.0 mm"]
    with pytest.raises(TrainingError, match=r"red 21\.0 mm, the limit is 5 mm .*red 2\.0.*--ignore-gate"):
        check_gate(path, ignore=False)
    check_gate(path, ignore=True)
    assert "GATE FAILED" in capsys.readouterr().out
    nothing_seen, _ = gate.report({"hand": 1.0}, {"hand": float("nan")})
    assert not nothing_seen["passed"]


def test_a_command_ends_with_its_minutes_and_exports_come_in_order(tmp_path):
    plan = Plan(tmp_path, FULL, None, 1, minutes=0.01, changes=("finetune.steps=40",))
    with pytest.raises(OutOfTime):
        plan.run("http.server", "0", "--bind", "127.0.0.1")
    assert checkpoints(plan) == [20, 26, 32, 40]
    half = tmp_path / "choices" / "policy-000020"
    half.mkdir(parents=True)
    (half / "manifest.json").write_text("{}")
    with pytest.raises(TrainingError, match="policy: 1 of 4 checkpoints are there"):
        choose(plan)


@pytest.mark.parametrize("count", [80, 0])
def test_a_draft_learns_without_the_corrections_of_it_and_the_policy_with_them(tmp_path, count, monkeypatch):
    texts: list[str] = []
    monkeypatch.setattr(Plan, "run", lambda plan, *command: texts.append(" ".join(map(str, command))))
    plan = Plan(tmp_path, replace(SMALL, corrections=count), None, 1, None, ignore_gate=True)
    (tmp_path / "gate.json").write_text(json.dumps(gate.report({"hand": 1.0}, {"hand": 1.0})[0]))
    draft(plan), corrections(plan), finetune(plan)
    *before, last = texts
    assert f"{tmp_path}/demonstrations" in last and (f"{tmp_path}/corrections" in last) == bool(count)
    assert f"--start {tmp_path}/pretrained" in last and "steps=3750" in last
    if not count:
        assert not before
        return
    drafted, played, corrected, filmed = before
    assert f"--out {tmp_path}/draft " in drafted and "steps=1500" in drafted and "corrections" not in drafted
    served = tmp_path / "evaluation" / "draft" / "served.yaml"
    assert f"--policy {served} " in played and "--seeds 210000:210048" in played
    assert yaml.safe_load(served.read_text())["checkpoint"] == f"{tmp_path}/draft"
    assert f"correct {tmp_path}/evaluation/draft --each 2" in corrected
    assert f"film {tmp_path}/states/corrections" in filmed and "--episodes 80" in filmed


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (
            ["sim", "--only", "summary", "--set", "finetunes.steps=4"],
            2,
            "--set finetunes.steps=4: STAGE",
        ),
        (["sim", "--only", "summary", "--set", "finetune.steps"], 2, "--set finetune.steps: STAGE"),
        (["tiny", "--set", "steps=4"], 2, "--set steps=4: STAGE.KEY=VALUE"),
        (
            ["sim", "--only", "finetune", "--ignore-gate", "--set", "finetune.stepz=5"],
            1,
            "stepz: unknown key",
        ),
        (["sim", "--only", "gate"], 1, "run --only tokenizer first"),
        (["scripted", "play", "--task", "none", "--first-seed", "1", "--episodes", "1"], 2, "known tasks: "),
        (["scripted", "film", "nowhere"], 2, "nowhere holds no trials"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, status, problem, tmp_path):
    (tmp_path / "gate.json").write_text(json.dumps(gate.report({"hand": 1.0}, {"hand": 1.0})[0]))
    name, *rest = arguments
    if "gate" in rest:
        (tmp_path / "gate.json").unlink()
    command = [sys.executable, "-m", f"training.{name}", *rest, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True, timeout=120)
    assert done.returncode == status and problem in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / layout.INFO).exists()


def test_the_best_on_development_seeds_is_chosen_and_what_was_chosen_is_compared(tmp_path, monkeypatch):
    """Most successes, then most partial ones, then the latest; the ablation where it was trained."""
    texts: list[str] = []
    rates = {  # steps -> (success, partial) of the policy and of the ablation
        "policy": {20: (0.5, 0.9), 26: (0.6, 0.6), 32: (0.6, 0.7), 40: (0.6, 0.7)},
        "attention": {20: (0.3, 0.5), 26: (0.2, 0.9), 32: (0.2, 0.9), 40: (0.0, 1.0)},
    }

    def run(plan, *command):
        texts.append(" ".join(map(str, command)))
        out = Path(command[command.index("--out") + 1])
        name, _, steps = out.name.partition("-")
        if steps:
            success, partial = rates[name][int(steps)]
            (out / "report.json").write_text(json.dumps({"success_rate": success, "partial_rate": partial}))

    monkeypatch.setattr(Plan, "run", run)
    plan = Plan(tmp_path, FULL, None, 1, None, changes=("finetune.steps=40",))
    for name in (f"{run}-{steps:06d}" for run in rates for steps in rates[run]):
        folder = tmp_path / "choices" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(folder.name)
    choose(plan)
    assert (tmp_path / "policy" / "manifest.json").read_text() == "policy-000040"
    assert (tmp_path / "attention" / "manifest.json").read_text() == "attention-000020"
    assert len(texts) == 8 and all("--seeds 300000:300020" in text for text in texts)
    choose(plan)
    assert len(texts) == 8, "what is chosen stays"
    evaluate(plan)
    *played, against, ablation = texts[8:]
    assert [text.split("evaluation/")[1].split("/")[0] for text in played] == [
        *("policy", "scratch", "attention")
    ]
    assert all("--seeds 1000:1200" in text and "--latency-ms 100" in text for text in played)
    folder = tmp_path / "evaluation"
    assert f"--compare {folder}/policy {folder}/scratch --out {folder}/comparison" in against
    assert f"--compare {folder}/policy {folder}/attention --out {folder}/comparison_attention" in ablation


@pytest.mark.parametrize(
    ("scale", "asked", "other"),
    [
        (SMALL, (), "causal"),
        (FULL, (), "bidirectional"),
        (FULL, ("chunk_attention=bidirectional",), "causal"),
    ],
)
def test_the_ablation_has_the_other_attention_and_nothing_else(tmp_path, scale, asked, other, monkeypatch):
    texts: list[str] = []
    monkeypatch.setattr(Plan, "run", lambda plan, *command: texts.append(" ".join(map(str, command))))
    changes = tuple(f"finetune.{change}" for change in asked)
    plan = Plan(tmp_path, replace(scale, checkpoints=(1.0,)), None, 1, None, changes, ignore_gate=True)
    (tmp_path / "gate.json").write_text(json.dumps(gate.report({"hand": 1.0}, {"hand": 1.0})[0]))
    finetune(plan), attention(plan)
    policy, ablation = (text.split() for text in texts)
    assert [word for word in ablation if word not in policy] == [
        *(word.replace("/policy", "/attention") for word in policy if "/policy" in word),
        f"chunk_attention={other}",
    ]


def test_fewer_videos_keep_their_proportion():
    assert shared(FULL.videos, 20) == (("stack_cups", 100_000, 14), ("pick_place", 120_000, 6))
    assert all(first >= 100_000 for scale in (FULL, SMALL) for _, first, _ in scale.videos), "never evaluated"


@pytest.mark.parametrize("scale", [FULL, SMALL], ids=["full", "small"])
def test_trials_begin_with_the_hand_in_the_picture(scale):
    robot, crop = load(Robot, scale.robot), load(Embodiment, scale.embodiment).crop
    trial = make_trial(load(Task, scale.task), 0)
    world = Lockstep(trial)
    world.reset(trial, {name: np.array(arm.home_rad) for name, arm in robot.arms.items()})
    hand, down = world.tcp(trial.task.arm)
    assert down[2, 2] < -0.999, "straight down"
    camera, (width, height) = trial.workcell.front_camera, (robot.camera.width, robot.camera.height)
    ahead = np.subtract(camera.look_at_xyz, camera.position_xyz)
    ahead /= np.linalg.norm(ahead)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    focal = height / 2 / np.tan(np.radians(camera.vertical_fov_deg) / 2)
    seen = hand - camera.position_xyz
    column, row = (focal * (seen @ axis) / (seen @ ahead) for axis in (right, np.cross(ahead, right)))
    rows, columns = crop.of(height, width)
    assert rows.start + 5 < height / 2 + row < rows.stop and columns.start < width / 2 + column < columns.stop


def test_the_summary_counts_hours_of_training_and_places_checkpoints_there(tmp_path):
    """3,600 samples at one a second, 1,800 at half of that; time of validation does not count."""
    run = tmp_path / "runs" / "policy"
    run.mkdir(parents=True)
    entries = [
        {"step": 10, "time": 0, "loss": 2.0, "samples": 3600, "samples_per_s": 1.0},
        {"step": 20, "time": 9e9, "validation/action_error": 0.1},
        {"step": 20, "time": 9e9, "loss": 1.0, "samples": 5400, "samples_per_s": 0.5},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)) + '\n{"step": 30, "lo')
    trials = {"success_rate": 0.5, "partial_rate": 1.0, "interval95": [0.19, 0.81], "trials": []}
    for folder in ("development/policy-000010", "evaluation/live"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "report.json").write_text(json.dumps(trials))
    found = sim_summary.write(tmp_path)
    assert found["policy"]["hours"] == 2.0 and found["policy"]["validation/action_error"] == 0.1
    assert found["evaluation"] == {"live": {k: v for k, v in trials.items() if k != "trials"}}
    timed = {"policy": list(sim_summary.timed(run / "metrics.jsonl"))}
    assert [e["hours"] for e in timed["policy"]] == [1.0, 1.0, 2.0]
    reports = {"policy-000010": trials, "policy-draft": trials, "scratch-000010": trials}
    assert sim_summary.success(timed, reports) == {"policy": [(1.0, 0.5, 0.19, 0.81)]}
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    assert (tmp_path / "curves.png").stat().st_size > 10_000
