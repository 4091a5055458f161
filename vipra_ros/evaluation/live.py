"""Trials on a running graph: reads the operator's keys and carries out what `operator` asks for.

Only `run` imports ROS, when called.
"""

import codecs
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from config.loading import load
from config.robot import Robot
from config.safety import Safety
from config.task import Task
from config.workcell import Workcell
from simulation.tasks.trial import Trial, make_trial, placing
from vipra_ros.evaluation import operator
from vipra_ros.evaluation import report as reports
from vipra_ros.evaluation.ledger import EvaluationError, Key, Ledger, locked, trial_settings
from vipra_ros.evaluation.operator import Do, Phase, Session
from vipra_ros.evaluation.rig import GraphRig, Rig, played

POLL_S = 0.05
MEASURED = ("jerk_rms", "spectral_arc_length", "retries")  # fields of a result, by `motion`
HALT_TRIES = 3
ALARM = "THE ARMS ARE NOT KNOWN TO BE STOPPED: press the hardware's emergency stop"


def drive(
    session: Session,
    trials: dict[Key, Trial],
    ledger: Ledger,
    rig: Rig,
    keys: Iterable[str],
    tell: Callable[[str], None],
    ask: Callable[[], str],
    now: Callable[[], float],
) -> Session:
    """Until every trial is scored and left, or the keys end. `keys` yields "" while none is pressed; an Enter
    that was waiting before the first prompt starts nothing.
    """
    measured: dict[Key, dict[str, float | None]] = {}  # by `motion`
    shown, fresh = None, False
    try:
        for key in keys:
            fresh = fresh or not key
            if (session.key, session.phase) != shown:
                shown = session.key, session.phase
                tell(prompt(session, trials))
            before = session
            session, todo = operator.tick(session, now())
            trouble = rig.trouble() if session.phase is Phase.RUNNING else None
            if trouble is not None:
                kind, reason = trouble
                todo = [Do.STOP]
                if kind == "void":
                    session = operator.void(session, reason)
                else:
                    session = operator.faulted(session, reason, now())
            # Pressed before the operator could know of the trouble, or that a start was refused.
            stale = (trouble and trouble[0] == "void") or (key in operator.ENTER and (trouble or not fresh))
            if stale and key in operator.ENTER and session.phase is Phase.SET_UP:
                tell("that Enter came before this was shown: once more, when everyone has stepped back")
            if key == operator.SPACE or (key and not stale):
                if session.hint:
                    tell(session.hint)
                session, pressed = operator.press(session, key, now())
                todo = [*todo, *pressed]
            for do in todo:
                if do is Do.START:
                    try:
                        rig.start(trials[session.key].instruction, ledger.file(session.key, ".mp4"))
                    except rig.errors as error:
                        stop(rig, tell)  # it may have started all the same
                        rig.discard()
                        session, fresh = operator.void(session, f"refused: {error}"), False
                    else:
                        session = operator.started(session, now())
                elif do in (Do.STOP, Do.HALT):
                    if not (stop if do is Do.STOP else halt)(rig, tell):
                        session = before  # nothing was stopped, so nothing is scored
                        break
                elif do is Do.OPEN:
                    try:
                        tell(rig.open_hands())
                    except rig.errors as error:
                        tell(f"refused: {error}")
                elif do is Do.NOTE:
                    session = operator.noted(session, ask())
                elif do is Do.REOPEN:
                    result = next((r for r in ledger.results() if r.key == session.key), None)
                    if result is None:
                        session = operator.void(session, "its result was deleted")
                        continue
                    smooth = {name: getattr(result, name) for name in MEASURED}
                    measured.setdefault(session.key, smooth)
                    session = operator.reopened(session, result)
                elif do is Do.LEAVE:
                    return session
                elif do is Do.KEEP:  # the trial that `operator.press` has just left
                    scored = operator.replace(session, at=session.trials.index(session.done[-1]))
                    _write(scored, trials, ledger, measured)
            if before.phase is Phase.RUNNING and session.phase in (Phase.SCORE, Phase.SCORED):
                measured[before.key] = rig.save(ledger, before.key)
            elif before.phase is Phase.RUNNING and session.phase is Phase.SET_UP:
                rig.discard()
                ledger.void(before.key, reason)
                fresh = False
            if session.hint:
                tell(session.hint)
                session = operator.replace(session, hint="")
    except KeyboardInterrupt:
        _break_off(session, trials, ledger, rig, measured, tell)
        raise
    _break_off(session, trials, ledger, rig, measured, tell)
    return session


