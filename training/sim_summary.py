"""What a folder of training.sim holds so far: summary.json, and curves.png against hours of training."""

import json
from collections.abc import Iterator
from pathlib import Path

from training import plots
from training.run import summary

KEPT = ("success_rate", "partial_rate", "interval95")  # of a report
LOSSES = ("loss", "validation/loss", "validation/l1")
ERROR = "validation/action_error"


def write(out: Path) -> dict:
    """Writes both files, returns what summary.json holds."""
    found: dict = {"gate": _read(out / "gate.json")}
    runs = sorted(path.parent for path in (out / "runs").glob("*/metrics.jsonl"))
    entries = {run.name: list(timed(run / "metrics.jsonl")) for run in runs}
    for run in runs:
        found[run.name] = summary(run)[1]
        if entries[run.name]:
            found[run.name]["hours"] = entries[run.name][-1]["hours"]
    reports = {
        kind: {path.parent.name: _read(path) for path in sorted((out / kind).glob("*/report.json"))}
        for kind in ("development", "evaluation")
    }
    for kind, those in reports.items():
        found[kind] = {name: {key: report.get(key) for key in KEPT} for name, report in those.items()}
    for name in ("comparison", "comparison_attention"):
        if comparison := _read(out / "evaluation" / name / "comparison.json"):
            found[name] = comparison
    (out / "summary.json").write_text(json.dumps(found, indent=1))
    if entries:
        points = success(entries, reports["development"])
        figure = plots.against_hours(
            {run: _lines(those, LOSSES) for run, those in entries.items()},
            {run: line[ERROR] for run, those in entries.items() if (line := _lines(those, (ERROR,)))},
            points,
        )
        figure.savefig(out / "curves.png", dpi=110)
    return found


def timed(path: Path) -> Iterator[dict]:
    """Entries of a run's metrics.jsonl with `hours` of training until then: validation, saving and pauses
    are left out.
    """
    hours = samples = 0.0
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill
            continue
        if "samples_per_s" in entry:
            hours += (entry["samples"] - samples) / entry["samples_per_s"] / 3600
            samples = entry["samples"]
        yield entry | {"hours": hours}


def success(
    entries: dict[str, list[dict]], reports: dict[str, dict]
) -> dict[str, list[tuple[float, float, float, float]]]:
    """By run: hours of training, success rate and its 95 % interval of each checkpoint that was tried."""
    points: dict[str, list] = {}
    for name, report in reports.items():
        run, _, step = name.rpartition("-")
        until = [e["hours"] for e in entries.get(run, ()) if e["step"] <= int(step)] if step.isdigit() else []
        if until and report.get("success_rate") is not None:  # else interrupted before the first trial
            points.setdefault(run, []).append((until[-1], report["success_rate"], *report["interval95"]))
    return {run: sorted(those) for run, those in points.items()}


def _lines(entries: list[dict], keys: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    lines = {key: [(e["hours"], e[key]) for e in entries if key in e] for key in keys}
    return {key: points for key, points in lines.items() if points}


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None
