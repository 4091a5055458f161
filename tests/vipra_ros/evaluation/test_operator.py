"""An operator's keys, wrong ones too, score every trial once and stop the arms at any time."""

import itertools
import threading

import pytest

from config.loading import load
from config.task import Task
from simulation.tasks.trial import make_trial, placing
from vipra_ros import evaluate
from vipra_ros.evaluation import live, operator
from vipra_ros.evaluation import report as reports
from vipra_ros.evaluation.ledger import EvaluationError, Key, Ledger
from vipra_ros.evaluation.live import ALARM, HALT_TRIES, Listener, drive, pressed
from vipra_ros.evaluation.operator import Do, Phase, Session

TRIALS = tuple(Key("seen", seed) for seed in range(3))
SETTINGS = {"task": "stack_cups", "policy": "mine", "time_limit_s": 30.0}


def after(keys: str, session: Session | None = None, seconds: float = 1.0):
    """The session after `keys`, one every `seconds`, and everything that was to be done."""
    session, done = session or Session(TRIALS, 30.0), []
    for i, key in enumerate(keys):
        session, todo = operator.press(session, key, seconds * i)
        done += todo
    return session, done


@pytest.mark.parametrize(
    ("key", "success", "partial", "interventions", "ended"),
    [
        ("s", True, True, 0, "success"),
        ("p", False, True, 0, "operator"),
        ("f", False, False, 0, "operator"),
        ("a", False, False, 1, "aborted"),
    ],
)
def test_a_trial_is_started_scored_and_kept(key, success, partial, interventions, ended):
    session, done = after(f"\n{key}")
    assert session.phase is Phase.SCORED and done == [Do.START, Do.STOP]
    result = session.result("stack")
    assert (result.success, result.partial, result.interventions) == (success, partial, interventions)
    assert result.ended == ended and result.seconds == 1.0
    session, done = after("k", session)
    assert done == [Do.KEEP] and session.key == TRIALS[1] and session.phase is Phase.SET_UP


def test_a_wrong_key_is_undone_before_and_after_it_is_kept():
    session, _ = after("\nau")
    assert session.phase is Phase.SCORE and session.interventions == 0
    session, done = after("sk", session)
    assert done == [Do.KEEP] and session.at == 1
    before = operator.replace(session, at=0, score="success", seconds=1.0).result("stack")
    session, done = after("u", session)
    assert done == [Do.REOPEN] and session.at == 0 and session.phase is Phase.SCORE
    session = operator.reopened(session, before)
    session, _ = after("f", session)
    assert not session.result("stack").success and session.result("stack").seconds == before.seconds
    session, done = after("u", Session(TRIALS, 30.0))
    assert not done and "no trial before" in session.hint


def test_keys_that_mean_nothing_do_nothing_but_say_so():
    for phase, keys in ((Phase.SET_UP, "kspfanx"), (Phase.RUNNING, "\nkunqx"), (Phase.SCORE, "\nkuqx")):
        for key in keys:
            session, done = operator.press(Session(TRIALS, 30.0, phase=phase), key, 1.0)
            assert not done and session.phase is phase and operator.KEYS[phase] in session.hint


def test_a_key_that_bounces_neither_starts_a_trial_nor_leaves_one():
    every = "\nsk\npk\nfk"
    session, done = after("".join(2 * key for key in every))
    assert session.phase is Phase.DONE and done == 3 * [Do.START, Do.STOP, Do.KEEP]
    assert after("\n\n", session)[1] == []
    session, _ = after("\ns")
    assert after("\n\n", session)[1] == [] and after("\n\n", session)[0].phase is Phase.SCORED


def test_space_stops_the_arms_in_every_phase():
    for phase in Phase:
        session, done = operator.press(Session(TRIALS, 30.0, phase=phase), " ", 4.0)
        assert done == [Do.HALT]
        assert session.phase is (Phase.SCORE if phase is Phase.RUNNING else phase)
    session, _ = after("\n  f")  # the second stop of an arm that is stopped already is no second intervention
    assert session.result("").interventions == 1


def test_the_time_limit_stops_a_trial_and_waits_for_its_score():
    session, _ = after("\n")
    assert operator.tick(session, 29.9) == (session, [])
    session, done = operator.tick(session, 30.1)
    assert done == [Do.STOP] and session.phase is Phase.SCORE and session.seconds == 30.0
    assert operator.tick(session, 99.0) == (session, [])