def _break_off(
    session: Session, trials: dict, ledger: Ledger, rig: Rig, measured: dict, tell: Callable[[str], None]
) -> None:
    """The keys ended or an interrupt came: a given score counts, and nothing ends without a line."""
    if session.phase is Phase.RUNNING:
        stop(rig, tell)
        rig.discard()
        ledger.void(session.key, "interrupted")
    elif session.phase is Phase.SCORED:
        _write(session, trials, ledger, measured)
        tell(f"{session.key} is kept as {session.score}")
    elif session.phase is Phase.SCORE and ledger.missing([session.key]):  # else it was reopened: it stands
        ledger.void(session.key, "interrupted before it was scored")


def stop(rig: Rig, tell: Callable[[str], None]) -> bool:
    """Stop the policy, or the arms where it does not answer; False: neither is known to be stopped."""
    try:
        rig.stop()
    except rig.errors as error:
        tell(f"the policy did not stop, so the arms are stopped and latched: {error}")
        return halt(rig, tell)
    return True


def halt(rig: Rig, tell: Callable[[str], None]) -> bool:
    """Stop the arms and latch; False, with an alarm, when they do not say that they do."""
    for _ in range(HALT_TRIES):
        try:
            rig.halt()
        except rig.errors as error:
            tell(f"{ALARM} ({error})")
        else:
            return True
    return False


def _write(session: Session, trials: dict, ledger: Ledger, measured: dict[Key, dict]) -> None:
    """The result of the present trial, which is scored."""
    result = session.result(trials[session.key].instruction)
    ledger.write(operator.replace(result, **measured.get(session.key, {})))


def prompt(session: Session, trials: dict[Key, Trial]) -> str:
    """What the operator is to do now."""
    if session.key is None:
        return f"all {len(session.trials)} trials are scored. {operator.KEYS[Phase.DONE]}"
    trial = trials[session.key]
    head = f"trial {session.at + 1} of {len(session.trials)} ({session.key})"
    if session.phase is Phase.SET_UP:
        protocol = trial.task.protocol
        lines = [f"\n{head}: {trial.instruction}", f"  {protocol.set_up}", f"  {protocol.reset}"]
        return "\n".join([*lines, *(f"    {line}" for line in placing(trial)), operator.KEYS[Phase.SET_UP]])
    if session.phase is Phase.SCORE:
        return f"{head}: {trial.task.protocol.scoring}\n{operator.KEYS[Phase.SCORE]}"
    score = f" {session.score} after {session.seconds:.1f} s" if session.score else ""
    return f"{head} {session.phase.value}{score}. {operator.KEYS[session.phase]}"


class Listener:
    """Keys read in a thread of their own: space stops the arms at once, whatever the trial waits for.

    Iterates over `keys`, with "" while none is pressed. `typing`: a line is typed, in which a space is text
    and two in a row stop the arms.
    """

    def __init__(self, keys: Iterable[str], stop_arms: Callable[[], object]):
        self.typing = False
        self._keys, self._stop_arms, self._over = keys, stop_arms, False
        self._heard: queue.Queue[str | None] = queue.Queue()  # None: no more
        self._thread = threading.Thread(target=self._listen, name="keys", daemon=True)

    def _listen(self) -> None:
        before = ""
        try:
            for key in self._keys:
                if self._over:
                    return
                if key == operator.SPACE and (before == operator.SPACE or not self.typing):
                    self._stop_arms()
                if key:
                    before = key
                    self._heard.put(key)
        finally:
            self._heard.put(None)

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                key = self._heard.get(timeout=POLL_S)
            except queue.Empty:
                key = ""
            if key is None:
                self._heard.put(None)
                return
            yield key

    def line(self) -> str:
        """A line of text, shown while it is typed."""
        self.typing, text = True, ""
        print("note: ", end="", flush=True)
        for key in filter(None, self):
            if key in operator.ENTER:
                break
            text = text[:-1] if key in ("\x7f", "\b") else text + key if key.isprintable() else text
            print(f"\r\x1b[Knote: {text}", end="", flush=True)
        self.typing = False
        print(flush=True)
        return text

    def __enter__(self) -> "Listener":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over = True
        self._thread.join(10.0)


