"""`vipra dataset` finds what is wrong, and nothing where nothing is."""

import json
import sys
from pathlib import Path
from unittest.mock import create_autospec

import matplotlib
import numpy as np
import pytest
from PIL import Image

from benchmarks import recorder
from config.embodiment import Embodiment
from config.loading import ConfigError, load
from config.recording import Quality
from config.safety import Safety
from episodes import demonstration, layout, quality
from episodes.layout import EpisodesError
from episodes.quality import Trace
from episodes.reader import Dataset
from episodes.writer import Writer
from tests.vipra_ros.recording.streams import NAMES, SIZE, measured, picture
from vipra_ros import dataset_cli
from vipra_ros.recording.keyboard import verb
from vipra_ros.recording.replay import EVERY, HORIZON, chunks, load_actions
from vipra_ros.teleop.expert import demonstrate

HOME = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398, 0.0])
FPS = 15


def motion(t: float) -> np.ndarray:
    """Around home, inside every limit."""
    return HOME + 0.5 * measured(t)


def write(root, *episodes, task="stack") -> None:
    """Each episode: function index -> (capture time, picture time, state, action), frames."""
    with Writer.create(root, FPS, demonstration.features(NAMES, *SIZE), "franka_single", crf=23) as writer:
        for frame, count in episodes:
            for i in range(count):
                capture, shown, state, action = frame(i)
                row = {
                    demonstration.CAMERA: picture(shown),
                    demonstration.STATE: state,
                    demonstration.ACTION: action,
                    demonstration.CAPTURE: [capture],
                    demonstration.SYNC: [0.003],
                }
                writer.add(row, task)
            writer.save()


def clean(begin: float):
    def frame(i):
        t = begin + i / FPS
        return t, t, motion(t), motion(t + 0.05)

    return frame


def changed(begin: float, **change):
    """A clean episode, but for the functions of (i, value) named capture, shown, state, action."""

    def frame(i):
        values = dict(zip(("capture", "shown", "state", "action"), clean(begin)(i), strict=True))
        return tuple(change[key](i, value) if key in change else value for key, value in values.items())

    return frame


def kinds(root, *options: str) -> tuple[int, dict[int, set[str]]]:
    """Status of `vipra dataset check`, and the kinds of problems by episode."""
    report = root.parent / "report.json"
    status = dataset_cli.main(["check", str(root), "--json", str(report), *options])
    found: dict[int, set[str]] = {}
    for finding in json.loads(report.read_text())["findings"]:
        if finding["problem"]:
            found.setdefault(finding["episode"], set()).add(finding["kind"])
    return status, found


def test_clean_demonstrations_are_clean(tmp_path, capsys):
    write(tmp_path / "d", *((clean(10.0 * k), 40) for k in range(3)))
    assert kinds(tmp_path / "d") == (0, {})
    assert "3 episodes, 120 frames, 0.1 min: clean" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["sync_error_ms_p99"] == 3.0


def test_every_fault_is_found_in_its_episode(tmp_path, capsys):
    frozen = changed(0.0, shown=lambda i, t: t if i < 10 or i > 22 else 10 / FPS)
    gap = changed(10.0, capture=lambda i, t: t + (0.4 if i >= 20 else 0.0))
    lost = changed(20.0, capture=lambda i, t: t if i not in (20, 21) else 20.0 + 19 / FPS)
    idle = changed(
        30.0,
        state=lambda i, q: q if not 10 <= i < 20 else motion(30 + 10 / FPS),
        action=lambda i, q: q if not 10 <= i < 20 else motion(30 + 10 / FPS),
    )
    limit = changed(40.0, action=lambda i, q: q if i != 12 else np.where(np.arange(8) == 3, -0.2, q))
    short = clean(50.0)
    episodes = [(frozen, 40), (gap, 40), (lost, 40), (idle, 40), (limit, 40), (short, 8), (clean(60.0), 40)]
    write(tmp_path / "d", *episodes, (clean(60.0), 40))
    status, found = kinds(tmp_path / "d")
    assert status == 1
    assert found[0] == {"frozen"}
    assert found[1] == {"gap"}
    assert found[2] == {"dropped"}
    assert found[3] >= {"idle"} and found[3] <= {"idle", "tracking", "limit"}
    assert found[4] >= {"limit", "tracking"}
    assert found[5] == {"short"}
    assert found[7] == {"duplicate"} and 6 not in found
    said = " ".join(capsys.readouterr().out.split())
    assert "right_fr3_joint4 at its soft position limit" in said
    assert "the same motion as episode 6" in said
    _, without = kinds(tmp_path / "d", "--no-pictures", "--quality", "idle_s=2", "--quality", "min_s=0")
    assert 0 not in without and 5 not in without and "idle" not in without.get(3, set())


