"""Results of trials -> report.json, report.html, contact.png. Pure functions over results and files."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vipra_ros.evaluation.compare import Comparison
from vipra_ros.evaluation.ledger import Ledger, Result, write_atomically
from vipra_ros.evaluation.statistics import clopper_pearson
from vipra_ros.report import page
from vipra_ros.report.summary import versions

_TILE = (256, 144)  # px, of the contact sheet
_COLOURS = {"success": (58, 157, 110), "partial": (222, 160, 40), "fail": (209, 67, 43)}


def summarise(settings: dict, results: Sequence[Result], voids: Sequence[dict] = ()) -> dict:
    """The content of report.json. Rates without a trial are None."""
    splits = {split: _rates([r for r in results if r.split == split]) for split in _splits(results)}
    return {
        "task": settings["task"],
        "policy": settings["policy"],
        "time_limit_s": settings["time_limit_s"],
        **_rates(results),
        "splits": splits,
        "failures": _failures(results),
        "voids": list(voids),
        "trials": [asdict(result) for result in results],
        "settings": settings,
        "versions": versions(),
    }


def outcome(result: Result) -> str:
    return "success" if result.success else "partial" if result.partial else "fail"


def _splits(results: Sequence[Result]) -> list[str]:
    return sorted({result.split for result in results})


def _rates(results: Sequence[Result]) -> dict:
    count = len(results)
    successes, partials = sum(r.success for r in results), sum(r.partial for r in results)
    times = [r.seconds for r in results if r.success]
    return {
        "count": count,
        "successes": successes,
        "partials": partials,
        "success_rate": successes / count if count else None,
        "partial_rate": partials / count if count else None,
        "interval95": [round(p, 4) for p in clopper_pearson(successes, count)],
        "partial_interval95": [round(p, 4) for p in clopper_pearson(partials, count)],
        "seconds_to_success": {"median": _median(times), "worst": max(times, default=None)},
        "interventions": sum(r.interventions for r in results),
        "drops": _sum([r.drops for r in results]),
        "retries": _sum([r.retries for r in results]),
        "wrong_object": _sum([r.wrong_object for r in results]),
        "refused_chunks": _sum([r.refused for r in results]),
        "jerk_rms": _mean([r.jerk_rms for r in results]),
        "spectral_arc_length": _mean([r.spectral_arc_length for r in results]),
    }


def _failures(results: Sequence[Result]) -> dict[str, int]:
    """Why trials failed, each counted once."""
    found: dict[str, int] = {}
    for result in results:
        if result.success:
            continue
        if result.ended.startswith(("stopped", "aborted")):
            why = result.ended.partition(":")[0]
        elif result.drops:
            why = "grasped, then dropped"
        elif result.partial:
            why = "grasped, not placed"
        elif result.wrong_object:
            why = "lifted another object"
        else:
            why = "never grasped"
        found[why] = found.get(why, 0) + 1
    return found


def _sum(values: list[int | None]) -> int | None:
    """None where nobody measured it."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _median(values: list[float]) -> float | None:
    return round(float(np.median(values)), 3) if values else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def write(ledger: Ledger, settings: dict, notes: Sequence[str] = ()) -> dict:
    """report.json, report.html and contact.png of everything in the ledger; returns the report."""
    results = ledger.results()
    report = summarise(settings, results, ledger.voids())
    write_atomically(ledger.folder / "report.json", json.dumps(report, indent=2) + "\n")
    sheet = contact_sheet(ledger, results)
    write_atomically(ledger.folder / "report.html", _page(ledger, report, results, notes, sheet))
    return report


def in_one_line(report: dict) -> str:
    """What one wants to know first."""
    if not report["count"]:
        return "no trial counts yet"
    low, high = report["interval95"]
    return (
        f"{report['successes']} of {report['count']} succeeded: {report['success_rate']:.0%} "
        f"(95 % interval {low:.0%} to {high:.0%}), partial {report['partial_rate']:.0%}"
    )


