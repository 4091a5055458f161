"""One HTML file that shows a run: opens anywhere, needs nothing but the video beside it."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f27; --dim: #667085; --line: #e3e6ec; --card: #fff;
  --page: #f5f6f8;  --good: #2e8b57; --bad: #d1432b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf0; --dim: #98a2b3; --line: #2d3440;
  --card: #1b2029;  --page: #12151b; --good: #58c088; --bad: #ff7a63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 12px; }
p.dim, td.dim { color: var(--dim); }
.badge { display: inline-block; padding: 2px 12px; border-radius: 99px; color: #fff; font-weight: 600;
  font-size: 13px; vertical-align: 4px; margin-left: 10px; }
.cards { display: grid; margin-top: 20px;
  grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.card span { color: var(--dim); font-size: 13px; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; }
td { padding: 7px 14px; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child td { border-top: 0; } td:first-child { width: 34%; color: var(--dim); }
video, .plot { width: 100%; border-radius: 10px; border: 1px solid var(--line); display: block; }
video { background: #000; } .plot { background: #fff; }
.stills { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; margin-top: 10px; }
.stills img { width: 100%; border-radius: 8px; display: block; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, monospace; }
"""


def render(
    path: Path,
    title: str,
    when: str,
    problem: str | None,
    report: Mapping,
    settings: Mapping[str, object],
    notes: Sequence[str],
    plots: Sequence[tuple[str, Path]],
    stills: Sequence[bytes],
    video: str | None,
) -> None:
    """Write the page to `path`. `problem`: why the run does not count, None when it does; `stills`: JPEG;
    `video`: file name beside the page."""
    colour, verdict = ("var(--bad)", "failed") if problem else ("var(--good)", "worked")
    latency, error = report["chunk_latency_ms"], report["tracking_error_rad"]
    ticks = report["control_ticks"]
    late = report["late_ticks"]
    shown = [
        (f"{ticks:,}", "ticks of the 200 Hz reference"),
        (f"{late} ({late / max(ticks, 1):.2%})", "late by more than 5 ms"),
        (report["starved_ticks"], "starved: no action due"),
        (f"{_text(latency['p50'])} / {_text(latency['p99'])} ms", "chunk latency p50 / p99"),
        (f"{_text(error['rms'])} / {_text(error['max'])} rad", "tracking error rms / max"),
        (f"{_text(report['arm_skew_ms_p99'])} ms", "skew between the arms, p99"),
        (report["limit_violations_1khz"], "limit violations at 1 kHz"),
        (f"{_text(report['real_time_factor'])}", "real-time factor"),
    ]
    rows = [("interventions of the safety checks", report["interventions"] or "none")]
    rows += [("faults", "; ".join(f"{f['t']:.2f} s {f['reason']}" for f in report["faults"]) or "none")]
    rows += [("camera", f"{_text(report['frames_per_second'])} frames/s")]
    rows += [("note", note) for note in notes]
    parts = [
        f"<h1>{esc(title)}<span class=badge style='background:{colour}'>{verdict}</span></h1>",
        f"<p class=dim>{esc(when)}</p>",
        f"<p style='color:var(--bad)'>{esc(problem)}</p>" if problem else "",
        cards(shown),
    ]
    if video or stills:
        parts.append("<h2>Front camera</h2>")
    if video:
        parts.append(f"<video src='{esc(video)}' controls muted loop playsinline></video>")
    if stills:
        pictures = (
            f"<img src='data:image/jpeg;base64,{_b64(still)}' alt='front camera'>" for still in stills
        )
        parts += ["<div class=stills>", *pictures, "</div>"]
    for heading, plot in plots:
        parts.append(
            f"<h2>{esc(heading)}</h2><img class=plot alt='{esc(heading)}' "
            f"src='data:image/png;base64,{_b64(plot.read_bytes())}'>"
        )
    parts += ["<h2>Details</h2>", table(rows), "<h2>Settings</h2>", table(settings.items())]
    parts += ["<h2>Versions</h2>", table(report["versions"].items())]
    path.write_text(document(title, parts))


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page in this style; `parts` are HTML, `title` is text."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width'><title>{esc(title)}</title>"
        f"<style>{_STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )


def cards(rows: Sequence[tuple[object, str]]) -> str:
    """(value, label) as a row of cards."""
    body = (f"<div class=card><b>{esc(value)}</b><span>{esc(label)}</span></div>" for value, label in rows)
    return f"<div class=cards>{''.join(body)}</div>"


def table(rows) -> str:
    """(key, value) rows."""
    body = "".join(f"<tr><td>{esc(key)}</td><td>{esc(value)}</td></tr>" for key, value in rows)
    return f"<table>{body}</table>"


def esc(value) -> str:
    """Text, or JSON of a list or map, safe in HTML."""
    if isinstance(value, (dict, list)):
        value = json.dumps(value)
    return html.escape(str(value), quote=True)


def _text(value) -> str:
    return "-" if value is None else f"{value:g}"


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