def test_a_picture_that_stands_while_a_hand_closes_is_frozen():
    t, rows = np.arange(40) / FPS, np.arange(40)
    q = np.stack([motion(0.0)] * 40)
    q[:, 7] = np.interp(rows, [10, 16], [1.0, 0.2])
    still = (rows > 9) & (rows < 18)
    seen = Trace(FPS, NAMES, t, np.zeros(40), q, q, np.where(still, 0.0, 50.0))
    (found,) = [f for f in quality.inspect(seen, Quality(idle_s=9)) if f.kind != "tracking"]
    assert found.kind == "frozen" and found.text.endswith("while a hand moved")
    q[:, 7] = 0.95 + 0.05 * np.sin(rows)  # a hand that trembles has not moved
    assert not [f for f in quality.inspect(seen, Quality(idle_s=9)) if f.kind == "frozen"]


def test_arms_that_were_not_heard_of_for_a_moment_are_found_in_a_long_episode():
    """Too few frames for the 99th percentile."""
    q = np.stack([motion(x) for x in np.arange(900) / FPS])
    sync = np.full(900, 0.003)
    sync[400:408] = np.linspace(0.07, 0.55, 8)
    seen = Trace(FPS, NAMES, np.arange(900) / FPS, sync, q, q, np.full(900, 50.0))
    (found,) = [f for f in quality.inspect(seen, Quality()) if f.kind not in ("idle", "tracking")]
    assert (found.kind, found.first, found.last) == ("stale", 401, 407)
    assert "550 ms from their picture" in found.text


def test_the_recorders_benchmark_measures_what_the_nodes_recorded(tmp_path, monkeypatch, capsys):
    def recorded(wanted, robot, task_file, root, tell):
        assert (wanted.episodes, wanted.keep_flagged, robot) == (1, True, "sim_single")
        assert task_file == "stack_cups"
        write(root, (clean(0.0), 40))

    monkeypatch.setattr(recorder, "demonstrate", create_autospec(demonstrate, side_effect=recorded))
    monkeypatch.setattr(sys, "argv", ["recorder", "--episodes", "1", "--json", str(tmp_path / "numbers")])
    assert recorder.main() == 0
    numbers = json.loads((tmp_path / "numbers").read_text())
    assert numbers["sync_error_ms_p99"] == pytest.approx(3.0, abs=0.01) and numbers["dropped_frames"] == 0
    assert "MISSED" not in capsys.readouterr().out


def test_limits_of_arms_with_another_number_of_joints_are_said_to_be_unchecked(tmp_path, capsys):
    names = (*(f"ur_joint{i}" for i in range(1, 7)), "ur_gripper")
    with Writer.create(tmp_path / "d", FPS, demonstration.features(names, *SIZE), "ur", crf=23) as writer:
        for i in range(20):
            row = dict.fromkeys((demonstration.STATE, demonstration.ACTION), motion(i / FPS)[1:])
            row |= {demonstration.CAMERA: picture(i / FPS), demonstration.CAPTURE: [i / FPS]}
            writer.add(row | {demonstration.SYNC: [0.003]}, "reach")
        writer.save()
    assert kinds(tmp_path / "d")[0] == 0
    said = "limits are not checked: 6 joints, --safety fr3 is for 7 an arm"
    assert said in " ".join(capsys.readouterr().out.split())


def test_no_instruction_and_no_episode_are_problems(tmp_path):
    write(tmp_path / "d", (clean(0.0), 20), task=" ")
    assert kinds(tmp_path / "d") == (1, {0: {"task"}})
    write(tmp_path / "e")
    assert kinds(tmp_path / "e") == (1, {})
    with pytest.raises(ConfigError, match="idle: unknown key"):
        kinds(tmp_path / "d", "--quality", "idle=2")


def test_a_pause_with_the_arm_held_is_no_problem():
    t = np.arange(30) / FPS
    capture = t + np.where(t > 1, 5.0, 0.0)
    q = np.stack([motion(x) for x in t])
    seen = Trace(FPS, NAMES, capture, np.zeros(30), q, q, np.full(30, 50.0))
    (found,) = quality.inspect(seen, Quality(), load(Safety, "fr3").joints)
    assert (found.kind, found.problem) == ("gap", True)
    q[16:] = q[15]
    found = [f for f in quality.inspect(seen, Quality()) if f.kind != "idle"]
    assert [(f.kind, f.problem) for f in found] == [("pause", False)]