def test_an_evaluation_goes_on_at_the_first_trial_without_a_result():
    assert Session.resume(TRIALS, 30.0, TRIALS[:2]).key == TRIALS[2]
    assert Session.resume(TRIALS, 30.0, TRIALS).phase is Phase.DONE


def test_a_trial_that_is_done_is_not_played_again_and_u_reopens_the_one_kept_last():
    session, _ = after("\nsk", Session.resume(TRIALS, 30.0, TRIALS[1:2]))
    assert session.key == TRIALS[2] and session.done == (TRIALS[1], TRIALS[0])
    session, done = after("u", session)
    assert done == [Do.REOPEN] and session.key == TRIALS[0]
    session, _ = after("fk\nsk", session)
    assert session.phase is Phase.DONE and set(session.done) == set(TRIALS)


def test_after_a_resume_u_reopens_the_one_kept_last_wherever_it_is_in_the_list():
    session, done = after("u", Session.resume(TRIALS, 30.0, (TRIALS[2], TRIALS[0])))
    assert done == [Do.REOPEN] and session.key == TRIALS[0]


def test_a_wrong_success_at_the_time_limit_is_undone_to_what_ended_the_trial(tmp_path):
    _, ledger, _ = driven(tmp_path, [*"\n", *[""] * 400, *"sku", *"fkq"], FakeRig(), TRIALS[:1])
    (result,) = ledger.results()
    assert (result.success, result.ended, result.seconds) == (False, "time limit", 30.0)


def test_a_result_that_was_deleted_is_set_up_again(tmp_path):
    rig = FakeRig()
    _, ledger, _ = driven(tmp_path, [*"\nskq"], rig, TRIALS[:2])
    kept = ledger.kept()
    keys = iter(["", "u", "", "q"])

    def deleting():
        for key in keys:
            if key == "u":
                ledger.file(kept[0], ".json").unlink()
            yield key

    session, _, said = driven(tmp_path, deleting(), rig, TRIALS[:2])
    assert session.key == TRIALS[0] and session.phase is Phase.SET_UP
    assert "its result was deleted; set this trial up again" in said


class Refused(Exception):
    pass


class FakeRig:
    """Notes what it is told. `troubles`: what it has at the n-th look."""

    errors = (Refused,)

    def __init__(self, troubles=(), refuse=0, deaf_stop=False, deaf_halts=0):
        self.calls, self.looks, self.refuse, self.troubles = [], 0, refuse, dict(troubles)
        self.deaf_stop, self.deaf_halts = deaf_stop, deaf_halts

    def start(self, instruction, film):
        if self.refuse:
            self.refuse -= 1
            raise Refused("/policy/start: no policy server")
        self.calls.append(("start", instruction))
        film.write_bytes(b"film")

    def stop(self):
        if self.deaf_stop:
            raise Refused("/policy/stop: no answer")
        self.calls.append("stop")

    def halt(self):
        if self.deaf_halts:
            self.deaf_halts -= 1
            raise Refused("/arms/stop: no answer")
        self.calls.append("halt")

    def open_hands(self):
        if self.refuse:
            self.refuse -= 1
            raise Refused("/arms/open_hands: busy")
        self.calls.append("open")
        return "opening the hands"

    def trouble(self):
        self.looks += 1
        return self.troubles.get(self.looks)

    def save(self, ledger, key):
        self.calls.append("save")
        return {"jerk_rms": 4.5, "spectral_arc_length": -2.5, "retries": 1}

    def discard(self):
        self.calls.append("discard")


def driven(folder, keys, rig, trials=TRIALS, note="slipped", clock=None, looked=True):
    task = load(Task, "stack_cups")
    ledger, said, clock = Ledger(folder, SETTINGS), [], clock or itertools.count()
    made = {key: make_trial(task, key.seed, key.split) for key in trials}
    session = Session.resume(trials, 30.0, ledger.kept())
    keys = itertools.chain([""] if looked else [], keys)
    session = drive(session, made, ledger, rig, keys, said.append, lambda: note, lambda: next(clock) / 10)
    return session, ledger, "\n".join(said)