def run(
    task: Task,
    policy: str,
    robot: str,
    wanted: list[Key],
    limit_s: float,
    out: Path,
    keys: Iterable[str],
    tell: Callable[[str], None],
    ask: Callable[[], str] | None = None,
) -> int:
    """Trials on the running graph; 0 when every one is scored, 1 when some are left for later.

    ask: gives the text of a note; without it, it is typed with `keys`.
    """
    from vipra_ros.monitor import Monitor
    from vipra_ros.process import signals_raise, wait_for

    arms, needed = tuple(load(Robot, robot).arms), load(Workcell, task.workcell).arms
    if set(arms) != set(needed):
        raise EvaluationError(
            f"{robot} has arms {', '.join(arms)}, {task.name} is for {', '.join(needed)}: name another "
            "--robot, or copy the task's file and set its `workcell` and `arm`"
        )
    trials = {key: make_trial(task, key.seed, key.split) for key in wanted}

    with signals_raise(), locked(out), Monitor() as monitor:
        safety = load(Robot, robot).safety
        rig = GraphRig(monitor, arms, load(Safety, safety).gripper, tell)

        def stop_arms() -> None:
            tell("stopping the arms")
            halt(rig, tell)

        with Listener(keys, stop_arms) as heard:
            wait_for(
                lambda: monitor.status("policy"),
                10.0,
                "the policy node's status: is the robot up (vipra up)?",
            )
            rig.evaluated = wait_for(
                lambda: (now := played(monitor.status("policy")))["model"] and now,
                10.0,
                "the policy node's connection to a policy server: is one served (vipra serve)?",
            )
            played_by = {"policy": policy, "trials": "by an operator", "robot": robot}
            settings = trial_settings(task, limit_s, safety) | played_by | rig.evaluated
            ledger = Ledger(out, settings)
            session = Session.resume(tuple(wanted), limit_s, ledger.kept())
            try:
                session = drive(session, trials, ledger, rig, heard, tell, ask or heard.line, time.monotonic)
            except KeyboardInterrupt:
                tell("interrupted: a trial that ran does not count")
            finally:
                stop(rig, tell)
                rig.discard()
                report = reports.write(ledger, settings, [f"Scoring: {task.protocol.scoring}"])
                tell(f"{reports.in_one_line(report)}; report: {out / 'report.html'}")
    return 0 if session.phase is Phase.DONE else 1


def run_at_keyboard(task: Task, policy: str, robot: str, wanted: list[Key], limit_s: float, out: Path) -> int:
    """`vipra evaluate --operator`."""
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    from vipra_ros.recording.keyboard import raw_keys

    with raw_keys():
        return run(
            task, policy, robot, wanted, limit_s, out, pressed(sys.stdin), lambda s: print(s, flush=True)
        )


def pressed(file) -> Iterator[str]:
    """Keys as they come, "" while none does; an arrow or function key is one escape character."""
    from vipra_ros.recording.keyboard import ESCAPE, skip_sequence

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        if not select.select([file], [], [], POLL_S)[0]:
            yield ""
        elif data := os.read(file.fileno(), 1):
            if data == ESCAPE:
                skip_sequence(file)
            yield "q" if data == b"\x04" else decoder.decode(data)
        else:
            yield "q"
            return
