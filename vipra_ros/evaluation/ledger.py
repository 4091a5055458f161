"""Which trials are done and what came of them: one small file a trial, written whole or not at all.

DIR/settings.json               what is evaluated; an evaluation goes on only under the same settings
DIR/trials/seen-0012.json       a Result, written last: a trial counts once this is there
DIR/trials/seen-0012.npz .mp4 .jpg
DIR/void.jsonl                  trials that do not count, and why
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from config.loading import load
from config.safety import Safety
from config.task import Task
from simulation.tasks.trial import digest, scene

GIVE_UP = 3  # attempts at one trial


class EvaluationError(RuntimeError):
    """An evaluation cannot go on; the message says why and what to do."""


class Void(RuntimeError):
    """The trial says nothing about the policy and is repeated: the server died, say."""


@dataclass(frozen=True, order=True)
class Key:
    """One trial of an evaluation. At the robot the seed is its number in the operator's list."""

    split: str
    seed: int

    def __str__(self) -> str:
        return f"{self.split}-{self.seed:04d}"


@dataclass(frozen=True)
class Result:
    """What came of a trial. `partial`: the right object was grasped, which every success includes."""

    seed: int
    split: str
    success: bool
    partial: bool
    seconds: float  # to the success, or to the end
    interventions: int  # safety holds and faults in simulation, the operator's at the robot
    ended: str  # success, time limit, expert finished, operator, aborted, or stopped: why
    instruction: str = ""
    # None, from here on: nobody measured it, as at the robot.
    wrong_object: bool | None = None  # another object was lifted first
    drops: int | None = None  # the object was lifted and came down beside its place
    retries: int | None = None  # a hand was told to close again
    jerk_rms: float | None = None  # rad/s^3
    spectral_arc_length: float | None = None
    chunks: int | None = None  # executed, at least in part
    refused: int | None = None  # chunks that a safety check refused
    limited: dict[str, int] | None = None  # joint targets the safety checks changed, by kind
    note: str = ""
    real_time_factor: float | None = None  # simulated seconds a second, on the running stack
    latency_ms: float | None = None  # median of its newest requests, simulated time

    @property
    def key(self) -> Key:
        return Key(self.split, self.seed)


class Holds:
    """Counts how often a safety check made the arms hold, from their states one after the other."""

    PAUSES = ("starved", "let_go", "stall", "")  # codes of holding without any safety check's doing

    def __init__(self):
        self.count, self._before = 0, ""

    def see(self, state: str, code: str) -> None:
        """A `State` of the arms by its value, and its code."""
        now = code if state == "HOLDING" else ""
        self.count += now != self._before and now not in self.PAUSES
        self._before = now


def trial_settings(task: Task, limit_s: float, safety: str) -> dict:
    """What makes a seed the same trial everywhere; `limits` changes with the safety limits."""
    limits = digest(load(Safety, safety).model_dump(mode="json"))
    return {"task": task.name, "time_limit_s": limit_s, "scene": scene(task), "limits": limits}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One evaluation at a time in `folder`. Raises EvaluationError while another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvaluationError(
                f"{folder}: another evaluation is at work there: let it end, or choose another --out"
            ) from None
        yield


class Ledger:
    """The folder of one evaluation."""

    def __init__(self, folder: Path, settings: dict):
        """Raises EvaluationError, naming the difference, if `folder` holds another evaluation."""
        self.folder, self.trials = Path(folder), Path(folder) / "trials"
        self.trials.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            for name, value in read_json(path).items():
                if settings.get(name) != value:
                    raise EvaluationError(
                        f"{self.folder} holds an evaluation with {name} {value!r}, not "
                        f"{settings.get(name)!r}: choose another --out, or the same settings to go on"
                    )
        write_atomically(path, json.dumps(settings, indent=2) + "\n")

    def file(self, key: Key, suffix: str) -> Path:
        """The trial's video (".mp4"), trajectory (".npz"), last picture (".jpg") or result (".json")."""
        return self.trials / f"{key}{suffix}"

    def results(self) -> list[Result]:
        """Trials that count, by split and seed. Raises EvaluationError for a file that is no result."""
        found = []
        for path in sorted(self.trials.glob("*.json")):
            try:
                found.append(Result(**read_json(path)))
            except TypeError as error:
                raise EvaluationError(
                    f"{path} is no trial's result ({error}): delete it to repeat it"
                ) from None
        return sorted(found, key=lambda result: result.key)

    def kept(self) -> list[Key]:
        """Trials that count, in the order their results were written."""
        return sorted(
            (result.key for result in self.results()),
            key=lambda key: self.file(key, ".json").stat().st_mtime_ns,
        )

    def missing(self, wanted: Iterable[Key]) -> list[Key]:
        """Of `wanted`, in order, those without a result."""
        return [key for key in wanted if not self.file(key, ".json").is_file()]

    def write(self, result: Result) -> None:
        """From now on the trial counts."""
        write_atomically(self.file(result.key, ".json"), json.dumps(asdict(result), indent=2) + "\n")

    def void(self, key: Key, reason: str) -> None:
        """Note that an attempt does not count, and remove what it left."""
        for suffix in (".npz", ".mp4", ".jpg"):
            self.file(key, suffix).unlink(missing_ok=True)
        with open(self.folder / "void.jsonl", "a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # a power cut ended the last line
                file.write(b"\n")
            file.write(json.dumps({"split": key.split, "seed": key.seed, "reason": reason}).encode() + b"\n")

    def voids(self) -> list[dict]:
        """Attempts that do not count, oldest first."""
        path, found = self.folder / "void.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):  # one that a power cut ended
                found.append(json.loads(line))
        return found


def run_trials(
    ledger: Ledger,
    wanted: Iterable[Key],
    play: Callable[[Key], Result],
    repair: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Play what is missing. A Void attempt is noted and repeated after `repair`; the others stand.

    Raises EvaluationError after GIVE_UP void attempts at one trial.
    """
    for key in ledger.missing(wanted):
        for attempt in range(1, GIVE_UP + 1):
            try:
                result = play(key)
            except Void as error:
                ledger.void(key, str(error))
                tell(f"{key}: void: {error}")
                if attempt == GIVE_UP:
                    raise EvaluationError(
                        f"{key} was void {GIVE_UP} times, the last time because {error}; the trials before "
                        "it are kept: repair it and give the same command again"
                    ) from error
                repair()
            else:
                ledger.write(result)
                outcome = "success" if result.success else "partial" if result.partial else "fail"
                tell(f"{key}: {outcome} after {result.seconds:.1f} s ({result.ended})")
                break


def write_atomically(path: Path, text: str) -> None:
    """`path` holds the old content or all of the new, whenever this is interrupted."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path) -> dict:
    """Raises EvaluationError for a file that is missing or no JSON object."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise EvaluationError(f"{path} holds no JSON object")
    return data