def test_a_session_writes_one_result_a_trial_and_can_be_left_and_resumed(tmp_path):
    rig = FakeRig()
    session, ledger, said = driven(tmp_path, [*"\nsk", "", *"\nfnq"], rig)
    assert session.at == 2 and [r.success for r in ledger.results()] == [True, False]
    assert ledger.results()[1].note == "slipped" and ledger.results()[0].jerk_rms > 0
    trial = make_trial(load(Task, "stack_cups"), 0)
    assert rig.calls[:2] == [("start", trial.instruction), "stop"]
    assert trial.instruction in said and placing(trial)[0] in said and trial.task.protocol.reset in said
    session, ledger, _ = driven(tmp_path, [*"u\nsk\npkq"], FakeRig())
    assert session.phase is Phase.DONE  # u reopened trial 1; Enter does nothing until it is scored
    assert [(r.success, r.partial) for r in ledger.results()] == [(True, True), (True, True), (False, True)]


def test_an_enter_from_before_the_first_prompt_starts_nothing(tmp_path):
    """Pressed while the robot was waited for, where nothing seemed to happen."""
    rig = FakeRig()
    session, _, said = driven(tmp_path, ["\n", "\n", "", "q"], rig, looked=False)
    assert session.phase is Phase.SET_UP and not rig.calls and said.count("came before this was shown") == 2
    driven(tmp_path, ["\n", "", "\n", "q"], rig, looked=False)
    assert rig.calls[0][0] == "start"


def test_a_trial_lasts_from_when_the_policy_moved(tmp_path):
    rig, clock = FakeRig(), itertools.count()
    rig.start = lambda instruction, film: [next(clock) for _ in range(100)]  # 10 s until it moves
    _, ledger, _ = driven(tmp_path, [*"\nskq"], rig, TRIALS[:1], clock=clock)
    assert ledger.results()[0].seconds < 1.0


def test_a_server_that_dies_voids_its_trial_and_a_fault_is_scored(tmp_path):
    rig = FakeRig({2: ("void", "no policy server: gone"), 5: ("fault", "arms FAULT: reflex")})
    session, ledger, said = driven(tmp_path, ["\n", "", "", "", "\n", "", "", "f", "k", "q"], rig, TRIALS[:1])
    assert session.phase is Phase.DONE
    assert ledger.voids()[0]["reason"] == "no policy server: gone" and "set this trial up again" in said
    (result,) = ledger.results()
    assert result.interventions == 1 and not result.success and "reflex" in said
    assert result.ended == "stopped: arms FAULT: reflex" and result.drops is None
    report = reports.summarise(SETTINGS, [result])
    assert report["failures"] == {"stopped": 1} and report["drops"] is None


def test_an_interrupted_trial_is_void_and_its_arms_are_stopped(tmp_path):
    def interrupted():
        yield from ["\n", ""]
        raise KeyboardInterrupt

    rig = FakeRig()
    with pytest.raises(KeyboardInterrupt):
        driven(tmp_path, interrupted(), rig)
    assert rig.calls[1:] == ["stop", "discard"]
    assert [(line["seed"], line["reason"]) for line in Ledger(tmp_path, SETTINGS).voids()] == [
        (0, "interrupted")
    ]
    with pytest.raises(KeyboardInterrupt):  # nothing runs: nothing is void
        driven(tmp_path, (_ for _ in ()).throw(KeyboardInterrupt), FakeRig())
    assert len(Ledger(tmp_path, SETTINGS).voids()) == 1


def test_a_score_that_was_given_counts_though_an_interrupt_comes_before_k(tmp_path):
    def interrupted(keys):
        yield from keys
        raise KeyboardInterrupt

    def outcome():
        ledger = Ledger(tmp_path, SETTINGS)
        return [(r.key.seed, r.success) for r in ledger.results()], [v["reason"] for v in ledger.voids()]

    with pytest.raises(KeyboardInterrupt):
        driven(tmp_path, interrupted("\nf"), FakeRig())
    assert outcome() == ([(0, False)], [])
    with pytest.raises(KeyboardInterrupt):
        driven(tmp_path, interrupted("u"), FakeRig())
    assert outcome() == ([(0, False)], []), "reopened and not scored again: it stands"
    with pytest.raises(KeyboardInterrupt):
        driven(tmp_path, interrupted("us"), FakeRig())
    assert outcome() == ([(0, True)], [])
    rig = FakeRig({2: ("fault", "arms FAULT: reflex")})
    with pytest.raises(KeyboardInterrupt):
        driven(tmp_path, interrupted(["\n", "", ""]), rig)
    assert outcome() == ([(0, True)], ["interrupted before it was scored"])
    driven(tmp_path, ["\n", ""], FakeRig())
    assert outcome()[1][-1] == "interrupted", "the keys ended while it ran"


