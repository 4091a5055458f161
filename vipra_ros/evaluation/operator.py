"""Trials at the robot: what the operator's keys do. Pure; `live` reads keys and carries out what is asked.

    SET_UP   the reset text is shown           Enter starts the policy, o opens the hands
    RUNNING  the policy moves the arms         s, p, f, a end the trial and score it; the limit ends it too
    SCORE    stopped, not scored yet           s, p, f, a
    SCORED   scored, not yet kept              k keeps it and goes on, u takes the score back, n notes
    DONE     every trial is scored

At any time space stops the arms at once (`Do.HALT`, latched; the emergency stop is the hardware's); while a
note is typed, two spaces in a row do. In SET_UP u reopens the trial that was kept last. A key that means
nothing here does nothing but say so. No key that is pressed twice does two things: nothing but Enter moves
the arms, and Enter does nothing else.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vipra_ros.evaluation.ledger import Key, Result


class Phase(enum.Enum):
    SET_UP = "set up"
    RUNNING = "running"
    SCORE = "score"
    SCORED = "scored"
    DONE = "done"


class Do(enum.Enum):
    """What a key asks for, in order."""

    START = "let the policy move the arms"
    STOP = "stop the policy; the arms decelerate and hold"
    HALT = "stop the arms at once and latch"
    KEEP = "write `score`: the trial counts"
    REOPEN = "the trial `key` is scored again; until that is kept it counts as it was"
    OPEN = "open the hands"
    NOTE = "ask for a line of text and give it to `noted`"
    LEAVE = "end; the same command goes on here"


SCORES = {"s": "success", "p": "partial", "f": "fail", "a": "aborted"}
ENTER, SPACE = ("\r", "\n"), " "
KEYS = {
    Phase.SET_UP: "Enter start, o open the hands, u reopen the last trial, space stop the arms, q leave",
    Phase.RUNNING: "s success, p partial, f fail, a abort, space stop the arms",
    Phase.SCORE: "s success, p partial, f fail, a abort, n note",
    Phase.SCORED: "k keep and go on, u undo, n note, q keep and leave",
    Phase.DONE: "u reopen the last trial, q leave",
}


@dataclass(frozen=True)
class Session:
    """Where the operator is. `trials`: all of them, in order; `at`: the present one's place; `done`: those
    that count, the one kept last at the end.
    """

    trials: tuple[Key, ...]
    limit_s: float
    done: tuple[Key, ...] = ()
    at: int = 0
    phase: Phase = Phase.SET_UP
    started_s: float = 0.0
    seconds: float = 0.0  # that the policy moved
    interventions: int = 0  # the operator stopped the arms, or aborted
    faults: int = 0  # the arms stopped by themselves
    score: str | None = None
    ended: str = "operator"  # what ended the trial, where that was not the operator's success or abort
    note: str = ""
    hint: str = ""

    @classmethod
    def resume(cls, trials: tuple[Key, ...], limit_s: float, done: Sequence[Key]) -> "Session":
        """At the first trial that is not in `done`, which are in the order they were kept."""
        return _next(cls(trials, limit_s, tuple(key for key in done if key in trials)))

    @property
    def key(self) -> Key | None:
        """The present trial; None when all are done."""
        return self.trials[self.at] if self.at < len(self.trials) else None

    def result(self, instruction: str) -> Result:
        """The present trial's, once it is scored."""
        stopped = "aborted" if self.score == "aborted" else self.ended
        return Result(
            seed=self.key.seed,
            split=self.key.split,
            success=self.score == "success",
            partial=self.score in ("success", "partial"),
            seconds=round(self.seconds, 2),
            interventions=self.interventions + self.faults,
            ended="success" if self.score == "success" else stopped,
            instruction=instruction,
            note=self.note,
        )