@pytest.mark.parametrize(
    ("camera_hz", "kinds"),
    [(30.0, []), (29.97, []), (30.03, []), (60.0, []), (25.0, ["pace"]), (22.0, ["pace"])],
)
def test_a_camera_of_another_rate_is_found_and_one_that_drifts_is_not(camera_hz, kinds):
    """The newest picture at every fifteenth of a second, for 40 s, with 1 ms of jitter."""
    random = np.random.default_rng(0)
    pictures = np.arange(0, 41, 1 / camera_hz)
    pictures += random.uniform(-5e-4, 5e-4, len(pictures))
    due = np.arange(600) / FPS + 1 / 60
    capture = pictures[np.searchsorted(pictures, due, "right") - 1]
    q = np.stack([motion(x) for x in capture])
    seen = Trace(FPS, NAMES, capture, np.zeros(600), q, q, np.full(600, 50.0))
    found = quality.inspect(seen, Quality())
    assert [f.kind for f in found if f.kind != "idle"] == kinds


def test_a_hand_that_moved_during_a_pause_is_a_gap():
    t = np.arange(30) / FPS
    q = np.stack([motion(x) for x in t])
    q[15:] = q[15]
    for values in ("state", "action"):
        seen = {"state": q, "action": q} | {values: q + np.outer(np.arange(30) > 15, np.arange(8) == 7)}
        trace = Trace(
            FPS, NAMES, t + np.where(t > 1, 20.0, 0.0), np.zeros(30), change=np.full(30, 50.0), **seen
        )
        found = [f for f in quality.inspect(trace, Quality()) if f.kind in ("gap", "pause")]
        assert [(f.kind, f.problem) for f in found] == [("gap", True)]


@pytest.mark.parametrize(("every", "found"), [(1, 0), (6, 0), (3, 1), (2, 1)])
def test_a_camera_that_repeats_pictures_while_an_arm_moves_is_found(every, found):
    """`every` how many pictures a copy comes; one in six is let pass."""
    rows = np.arange(90)
    q = np.stack([motion(i / FPS) for i in rows])
    q[60:] = q[60]  # at rest a simulated camera repeats itself, and rightly
    copy = (rows % every == 1) if every > 1 else np.zeros(90, bool)
    change = np.where(copy | (rows > 60), 0.0, 40.0)
    seen = Trace(FPS, NAMES, rows / FPS, np.zeros(90), q, q, change)
    frozen = [f for f in quality.inspect(seen, Quality()) if f.kind == "frozen"]
    assert len(frozen) == found
    assert all("pictures equal the one before" in f.text and f.last < 75 for f in frozen)


@pytest.mark.parametrize("crf", [23, 30])
def test_a_frozen_camera_is_found_in_compressed_photographs(tmp_path, crf):
    """Key frames of one and the same picture differ."""
    photo = Path(matplotlib.__file__).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    with Image.open(photo) as image:
        wide = np.asarray(image.convert("RGB").resize((640, 754)))[100:460]
    features = demonstration.features(NAMES, 360, 640)
    with Writer.create(tmp_path / "d", FPS, features, "franka_single", crf=crf) as writer:
        for i in range(45):
            row = {
                demonstration.CAMERA: np.roll(wide, 5 * (10 if 10 <= i < 30 else i), 1),
                demonstration.STATE: motion(i / FPS),
                demonstration.ACTION: motion(i / FPS),
                demonstration.CAPTURE: [i / FPS],
                demonstration.SYNC: [0.003],
            }
            writer.add(row, "stack")
        writer.save()
    data = Dataset(tmp_path / "d")
    (found,) = [f for f in quality.inspect(dataset_cli.trace(data, 0), Quality()) if f.kind == "frozen"]
    assert abs(found.first - 10) <= 1 and abs(found.last - 29) <= 1


