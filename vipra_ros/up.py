"""`vipra up`: start a robot's processes, show their state, stop all of them when one ends or on Ctrl-C."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipra_ros import bringup
from vipra_ros.process import ProcessError, signals_raise, wait_for

READY_S = 60.0
_START = {
    "policy": "`vipra start` lets the policy move the arms",
    "teleop": "`vipra gello start` couples the arms to their leaders",
}


def run_folder(verb: str) -> Path:
    """runs/<verb>/<time> below the working directory."""
    return Path("runs") / verb / time.strftime("%Y%m%d-%H%M%S")


def run(kind: bringup.Kind, given: Mapping[str, Any], start: bool) -> int:
    """Until Ctrl-C (0) or until a process ends (1, with its reason). ConfigError before anything starts."""
    folder = Path(given.get("run_dir") or run_folder("up")).resolve()
    given = {**given, "run_dir": str(folder)}
    graph = bringup.describe(kind, given)
    from vipra_ros.live import View, rows
    from vipra_ros.monitor import Monitor

    discovery = graph.environment["ROS_AUTOMATIC_DISCOVERY_RANGE"]
    with signals_raise(), View(f"vipra up {kind}") as view:
        try:
            view.say(f"starting {', '.join(p.name for p in graph.processes)}; logs in {folder}")
            with bringup.running(graph, folder) as children, Monitor(discovery=discovery) as monitor:
                wait_ready(monitor, children)
                view.say("ready" if start else f"ready: {_START[commander(children)]}")
                if start:
                    view.say(monitor.call(f"/{commander(children)}/start", 15.0))
                while True:
                    for child in children:
                        child.check()
                    view.show(rows(monitor))
                    time.sleep(0.25)
        except KeyboardInterrupt:
            view.say("stopped")
            return 0
        except ProcessError as error:
            view.say(f"stopped everything: {error}")
            return 1


def commander(children) -> str:
    """The node that commands the arms: policy or teleop."""
    return "teleop" if any(child.name == "teleop" for child in children) else "policy"


def wait_ready(monitor, children) -> None:
    """Until camera, arms and commander have shown themselves. Raises ProcessError naming who has not."""
    names = {child.name for child in children}

    def missing() -> list[str]:
        absent = [n for n in ("arms", commander(children)) if n in names and monitor.status(n) is None]
        return absent + (["camera"] if "camera" in names and not monitor.frames_per_second() else [])

    try:
        wait_for(lambda: not missing(), READY_S, "graph ready", children)
    except ProcessError as error:
        late = [child for child in children if child.name in missing()]
        if not late or any(child.returncode() is not None for child in children):
            raise
        tails = "".join(f"\nend of {child.log}:\n{child.tail(5)}" for child in late)
        raise ProcessError(f"{error}; nothing heard from {', '.join(c.name for c in late)}{tails}") from error