def press(session: Session, key: str, now: float) -> tuple[Session, list[Do]]:
    """The operator pressed `key` at `now` s: the new session, and what to do in order."""
    session = replace(session, hint="")
    if key == SPACE:
        return _halt(session, now)
    if session.phase is Phase.SET_UP:
        if key in ENTER:
            running = started(replace(session, phase=Phase.RUNNING), now)
            fresh = {"interventions": 0, "faults": 0, "score": None, "note": "", "ended": "operator"}
            return replace(running, **fresh), [Do.START]
        if key == "o":
            return session, [Do.OPEN]
        if key == "u":
            return _reopen(session)
        if key == "q":
            return session, [Do.LEAVE]
    elif session.phase is Phase.RUNNING and key in SCORES:
        session = replace(session, seconds=now - session.started_s)
        return _score(session, key), [Do.STOP]
    elif session.phase is Phase.SCORE:
        if key in SCORES:
            return _score(session, key), []
        if key == "n":
            return session, [Do.NOTE]
    elif session.phase is Phase.SCORED:
        if key in ("k", "q"):
            kept = replace(session, done=(*session.done, session.key))
            return _next(kept), [Do.KEEP, *([Do.LEAVE] if key == "q" else [])]
        if key == "u":
            aborted = session.score == "aborted"
            taken = session.interventions - aborted
            return replace(session, phase=Phase.SCORE, score=None, interventions=taken), []
        if key == "n":
            return session, [Do.NOTE]
    elif session.phase is Phase.DONE:
        if key == "u":
            return _reopen(session)
        if key == "q":
            return session, [Do.LEAVE]
    return replace(session, hint=f"{key!r} does nothing here: {KEYS[session.phase]}"), []


def started(session: Session, now: float) -> Session:
    """`Do.START` is done: the trial's time counts from here."""
    return replace(session, started_s=now, seconds=0.0)


def tick(session: Session, now: float) -> tuple[Session, list[Do]]:
    """Time passes: a trial that reaches its limit is stopped and waits for its score."""
    if session.phase is Phase.RUNNING and now - session.started_s >= session.limit_s:
        over = {
            "seconds": session.limit_s,
            "ended": "time limit",
            "hint": f"time limit {session.limit_s:g} s",
        }
        return replace(session, phase=Phase.SCORE, **over), [Do.STOP]
    return session, []


def faulted(session: Session, reason: str, now: float) -> Session:
    """The arms or the policy stopped by themselves."""
    if session.phase is not Phase.RUNNING:
        return session
    told = {"faults": session.faults + 1, "ended": f"stopped: {reason}", "hint": reason}
    return replace(session, phase=Phase.SCORE, seconds=now - session.started_s, **told)


def void(session: Session, reason: str) -> Session:
    """The trial says nothing about the policy, or did not begin: set it up again."""
    return replace(session, phase=Phase.SET_UP, hint=f"void: {reason}; set this trial up again")


def reopened(session: Session, result: Result) -> Session:
    """The trial of `Do.REOPEN` is to be scored again: what else is known of it."""
    stops = result.interventions - (result.ended == "aborted")
    limit = "time limit" if result.seconds >= session.limit_s else "operator"
    ended = limit if result.ended in ("success", "aborted") else result.ended
    known = {"seconds": result.seconds, "interventions": stops, "note": result.note, "ended": ended}
    return replace(session, faults=0, **known)


def noted(session: Session, text: str) -> Session:
    return replace(session, note="; ".join(filter(None, [session.note, text.strip()])))


def _halt(session: Session, now: float) -> tuple[Session, list[Do]]:
    hint = "arms stopped and latched: vipra recover, then go on here"
    if session.phase is not Phase.RUNNING:
        return replace(session, hint=hint), [Do.HALT]
    seconds, count = now - session.started_s, session.interventions + 1
    stopped = replace(session, phase=Phase.SCORE, seconds=seconds, interventions=count, hint=hint)
    return stopped, [Do.HALT]


def _score(session: Session, key: str) -> Session:
    aborted = SCORES[key] == "aborted"
    count = session.interventions + aborted
    return replace(session, phase=Phase.SCORED, score=SCORES[key], interventions=count)


def _next(session: Session) -> Session:
    """At the first trial that is not done."""
    at = next((i for i, key in enumerate(session.trials) if key not in session.done), len(session.trials))
    return replace(session, at=at, phase=Phase.DONE if at == len(session.trials) else Phase.SET_UP)


def _reopen(session: Session) -> tuple[Session, list[Do]]:
    if not session.done:
        return replace(session, hint="there is no trial before this one"), []
    at, done = session.trials.index(session.done[-1]), session.done[:-1]
    return replace(session, at=at, done=done, phase=Phase.SCORE, score=None), [Do.REOPEN]
