"""An operator's evaluation on a running graph: policy node and server are real, the arms stand in."""

import json
import time

import av
import numpy as np
import pytest

from config.loading import load
from config.task import Task
from tests.vipra_ros.scene import Scene
from vipra_ros.evaluation.ledger import Key
from vipra_ros.evaluation.live import run

pytestmark = pytest.mark.live


def test_two_trials_are_played_scored_and_reported_and_one_without_a_server_is_void(tmp_path, monkeypatch):
    scene, said, out = Scene(tmp_path), [], tmp_path / "out"
    for name, value in scene.graph.env().items():
        monkeypatch.setenv(name, value)

    def until(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, said
            yield ""
            time.sleep(0.05)

    def moved(chunks: int):
        before = len(scene.arms.chunks)
        return until(lambda: len(scene.arms.chunks) >= before + chunks)

    def keys():
        yield "\n"  # while the robot is waited for: starts nothing
        yield from until(lambda: "trial 1 of 2" in " ".join(said))
        time.sleep(0.5)
        assert not scene.arms.chunks
        yield from ("", "\n")
        yield from moved(6)
        yield from ("s", "n", "k")
        yield from ("", "\n")
        yield from moved(3)
        scene.server.stop()
        yield from until(lambda: "set this trial up again" in " ".join(said))
        scene.serve()
        while scene.value("state") != "RUNNING":  # refused until the node is connected again
            yield from ("", "\n")
            time.sleep(0.2)
        yield from moved(3)
        yield from ("f", "k", "q")

    try:
        scene.serve()
        scene.film()
        scene.start_node()
        robot = scene.robot()
        task, wanted = load(Task, "place_in_bowl"), [Key("seen", 0), Key("seen", 1)]
        assert run(task, "mine", robot, wanted, 60.0, out, keys(), said.append, lambda: "a bit late") == 0
    finally:
        scene.close()
    report = json.loads((out / "report.json").read_text())
    first, second = report["trials"]
    assert [t["success"] for t in report["trials"]] == [True, False] and report["success_rate"] == 0.5
    assert first["note"] == "a bit late" and first["seconds"] > 0.5 and first["retries"] == 0
    assert report["settings"]["model"] == "moves" and report["settings"]["policy"] == "mine"
    assert {void["seed"] for void in report["voids"]} == {1}
    assert any("no policy server" in void["reason"] for void in report["voids"])
    for trial in (first, second):
        with np.load(out / "trials" / f"seen-{trial['seed']:04d}.npz") as saved:
            assert saved["state"].shape[1:] == (2, 8) and len(saved["state"]) > 3
        with av.open(str(out / "trials" / f"seen-{trial['seed']:04d}.mp4")) as film:
            assert sum(1 for _ in film.decode(video=0)) > 3
    assert (out / "report.html").is_file() and (out / "contact.png").is_file()
    assert scene.arms.let_go >= 3
