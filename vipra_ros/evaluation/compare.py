"""Two policies on the same trials: who succeeds where the other fails, and whether that can be chance."""

from dataclasses import dataclass
from pathlib import Path

from vipra_ros.evaluation.ledger import EvaluationError, read_json
from vipra_ros.evaluation.statistics import mcnemar

SAME = ("task", "time_limit_s")  # without which trials of a seed are not the same trial
_SHOWN = 12  # differing seeds named in an error


@dataclass(frozen=True)
class Comparison:
    """Paired by split and seed; p-values of McNemar's exact two-sided test."""

    names: tuple[str, str]
    task: str
    trials: int
    success: tuple[float, float]
    partial: tuple[float, float]
    only_a: list[str]  # trials in which only A succeeded
    only_b: list[str]
    p: float
    p_partial: float
    notes: list[str]  # settings that differ

    @property
    def difference(self) -> float:
        """Success rate of B less that of A."""
        return self.success[1] - self.success[0]


def compare(path_a: Path, path_b: Path) -> Comparison:
    """Two report.json, or their folders.

    Raises EvaluationError that names the difference when they are not of the same trials.
    """
    a, b = _read(path_a), _read(path_b)
    for name in SAME:
        if a[name] != b[name]:
            raise EvaluationError(
                f"{name} differs: {a[name]} in {path_a}, {b[name]} in {path_b}: only the same trials compare"
            )
    scenes = [report.get("settings", {}).get("scene") for report in (a, b)]
    if all(scenes) and scenes[0] != scenes[1]:
        raise EvaluationError(
            f"{a['task']} was another task or workcell file in {path_a} than in {path_b}: the same seeds are "
            "other trials: evaluate both again with one of them"
        )
    trials_a, trials_b = _by_trial(a, path_a), _by_trial(b, path_b)
    splits = [sorted({split for split, _ in trials}) for trials in (trials_a, trials_b)]
    if splits[0] != splits[1]:
        raise EvaluationError(f"splits differ: {splits[0]} in {path_a}, {splits[1]} in {path_b}")
    if trials_a.keys() != trials_b.keys():
        only = [
            f"{', '.join(map(_name, sorted(mine - other)[:_SHOWN]))} only in {path}"
            for mine, other, path in (
                (trials_a.keys(), trials_b.keys(), path_a),
                (trials_b.keys(), trials_a.keys(), path_b),
            )
            if mine - other
        ]
        raise EvaluationError(f"seeds differ: {'; '.join(only)}: evaluate both on the same --seeds")
    keys = sorted(trials_a)
    for key in keys:
        said = [trials[key].get("instruction") for trials in (trials_a, trials_b)]
        if all(said) and said[0] != said[1]:
            raise EvaluationError(
                f"{_name(key)} was {said[0]!r} in {path_a}, {said[1]!r} in {path_b}: they do not compare"
            )
    only_a, only_b = _discordant(trials_a, trials_b, keys, "success")
    partial_a, partial_b = _discordant(trials_a, trials_b, keys, "partial")
    return Comparison(
        names=_labels(a, b, path_a, path_b),
        task=a["task"],
        trials=len(keys),
        success=tuple(_rate(trials, "success") for trials in (trials_a, trials_b)),
        partial=tuple(_rate(trials, "partial") for trials in (trials_a, trials_b)),
        only_a=[_name(key) for key in only_a],
        only_b=[_name(key) for key in only_b],
        p=mcnemar(len(only_a), len(only_b)),
        p_partial=mcnemar(len(partial_a), len(partial_b)),
        notes=_notes(a.get("settings", {}), b.get("settings", {})),
    )


def _read(path: Path) -> dict:
    path = Path(path)
    report = read_json(path / "report.json" if path.is_dir() else path)
    missing = [name for name in (*SAME, "trials") if name not in report]
    if missing or not report["trials"]:
        raise EvaluationError(f"{path} is no evaluation's report: it lacks {', '.join(missing) or 'trials'}")
    return report


def _by_trial(report: dict, path: Path) -> dict[tuple[str, int], dict]:
    for trial in report["trials"]:
        if lacking := [name for name in ("split", "seed", "success", "partial") if name not in trial]:
            raise EvaluationError(f"{path}: a trial lacks {', '.join(lacking)}")
    return {(trial["split"], trial["seed"]): trial for trial in report["trials"]}


def _discordant(a: dict, b: dict, keys: list, what: str) -> tuple[list, list]:
    first = [key for key in keys if a[key][what] and not b[key][what]]
    return first, [key for key in keys if b[key][what] and not a[key][what]]


def _rate(trials: dict, what: str) -> float:
    return sum(bool(trial[what]) for trial in trials.values()) / len(trials)


def _notes(a: dict, b: dict) -> list[str]:
    names = [name for name in dict.fromkeys([*a, *b]) if name not in ("policy", "checkpoint", *SAME)]
    return [f"{name}: {a.get(name)} against {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def _labels(a: dict, b: dict, path_a: Path, path_b: Path) -> tuple[str, str]:
    """The policies' names, with the reports' places where those do not tell them apart."""
    first, second = str(a.get("policy") or path_a), str(b.get("policy") or path_b)
    return (first, second) if first != second else (f"{first} in {path_a}", f"{second} in {path_b}")


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]} {key[1]}"
