"""Trials are kept whole, repeated only when void, reported with intervals, compared only with their like."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest

from config.loading import load
from config.task import Task
from vipra_ros.evaluation import report as reports
from vipra_ros.evaluation.compare import compare
from vipra_ros.evaluation.ledger import (
    GIVE_UP,
    EvaluationError,
    Key,
    Ledger,
    Result,
    Void,
    locked,
    run_trials,
    trial_settings,
)
from vipra_ros.report.video import jpeg

SETTINGS = {"task": "stack_cups", "policy": "mine", "time_limit_s": 30.0, "latency_ms": 100.0}


def result(seed=0, success=False, split="seen", **more) -> Result:
    given = {"partial": success, "seconds": 12.5, "interventions": 0, "ended": "time limit"}
    return Result(seed=seed, split=split, success=success, **{**given, **more})


def keys(count, split="seen"):
    return [Key(split, seed) for seed in range(count)]


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path):
    ledger, played, interruptions = Ledger(tmp_path, SETTINGS), [], [KeyboardInterrupt]

    def play(key):
        if key.seed == 3 and interruptions:
            raise interruptions.pop()
        played.append(key.seed)
        return result(key.seed, success=key.seed % 2 == 0)

    with pytest.raises(KeyboardInterrupt):
        run_trials(ledger, keys(5), play)
    assert [r.seed for r in ledger.results()] == [0, 1, 2]
    (tmp_path / "trials" / "seen-0003.json.part").write_text('{"seed"')  # killed while writing
    run_trials(Ledger(tmp_path, SETTINGS), keys(5), play)
    assert played == [0, 1, 2, 3, 4]
    assert [r.success for r in ledger.results()] == [True, False, True, False, True]


def test_a_trial_whose_server_dies_is_void_and_repeated_and_the_rest_stand(tmp_path):
    ledger, attempts, repaired = Ledger(tmp_path, SETTINGS), [], []

    def play(key):
        attempts.append(key.seed)
        if attempts.count(13) == 1 and key.seed == 13:
            ledger.file(key, ".mp4").write_bytes(b"half a film")
            raise Void("the policy server is gone")
        return result(key.seed)

    run_trials(ledger, keys(15), play, lambda: repaired.append(attempts[-1]))
    assert attempts == [*range(14), 13, 14] and repaired == [13]
    assert len(ledger.results()) == 15 and not ledger.file(Key("seen", 13), ".mp4").exists()
    assert ledger.voids() == [{"split": "seen", "seed": 13, "reason": "the policy server is gone"}]


def test_a_line_that_a_power_cut_ended_costs_no_other(tmp_path):
    ledger = Ledger(tmp_path, SETTINGS)
    ledger.void(Key("seen", 1), "no server")
    with open(tmp_path / "void.jsonl", "a") as file:
        file.write('{"split": "se')
    ledger.void(Key("seen", 2), "no server")
    assert [void["seed"] for void in ledger.voids()] == [1, 2]
    assert reports.write(ledger, SETTINGS, [])["trials"] == []


def test_trials_are_known_in_the_order_they_were_kept(tmp_path):
    ledger = Ledger(tmp_path, SETTINGS)
    for number, seed in enumerate((2, 0, 1)):
        ledger.write(result(seed))
        os.utime(ledger.file(Key("seen", seed), ".json"), (1e9 + number,) * 2)
    assert [key.seed for key in ledger.kept()] == [2, 0, 1]


def test_a_trial_that_is_always_void_ends_the_evaluation_and_keeps_the_rest(tmp_path):
    ledger = Ledger(tmp_path, SETTINGS)

    def play(key):
        if key.seed == 1:
            raise Void("no server")
        return result(key.seed)

    with pytest.raises(EvaluationError, match=f"seen-0001 was void {GIVE_UP} times.*no server"):
        run_trials(ledger, keys(3), play)
    assert [r.seed for r in ledger.results()] == [0] and len(ledger.voids()) == GIVE_UP


def test_two_evaluations_at_once_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path / "a"):
        with pytest.raises(EvaluationError, match="a: another evaluation is at work there"):
            locked(tmp_path / "a").__enter__()
        with locked(tmp_path / "b"):
            pass
    with locked(tmp_path / "a"):
        pass


def test_another_evaluation_is_not_mixed_in(tmp_path):
    Ledger(tmp_path, SETTINGS)
    with pytest.raises(EvaluationError, match=r"latency_ms 100\.0, not 510"):
        Ledger(tmp_path, SETTINGS | {"latency_ms": 510})
    Ledger(tmp_path, SETTINGS).trials.joinpath("seen-0000.json").write_text('{"seed": 0}')
    with pytest.raises(EvaluationError, match=r"seen-0000\.json is no trial's result"):
        Ledger(tmp_path, SETTINGS).results()


def evaluated(folder, outcomes, settings=SETTINGS, split="seen"):
    """An evaluation whose trials end as `outcomes` say: s success, p partial, f fail."""
    ledger = Ledger(folder, settings)
    for seed, letter in enumerate(outcomes):
        drops = int(letter == "p" and seed % 2 == 0)
        one = result(seed, letter == "s", split, partial=letter in "sp", drops=drops, jerk_rms=4.0 + seed)
        ledger.write(dataclasses.replace(one, ended="success" if letter == "s" else "time limit"))
    return ledger


def test_the_report_has_rates_with_intervals_splits_failures_and_trials(tmp_path):
    ledger = evaluated(tmp_path, "sspf")
    for seed in range(3):
        ledger.write(result(seed, split="unseen", wrong_object=seed == 0))
        picture = np.full((90, 160, 3), 40 * seed, np.uint8)
        ledger.file(Key("unseen", seed), ".jpg").write_bytes(jpeg(picture))
    ledger.file(Key("seen", 0), ".mp4").write_bytes(b"film")
    ledger.void(Key("seen", 9), "the <server> died")
    report = reports.write(ledger, SETTINGS, ["a note"])
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["success_rate"] == pytest.approx(2 / 7)
    assert report["partial_rate"] == pytest.approx(3 / 7)
    assert report["interval95"] == [0.0367, 0.7096]  # scipy's, 2 of 7
    assert {"seed", "success", "partial", "seconds", "interventions"} <= report["trials"][0].keys()
    assert report["splits"]["seen"]["success_rate"] == 0.5
    assert report["splits"]["unseen"]["interval95"] == [0.0, 0.7076]
    assert report["seconds_to_success"] == {"median": 12.5, "worst": 12.5}
    assert report["failures"] == {
        "grasped, then dropped": 1,
        "never grasped": 3,
        "lifted another object": 1,
    }
    assert report["drops"] == 1 and report["wrong_object"] == 1
    text = (tmp_path / "report.html").read_text()
    assert "trials/seen-0000.mp4" in text and "a note" in text and "the &lt;server&gt; died" in text
    assert "://" not in text  # nothing is fetched from anywhere
    assert all((tmp_path / link).exists() for link in re.findall(r"(?:href|src)='([^']+)'", text))
    assert (tmp_path / "contact.png").stat().st_size > 500


def test_a_report_without_a_trial_says_so(tmp_path):
    report = reports.write(Ledger(tmp_path, SETTINGS), SETTINGS)
    assert report["success_rate"] is None and report["interval95"] == [0.0, 1.0]
    assert reports.in_one_line(report) == "no trial counts yet"


def test_two_policies_are_compared_on_the_same_trials(tmp_path):
    for name, outcomes in (("a", "sssssssfff"), ("b", "fffffffspf")):
        settings = SETTINGS | {"policy": name, "latency_ms": 100.0 if name == "a" else 510.0}
        reports.write(evaluated(tmp_path / name, outcomes, settings), settings)
    comparison = compare(tmp_path / "a", tmp_path / "b" / "report.json")
    assert comparison.only_a == [f"seen {seed}" for seed in range(7)] and comparison.only_b == ["seen 7"]
    assert comparison.p == pytest.approx(2 * 9 / 256)
    assert comparison.success == (0.7, 0.1) and comparison.difference == pytest.approx(-0.6)
    assert comparison.notes == ["latency_ms: 100.0 against 510.0"]
    text = reports.comparison_page(comparison)
    assert "seen 7" in text and "510.0" in text and "0.0703" in reports.comparison_line(comparison)


def test_one_policy_in_two_ways_is_told_apart_by_its_reports(tmp_path):
    for name in ("lockstep", "live"):
        reports.write(evaluated(tmp_path / name, "sf", SETTINGS), SETTINGS)
    policy = SETTINGS["policy"]
    found = compare(tmp_path / "lockstep", tmp_path / "live").names
    assert found == (f"{policy} in {tmp_path / 'lockstep'}", f"{policy} in {tmp_path / 'live'}")


@pytest.mark.parametrize(
    ("outcomes", "settings", "split", "error"),
    [
        ("ssf", {"task": "pick_place"}, "seen", "task differs: stack_cups in .* pick_place in"),
        ("ssf", {"time_limit_s": 60.0}, "seen", r"time_limit_s differs: 30\.0"),
        ("ssf", {"scene": "bbbb"}, "seen", "stack_cups was another task or workcell file in .*a than in .*b"),
        ("ssf", {}, "unseen", r"splits differ: \['seen'\] in .* \['unseen'\]"),
        ("ssff", {}, "seen", "seeds differ: seen 3 only in .*b: evaluate both"),
    ],
)
def test_what_differs_between_evaluations_is_named(tmp_path, outcomes, settings, split, error):
    one = SETTINGS | ({"scene": "aaaa"} if "scene" in settings else {})
    reports.write(evaluated(tmp_path / "a", "ssf", one), one)
    other = one | settings
    reports.write(evaluated(tmp_path / "b", outcomes, other, split), other)
    with pytest.raises(EvaluationError, match=error):
        compare(tmp_path / "a", tmp_path / "b")


def test_other_words_for_a_seed_are_another_trial(tmp_path):
    for name, words in (("a", "stack red on blue"), ("b", "stack blue on red")):
        ledger = Ledger(tmp_path / name, SETTINGS)
        ledger.write(Result(0, "seen", True, True, 9.0, 0, "success", instruction=words))
        reports.write(ledger, SETTINGS)
    with pytest.raises(EvaluationError, match=r"seen 0 was 'stack red on blue' in .* 'stack blue on red' in"):
        compare(tmp_path / "a", tmp_path / "b")


def test_a_task_that_was_edited_is_another_scene_but_its_protocol_is_only_words(tmp_path):
    task = load(Task, "stack_cups")
    settings = trial_settings(task, 30.0, "fr3")
    protocol = task.protocol.model_copy(update={"reset": "Step back."})
    assert trial_settings(task.model_copy(update={"protocol": protocol}), 30.0, "fr3") == settings
    wider = trial_settings(task.model_copy(update={"clearance_m": 0.2}), 30.0, "fr3")
    assert {name for name in settings if settings[name] != wider[name]} == {"scene"}
    Ledger(tmp_path, settings)
    with pytest.raises(EvaluationError, match="holds an evaluation with scene"):
        Ledger(tmp_path, wider)


def test_what_is_no_report_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"report\.json cannot be read"):
        compare(tmp_path, tmp_path)
    (tmp_path / "report.json").write_text('{"success_rate": 1.0}')
    with pytest.raises(EvaluationError, match="it lacks task, time_limit_s, trials"):
        compare(tmp_path, tmp_path)
    report = reports.write(evaluated(tmp_path / "d", "sf"), SETTINGS, [])
    del report["trials"][1]["success"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(EvaluationError, match="a trial lacks success"):
        compare(tmp_path, tmp_path)