def test_the_operator_is_told_all_that_a_seed_decides():
    """A cloth's pattern, size and turn: what makes the unseen split unseen."""
    trial = make_trial(load(Task, "cover_object"), 0, "unseen")
    cloth, thing = trial.workcell.props
    text = "\n".join(placing(trial))
    assert f"cloth of {100 * cloth.size_m:.0f} cm" in text and "turned by" in text
    assert cloth.pattern in text and thing.pattern in text and thing.kind in text
    lines = placing(make_trial(load(Task, "stack_cups"), 0))
    assert not any("turned" in line for line in lines), "cups are round"


def test_a_refused_start_leaves_the_trial_to_be_set_up_again(tmp_path):
    rig = FakeRig(refuse=1)
    session, ledger, said = driven(tmp_path, ["\n", "", *"\nskq"], rig, TRIALS[:1])
    assert "refused: /policy/start" in said and len(ledger.results()) == 1 and session.phase is Phase.DONE


def test_an_enter_pressed_while_a_start_was_refused_starts_nothing(tmp_path):
    rig = FakeRig(refuse=1)
    session, _, _ = driven(tmp_path, [*"\n\n\n"], rig)
    assert session.phase is Phase.SET_UP and ("start",) not in {call[:1] for call in rig.calls}
    session, _, _ = driven(tmp_path, ["\n", "\n", "", "\n"], rig)
    assert session.phase is Phase.RUNNING


@pytest.mark.parametrize("key", "uqs")
def test_a_key_in_the_moment_of_a_void_does_nothing_to_any_trial(tmp_path, key):
    rig = FakeRig({2: ("void", "no policy server: gone")})
    session, ledger, _ = driven(tmp_path, [*"\nsk", "\n", key], rig)
    assert session.key == TRIALS[1] and session.phase is Phase.SET_UP
    assert [r.key for r in ledger.results()] == [TRIALS[0]] and rig.calls.count("save") == 1
    assert [Key(v["split"], v["seed"]) for v in ledger.voids()] == [TRIALS[1]]


def test_a_trial_scored_again_after_a_resume_keeps_what_was_measured(tmp_path):
    _, ledger, _ = driven(tmp_path, [*"\nskq"], FakeRig())
    (before,) = ledger.results()
    _, ledger, _ = driven(tmp_path, [*"ufkq"], FakeRig())
    (after_it,) = ledger.results()
    assert not after_it.success and after_it.jerk_rms == before.jerk_rms == 4.5
    assert (after_it.spectral_arc_length, after_it.retries) == (-2.5, 1)


def test_o_opens_the_hands_while_a_trial_is_set_up_and_at_no_other_time(tmp_path):
    rig = FakeRig(refuse=1)
    session, _, said = driven(tmp_path, [*"oo\noso", *"koq"], rig, TRIALS[:1])
    assert session.phase is Phase.DONE and rig.calls.count("open") == 1 and rig.calls[0] == "open"
    assert "refused: /arms/open_hands: busy" in said and said.count("'o' does nothing here") == 3


def test_a_policy_that_does_not_stop_has_its_arms_stopped(tmp_path):
    rig = FakeRig(deaf_stop=True)
    session, ledger, said = driven(tmp_path, [*"\nskq"], rig, TRIALS[:1])
    assert rig.calls[1:3] == ["halt", "save"] and "did not stop" in said and ALARM not in said
    assert session.phase is Phase.DONE and ledger.results()[0].success


