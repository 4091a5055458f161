"""What an operator sees while the robot runs: a live table on a terminal, plain lines elsewhere."""

import json
import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vipra_ros.monitor import Monitor

PLAIN_EVERY_S = 5.0
_STYLES = {
    "RUNNING": "green",
    "ALIGNING": "cyan",
    "FAULT": "bold red",
    "STOPPED": "red",
    "STOPPING": "yellow",
}


class View:
    """Shows rows of (label, value). Use as a context manager."""

    def __init__(self, title: str, console: Console | None = None):
        self._title = title
        self._console = console or Console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._tty = self._console.is_terminal
        self._printed = 0.0

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, rows: Mapping[str, str]) -> None:
        """Replace the table, or print the rows as one line every few seconds."""
        if self._tty:
            table = Table(title=self._title, show_header=False, title_justify="left", min_width=60)
            table.add_column(style="dim")
            table.add_column()
            for label, value in rows.items():
                table.add_row(label, value, style=_STYLES.get(value.partition(" ")[0]))
            self._live.update(table)
        elif time.monotonic() - self._printed > PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self.say("  ".join(f"{label}: {value}" for label, value in rows.items()))

    def __enter__(self) -> "View":
        if self._tty:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._tty:
            self._live.stop()


def rows(monitor: Monitor) -> dict[str, str]:
    """The state of the graph in an operator's words."""
    arms, policy = monitor.status("arms"), monitor.status("policy")
    table: dict[str, str] = {}
    if arms is None:
        table["arms"] = "no status yet"
    else:
        table["arms"] = f"{arms.values.get('state', '?')} {arms.message}".strip()
        table["ticks"] = " ".join(
            f"{arms.values[key]} {label}"
            for key, label in (("ticks", "run"), ("late_ticks", "late"), ("starved_ticks", "starved"))
            if key in arms.values
        )
        if hits := json.loads(arms.values.get("interventions") or "{}"):
            table["limit hits"] = ", ".join(f"{count} {kind}" for kind, count in hits.items())
        if faults := json.loads(arms.values.get("faults") or "[]"):
            table["faults"] = "; ".join(fault["reason"] for fault in faults)
        if rejected := arms.values.get("rejected"):
            table["rejected"] = rejected
    teleop = monitor.status("teleop")
    if teleop is not None:
        table["teleop"] = f"{teleop.values.get('state', '?')} {teleop.message}".strip()
        table["leaders"] = teleop.values.get("leaders", "")
        if joint := teleop.values.get("difference_joint"):
            table["difference"] = f"{teleop.values['difference_rad']} rad, {joint}"
    elif policy is None:
        table["policy"] = "no status yet"
    else:
        table["policy"] = f"{policy.values.get('state', '?')} {policy.message}".strip()
        p50, p99 = policy.number("latency_ms_p50"), policy.number("latency_ms_p99")
        if p99:
            table["latency"] = f"{p50:.0f} ms p50, {p99:.0f} ms p99"
            table["rate"] = f"{policy.values['rate_hz']} of {policy.values['action_rate_hz']} actions/s"
        age = policy.number("chunk_age_s")
        if age is not None:
            table["chunk age"] = f"{age:.2f} s"
    fps = monitor.frames_per_second()
    table["camera"] = "no picture yet" if fps is None else f"{fps:.1f} frames/s"
    return table