def contact_sheet(ledger: Ledger, results: Sequence[Result]) -> Path | None:
    """contact.png: every trial's last picture, framed in the colour of its outcome. None without pictures."""
    import cv2

    tiles = []
    for result in results:
        picture = cv2.imread(str(ledger.file(result.key, ".jpg")))
        if picture is None:
            continue
        tile = cv2.resize(picture, _TILE, interpolation=cv2.INTER_AREA)
        colour = _COLOURS[outcome(result)][::-1]
        cv2.rectangle(tile, (0, 0), (_TILE[0] - 1, _TILE[1] - 1), colour, 5)
        cv2.putText(tile, f"{result.key} {result.seconds:.0f} s", (10, 20), 0, 0.45, (255, 255, 255), 1, 16)
        tiles.append(tile)
    if not tiles:
        return None
    columns = math.ceil(math.sqrt(len(tiles)))
    tiles += [np.full_like(tiles[0], 32)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    path = ledger.folder / "contact.png"
    cv2.imwrite(str(path), np.vstack(rows))
    return path


def _page(
    ledger: Ledger, report: dict, results: Sequence[Result], notes: Sequence[str], sheet: Path | None
) -> str:
    title = f"{report['task']}: {report['policy']}"
    seconds = report["seconds_to_success"]["median"]
    parts = [
        f"<h1>{page.esc(title)}</h1><p class=dim>{page.esc(in_one_line(report))}</p>",
        page.cards(
            [
                (_percent(report["success_rate"]), "success"),
                (" to ".join(map(_percent, report["interval95"])), "95 % interval, Clopper-Pearson"),
                (_percent(report["partial_rate"]), "partial: grasped the right object"),
                (report["count"], "trials that count"),
                ("-" if seconds is None else f"{seconds:.1f} s", "median time to success"),
                (report["interventions"], "interventions"),
                (_count(report["drops"]), "drops: lifted, then fallen"),
                (_count(report["retries"]), "retries: a hand closed again"),
                (_number(report["jerk_rms"]), "jerk rms of measured joints, rad/s³"),
            ]
        ),
        "<h2>By split</h2>",
        _grid(
            ["split", "trials", "success", "95 %", "partial", "median s", "drops", "retries", "jerk"],
            [
                [
                    split,
                    rates["count"],
                    _percent(rates["success_rate"]),
                    " to ".join(map(_percent, rates["interval95"])),
                    _percent(rates["partial_rate"]),
                    _number(rates["seconds_to_success"]["median"]),
                    _count(rates["drops"]),
                    _count(rates["retries"]),
                    _number(rates["jerk_rms"]),
                ]
                for split, rates in report["splits"].items()
            ],
        ),
        "<h2>Why trials failed</h2>",
        page.table(report["failures"].items() or [("no failure", "")]),
    ]
    if sheet:
        parts.append("<h2>Last pictures</h2><img class=plot alt='contact sheet' src='contact.png'>")
    parts += ["<h2>Trials</h2>", _trials(ledger, results)]
    if report["voids"]:
        rows = [(f"{void['split']} {void['seed']}", void["reason"]) for void in report["voids"]]
        parts += ["<h2>Void attempts, repeated</h2>", page.table(rows)]
    parts += ["<h2>Settings</h2>", page.table(report["settings"].items())]
    if notes:
        parts += ["<h2>Notes</h2>", page.table([("note", note) for note in notes])]
    parts += ["<h2>Versions</h2>", page.table(report["versions"].items())]
    return page.document(title, parts)


def _trials(ledger: Ledger, results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        video = ledger.file(result.key, ".mp4")
        name = page.esc(f"{result.split} {result.seed}")
        link = f"<a href='trials/{page.esc(video.name)}'>{name}</a>" if video.is_file() else name
        counted = [f"{n} {name}" for name in ("drops", "retries") if (n := getattr(result, name))]
        more = "; ".join(filter(None, [*counted, result.note]))
        cells = [outcome(result), f"{result.seconds:.1f} s", result.interventions, result.ended]
        cells += [result.instruction, more]
        rows.append(f"<tr><td>{link}</td>{''.join(f'<td>{page.esc(c)}</td>' for c in cells)}</tr>")
    head = ("trial", "outcome", "time", "interventions", "ended", "instruction", "")
    return _head(head) + "".join(rows) + "</table>"


def comparison_page(comparison: Comparison) -> str:
    """HTML of a comparison."""
    a, b = comparison.names
    rows = [
        ("success", *map(_percent, comparison.success), f"p = {comparison.p:.3g}"),
        ("partial", *map(_percent, comparison.partial), f"p = {comparison.p_partial:.3g}"),
    ]
    parts = [
        f"<h1>{page.esc(comparison.task)}</h1>",
        f"<p class=dim>{page.esc(comparison_line(comparison))}</p>",
        _grid(["", a, b, "McNemar's exact test, two-sided"], rows),
        "<h2>Trials that differ</h2>",
        page.table(
            [
                (f"only {a} succeeded ({len(comparison.only_a)})", ", ".join(comparison.only_a) or "none"),
                (f"only {b} succeeded ({len(comparison.only_b)})", ", ".join(comparison.only_b) or "none"),
            ]
        ),
    ]
    if comparison.notes:
        parts += ["<h2>Settings that differ</h2>", page.table([("", note) for note in comparison.notes])]
    return page.document(f"{comparison.task}: {a} against {b}", parts)


def comparison_line(comparison: Comparison) -> str:
    a, b = comparison.names
    return (
        f"{comparison.trials} paired trials: {a} {_percent(comparison.success[0])}, "
        f"{b} {_percent(comparison.success[1])}, difference {100 * comparison.difference:+.1f} points; "
        f"{len(comparison.only_a)} against {len(comparison.only_b)} discordant, p = {comparison.p:.3g}"
    )


def _grid(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{page.esc(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"{_head(head)}{body}</table>"


def _head(names: Sequence[str]) -> str:
    return "<table><tr>" + "".join(f"<td class=dim>{page.esc(name)}</td>" for name in names) + "</tr>"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
