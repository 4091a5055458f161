"""`vipra runs` shows what differs between runs and what they reached."""

import pytest

from config.training import Optimizer
from tests.training import toy
from training import runs
from training.run import Run, TrainingError


def test_two_runs_are_listed_with_what_differs_and_what_they_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, rate, loss in (("slow", 1e-4, 0.75), ("fast", 1e-2, 0.25)):
        plan = toy.recipe(20, optimizer=Optimizer(learning_rate=rate))
        run = Run(tmp_path / name, plan)
        run.log(7, {"loss": 9.0, "samples_per_s": 3.0})
        run.log(9, {"loss": loss, "samples_per_s": 3.0})
        run.close()
    assert runs.main([str(tmp_path)]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert [str(tmp_path / "slow"), "9/20", "0.75", "3"] in lines
    assert [str(tmp_path / "fast"), "9/20", "0.25", "3"] in lines
    assert ["optimizer.learning_rate", "0.0001", "0.01"] in lines
    assert not any("steps" in line or "global_batch" in line for line in lines)


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"no training run below .*: train one, or name its folder"):
        runs.main([str(tmp_path)])
