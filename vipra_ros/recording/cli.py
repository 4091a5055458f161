"""`vipra record`: the operator's keyboard in front of the recorder node."""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from config.recording import FIRST_SEED
from vipra_ros.recording.keyboard import END, HELP, Repeats, forget_typed, raw_keys, read_key, verb

EPILOG = f"""\
Camera, arms and leaders have to run:  vipra up teleop robot:=sim_single --start
Then, in another terminal:             vipra record recordings/cups --robot sim_single --task "stack the cups"
At a real robot --task may be a file in config/tasks (stack_cups): each episode is a trial of it, and you are
told where its objects go and what it is called.

Keys: {HELP}
A foot pedal that types a space starts and stops. Record 100 to 200 demonstrations a task: docs/recording.md.
Without a folder, the recorder that runs already is used (vipra up teleop ... dataset:=FOLDER).
"""
_READY_S = 60.0
SILENT_S = 2.0  # its status comes five times a second


def main(argv: list[str] | None = None) -> int:
    """0 at the end; raises ProcessError where the recorder cannot be reached."""
    parser = argparse.ArgumentParser(
        prog="vipra record",
        description="Record demonstrations to a LeRobotDataset; an existing one is continued.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", nargs="?", type=Path, metavar="FOLDER", help="dataset to write")
    parser.add_argument("--task", default="", help="what is demonstrated: words, or a file in config/tasks")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=FIRST_SEED,
        help="the first episode's trial of a task file (default: %(default)s); another folder of the same "
        "task needs another one",
    )
    parser.add_argument("--target", type=int, default=200, help="episodes wanted (default: %(default)s)")
    parser.add_argument(
        "--robot", default="sim_bimanual", help="file in config/robots (default: %(default)s)"
    )
    parser.add_argument("--keep-clean", action="store_true", help="keep at once what has no warning")
    parser.add_argument("--raw", action="store_true", help="also every message but pictures as MCAP")
    said = parser.parse_args(argv)
    if not said.dataset:
        for name, value in vars(said).items():
            if value != parser.get_default(name):
                parser.error(
                    f"--{name.replace('_', '-')} is for a recorder started here: name a FOLDER; "
                    "one that runs already has its own (ros2 param set /recorder task '...')"
                )
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    from vipra_ros.monitor import Monitor
    from vipra_ros.process import Child, ProcessError, signals_raise, wait_for
    from vipra_ros.up import run_folder

    child = None
    with Monitor() as monitor:
        try:
            with signals_raise():
                if said.dataset:
                    parameters = {
                        "robot": said.robot,
                        "dataset": str(said.dataset),
                        "task": said.task,
                        "first_seed": said.first_seed,
                        "target": said.target,
                        "keep_clean": said.keep_clean,
                        "raw": said.raw,
                    }
                    child = Child("recorder", command(parameters), run_folder("record") / "recorder.log")
                children = [child] if child else []
                hint = (
                    "the recorder" if child else "a running recorder (or name a folder: vipra record FOLDER)"
                )
                mine = child and str(said.dataset.expanduser().resolve())

                def heard() -> bool:
                    status = monitor.status("recorder")
                    return status is not None and mine in (None, status.values["dataset"])

                wait_for(heard, _READY_S if child else 5.0, hint, children, child)
                return run(monitor, children)
        except KeyboardInterrupt:
            return 0
        except ProcessError as error:
            refused = child.find(r"^recorder: (.*)$") if child and child.returncode() else None
            if refused:
                raise ProcessError(refused[1]) from error
            raise
        finally:
            if child:
                child.stop(30.0)


def command(parameters: Mapping[str, object]) -> list[str]:
    """Command line of the recorder node."""
    from vipra_ros.bringup import Process

    return Process("recorder", "vipra_ros.nodes.recorder", "vipra_recorder", (), parameters).argv()


def run(monitor, children=(), now: Callable[[], float] = time.monotonic) -> int:
    """Until q or Ctrl-C: keys to services, the recorder's state to one live line."""
    from vipra_ros.monitor import CallFailed

    say(HELP)
    told, laid_out, quitting, repeats = "", "", False, Repeats()
    with raw_keys(), interrupts() as interrupted:
        while True:
            for child in children:
                child.check()
            status = monitor.status("recorder")
            values = status.values
            if values["message"] != told:
                told = values["message"]
                say(told)
            if values["state"] != "IDLE":
                laid_out = ""  # before the next attempt it is said again
            elif values["set_up"] != laid_out:
                laid_out = values["set_up"]
                say(set_up(values))
            silent_s = time.monotonic() - status.heard_s
            show(
                f"the recorder is silent for {silent_s:.0f} s: look at it"
                if silent_s > SILENT_S
                else line(values)
            )
            key = "q" if interrupted and interrupted.pop() else _pressed(repeats, now)
            if not key:
                continue
            asked = verb(key, values["state"])
            if asked == "quit":
                if quitting and not children and values["state"] != "IDLE":  # the recorder stays
                    with contextlib.suppress(CallFailed):
                        say(monitor.call("/recorder/discard", 5.0))
                if quitting or values["state"] == "IDLE":
                    show("")
                    return 0
                quitting = True
                say(f"an episode is {values['state'].lower()}: keep it first, or press q again to drop it")
                continue
            quitting = False
            if asked is None:
                say(f"{key!r} does nothing now ({values['state']}): {HELP}")
                continue
            try:
                answer = told = monitor.call(f"/recorder/{asked}", 5.0)
            except CallFailed as error:
                answer = str(error).removeprefix(f"/recorder/{asked}: ")
            forget_typed()  # a key held down meanwhile is no second wish
            repeats.repeated(key, now())
            say(answer)


def _pressed(repeats: Repeats, now: Callable[[], float]) -> str:
    """The next key that is not just held down; the end of the input stays what it is."""
    key = read_key(0.1)
    return "" if key not in ("", END) and repeats.repeated(key, now()) else key


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Inside, Ctrl-C and a terminal that hangs up only fill the list: an episode may wait to be kept."""
    seen: list[int] = []
    old = {n: signal.signal(n, lambda n, _: seen.append(n)) for n in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def set_up(values: Mapping[str, str]) -> str:
    """What the operator lays out before the next episode."""
    first = f"set up for episode {int(values['count']) + 1}: {values['task']}"
    return "\n".join([first, *(f"  {line}" for line in values["set_up"].splitlines())])


def line(values: Mapping[str, str]) -> str:
    """The live line of the recorder's status."""
    parts = [f"{values['count']}/{values['target']}", values["state"]]
    if values["state"] in ("RECORDING", "PAUSED"):
        parts.append(f"{float(values['length_s']):.1f} s")
    if float(values["last_length_s"]):
        parts.append(f"last {float(values['last_length_s']):.1f} s")
    parts.append(f"sync p99 {float(values['sync_p99_ms']):.1f} ms")
    if values["repeated"] != "0":
        parts.append(f"{values['repeated']} pictures lost")
    if values["warnings"]:  # what is wrong now; of the last episode, the line above tells
        parts.append(f"! {values['warnings']}")
    return "  ".join(parts)


def say(text: str) -> None:
    """A line that stays."""
    sys.stdout.write(f"\r\x1b[K{text}\n" if sys.stdout.isatty() else f"{text}\n")
    sys.stdout.flush()


def show(text: str) -> None:
    """Replace the live line; nothing where the output is no terminal."""
    if sys.stdout.isatty():
        width = os.get_terminal_size().columns - 1
        sys.stdout.write(f"\r\x1b[K{text[:width]}")
        sys.stdout.flush()