def test_what_a_newcomer_may_type_or_have_ends_in_a_line(tmp_path, capsys):
    root = tmp_path / "d"
    write(root, (clean(0.0), 30), (clean(10.0), 30), task="put the [left] cup on [/b]")
    assert dataset_cli.main(["check", str(root)]) == dataset_cli.main(["stats", str(root)]) == 0
    assert "put the [left] cup on [/b]" in capsys.readouterr().out
    for number in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            dataset_cli.main(["view", str(root), "--columns", number])
    assert "is not a whole number from 1 on" in capsys.readouterr().err
    with pytest.raises(EpisodesError, match=r"--out sheet.foo: name a file that ends in .png"):
        dataset_cli.main(["view", str(root), "--out", "sheet.foo"])
    info = json.loads((root / layout.INFO).read_text())
    info["features"]["action"]["names"] = None
    (root / layout.INFO).write_text(json.dumps(info))
    assert dataset_cli.main(["stats", str(root)]) == 0
    assert "dimension 7" in capsys.readouterr().out
    (file,) = (root / "data").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:1000])
    status, found = kinds(root)
    assert status == 1 and found == {0: {"unreadable"}, 1: {"unreadable"}}


def test_stats_view_and_merge(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", (clean(0.0), 30), (clean(10.0), 20))
    write(tmp_path / "b", (clean(20.0), 25))
    assert dataset_cli.main(["merge", "a", "b", "both"]) == 0
    assert [row.length for row in Dataset(tmp_path / "both").rows] == [30, 20, 25]
    assert kinds(tmp_path / "both") == (0, {})
    assert dataset_cli.main(["stats", "both"]) == 0
    said = capsys.readouterr().out
    assert "3 episodes, 0.1 min; 1.3 to 2.0 s" in said and "3  stack" in said
    monkeypatch.setattr(dataset_cli, "_SHEET", 2)
    assert dataset_cli.main(["view", "both"]) == 0
    assert "the first 2 of 3 episodes; --episode N" in capsys.readouterr().out
    assert dataset_cli.main(["view", "both", "--episode", "1"]) == 0
    for name in ("both.png", "both_000001.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 800
    assert dataset_cli.main(["merge", "both", "good", "--without", "0,1"]) == 0
    (left,) = Dataset(tmp_path / "good").rows
    assert left.length == 25
    for options, problem in (
        (["both", "c", "--without", "1,3"], "episodes 0 to 2, not 3"),
        (["a", "b", "c", "--without", "1"], "2 datasets: name one"),
        (["a", "c"], "at least two datasets"),
    ):
        with pytest.raises(EpisodesError, match=problem):
            dataset_cli.main(["merge", *options])
    with pytest.raises(ConfigError, match="--without 1;2: episode numbers with commas"):
        dataset_cli.main(["merge", "both", "c", "--without", "1;2"])
    with pytest.raises(EpisodesError, match="episodes 0 to 2, not 7"):
        dataset_cli.main(["view", "both", "--episode", "7"])


def test_a_replay_commands_every_action_at_its_time(tmp_path):
    write(tmp_path / "d", (clean(0.0), 40))
    embodiment = load(Embodiment, "franka_single")
    actions = load_actions(Dataset(tmp_path / "d"), 0, embodiment)
    sent = chunks(actions, FPS, 200.0, embodiment)
    assert [c.seq for c in sent] == list(range(len(sent)))
    for number, chunk in enumerate(sent):
        assert 2 <= len(chunk) <= HORIZON
        for k in range(len(chunk)):
            i = number * EVERY + k
            assert chunk.t0 + k / FPS == pytest.approx(200.0 + i / FPS)
            wanted = actions[min(i, len(actions) - 1)]
            np.testing.assert_array_equal(np.hstack([chunk.joints[k], chunk.grippers[k]]), wanted)
    covered = {n * EVERY + k for n, chunk in enumerate(sent) for k in range(len(chunk))}
    assert covered >= set(range(40))
    with pytest.raises(EpisodesError, match="was recorded with franka_single"):
        load_actions(Dataset(tmp_path / "d"), 0, load(Embodiment, "franka_bimanual"))


def test_another_robots_dataset_is_named(tmp_path):
    write(tmp_path / "d", (clean(0.0), 20))
    info = layout.read_info(tmp_path / "d")
    other = layout.new_info(FPS, demonstration.features([*NAMES, "extra"], *SIZE), "franka_single")
    assert "observation.state: shape [8] and [9]" in demonstration.difference(info, other)


def test_keys():
    assert [verb(" ", s) for s in ("IDLE", "RECORDING", "PAUSED", "PENDING", "SAVING")] == [
        "start",
        "stop",
        "stop",
        None,
        None,
    ]
    assert [verb(k, "PENDING") for k in "kdurpq"] == ["keep", "discard", "undo", "retry", "pause", "quit"]
    assert verb("x", "IDLE") is None