@pytest.mark.parametrize("key", "s ")
def test_arms_that_do_not_answer_raise_the_alarm_and_the_trial_goes_on(tmp_path, key):
    rig = FakeRig(deaf_stop=True, deaf_halts=2 * HALT_TRIES)
    session, ledger, said = driven(tmp_path, ["\n", key, "k"], rig, TRIALS[:1])
    assert session.phase is Phase.RUNNING and ALARM in said and "save" not in rig.calls
    assert "latched: vipra recover" not in said and not ledger.results()
    rig = FakeRig(deaf_stop=True, deaf_halts=HALT_TRIES - 1)
    session, ledger, said = driven(tmp_path, ["\n", key], rig, TRIALS[:1])
    assert ALARM in said and "halt" in rig.calls and session.phase in (Phase.SCORE, Phase.SCORED)


def test_space_stops_the_arms_while_a_start_is_waited_for(tmp_path):
    rig, entered, halted = FakeRig(), threading.Event(), threading.Event()

    def start(instruction, film):
        entered.set()
        assert halted.wait(20.0)
        raise Refused("arms STOPPED")

    def keys():
        yield "\n"
        assert entered.wait(20.0)
        yield " "

    rig.start = start
    with Listener(keys(), halted.set) as heard:
        session, _, said = driven(tmp_path, heard, rig)
    assert session.phase is Phase.SET_UP and "arms STOPPED" in said and rig.calls[-1] == "halt"


def test_a_note_is_typed_with_spaces_and_two_in_a_row_stop_the_arms(capsys):
    halts = []

    def keys():
        while not heard.typing:
            yield ""
        yield from "über mn\x7fy edge"
        yield "?" if halts else "!"
        yield from "  \n"

    heard = Listener(keys(), lambda: halts.append(1))
    with heard:
        assert heard.line() == "über my edge!  " and len(halts) == 1
        assert list(heard) == [] and "note: über my edge" in capsys.readouterr().out


def test_arrow_and_function_keys_score_nothing(tmp_path):
    """rxvt's Shift+Up sends ESC [ a, a keypad in application mode ESC O p."""
    sent = tmp_path / "keys"
    for sequence in (b"\x1b[a", b"\x1bOp", b"\x1b[1;2A"):
        sent.write_bytes(sequence)
        with sent.open("rb") as file:
            assert list(pressed(file)) == ["\x1b", "q"]
    sent.write_bytes("nä s\x04".encode())
    with sent.open("rb") as file:
        assert "".join(pressed(file)) == "nä sqq"
    assert after("\n\x1b")[1] == [Do.START]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            "--policy mine --operator --preset 3.5hz",
            "--preset means nothing with --operator: it is the bring",
        ),
        ("--policy mine --operator --latency-ms 0", "--latency-ms means nothing with --operator"),
        ("--policy mine --operator --no-video", "--no-video means nothing with --operator: every trial"),
        ("--policy mine --live --no-video", "--no-video means nothing with --live"),
        ("--policy expert --preset 7hz", "--preset means nothing with --policy expert: it asks no server"),
        ("--policy expert --operator", "--operator: the expert plays in lockstep"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, capsys, options, error):
    with pytest.raises(SystemExit):
        evaluate.main(["stack_cups", "--seeds", "0:2", "--out", str(tmp_path / "a"), *options.split()])
    assert error in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_an_operators_list_gives_the_trials_in_its_order(tmp_path):
    path = tmp_path / "seeds.txt"
    path.write_text("# Monday\n12\n\n3  # cups far apart\n")
    assert evaluate.keys_of(str(path), "both") == [
        *(Key("seen", 12), Key("seen", 3)),
        *(Key("unseen", 12), Key("unseen", 3)),
    ]
    for text, error in (
        ("1\n-2", "line 2: '-2' is no seed"),
        ("1\n1 # again", "line 2: seed 1 is there twice"),
        ("# none", "lists no seed"),
    ):
        path.write_text(text)
        with pytest.raises(EvaluationError, match=error):
            evaluate.keys_of(str(path), "seen")
    with pytest.raises(
        EvaluationError, match=r"'none\.txt' is not A:B with A below B, such as 0:50, and no file"
    ):
        evaluate.keys_of("none.txt", "seen")


def test_a_robot_with_other_arms_is_refused(tmp_path):
    task = load(Task, "stack_cups")
    with pytest.raises(EvaluationError, match=r"has arms left, right, stack_cups is for right: .*`workcell`"):
        live.run(task, "mine", "franka_bimanual", list(TRIALS), 30.0, tmp_path / "a", [], print)
    assert not (tmp_path / "a").exists()
