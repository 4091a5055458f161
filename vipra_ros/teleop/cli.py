"""`vipra gello`: calibrate a GELLO, look at it, and couple and release the arms from a keyboard or pedal."""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from config.loading import ConfigError, load
from config.teleop import Dynamixel, Teleop

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GELLO teleoperation; docs/teleop.md is the walk-through.",
)
Arm = Annotated[Literal["left", "right"], typer.Option(help="which robot arm this GELLO leads")]


@app.command()
def calibrate(
    port: Annotated[str, typer.Option(help="serial device, best /dev/serial/by-id/...")],
    arm: Arm,
    out: Annotated[Path | None, typer.Option(help="teleop file to write or add to; default: print")] = None,
    baud: Annotated[int, typer.Option(help="bits/s")] = 57600,
    ids: Annotated[
        str, typer.Option(help="servos of the joints, and of the trigger last")
    ] = "1,2,3,4,5,6,7,8",
    signs: Annotated[str, typer.Option(help="expected directions")] = "1,-1,1,-1,1,1,1",
    check_signs: Annotated[bool, typer.Option(help="turn every joint once to check its direction")] = True,
):
    """Find a GELLO's offsets in a known pose, check its directions and its trigger."""
    from vipra_ros.teleop.calibrate import as_yaml, held, write
    from vipra_ros.teleop.calibrate import calibrate as run
    from vipra_ros.teleop.dynamixel import Servos

    numbers, expected = _numbers("--ids", ids, (7, 8)), _numbers("--signs", signs, (7,))
    if set(expected) - {-1, 1}:
        raise ConfigError(f"--signs {signs}: each is 1 or -1")
    if out is not None:
        held(out)  # before the work, not after it
    with Servos(port, baud, numbers) as servos:
        found = run(servos, baud, expected, check_signs, input, print)
    text = as_yaml({"leaders": {arm: {"dynamixel": found.model_dump(mode="json")}}})
    if out is None:
        print(text)
    else:
        try:
            write(out, arm, found)
        except (ConfigError, OSError):
            print(text)
            raise
        print(f"{out}: {arm} written; look at it with: vipra gello read --teleop {out} --arm {arm}")


@app.command()
def read(
    arm: Arm,
    teleop: Annotated[str, typer.Option(help="file in config/teleop, or a path to one")] = "gello_usb",
    seconds: Annotated[float, typer.Option(min=0, help="stop after this long; 0: on Ctrl-C")] = 0.0,
):
    """Show a GELLO's live joint angles and trigger."""
    config = load(Teleop, teleop)
    leader = config.leaders.get(arm)
    if leader is None or leader.dynamixel is None:
        raise ConfigError(f"{teleop}: no dynamixel section for {arm}: run vipra gello calibrate --arm {arm}")
    show(leader.dynamixel, config.rate_hz, seconds)


def show(config: Dynamixel, rate_hz: float, seconds: float) -> None:
    """One line that is written over, ten times a second; a line each second where it is no terminal."""
    from vipra_ros.teleop.dynamixel import Reader

    reader = Reader(config, rate_hz, time.monotonic)
    reader.start()
    start, taken, since = time.monotonic(), 0, time.monotonic()
    live = sys.stdout.isatty()
    try:
        while not seconds or time.monotonic() - start < seconds:
            time.sleep(0.1 if live else min(1.0, seconds or 1.0))
            samples = reader.take()
            taken += len(samples)
            if samples:
                _, joints, opening = samples[-1]
                rate = taken / (time.monotonic() - since)
                trigger = "" if opening is None else f"  trigger {opening:.2f}"
                line = f"{np.array2string(joints, precision=3, suppress_small=True, sign=' ')}{trigger}"
                line += f"  {rate:.0f} Hz, {reader.lost} lost"
            else:
                line = reader.problem or "no answer"
            print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        reader.close()
        if live:
            print()


@app.command()
def start():
    """Couple the arms to their leaders: /teleop/start."""
    _call("start")


@app.command()
def pause():
    """Clutch, on and off: /teleop/pause."""
    _call("pause")


@app.command()
def stop():
    """Let the arms go: /teleop/stop."""
    _call("stop")


def _call(name: str) -> None:
    import os

    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    from vipra_ros.monitor import Monitor

    with Monitor() as monitor:
        print(monitor.call(f"/teleop/{name}", 15.0))


def _numbers(option: str, text: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
    try:
        values = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: whole numbers with commas between them") from error
    if len(values) not in lengths:
        raise ConfigError(f"{option} {text!r}: {' or '.join(map(str, lengths))} numbers are needed")
    return values


def main(argv: list[str]) -> int:
    """Exit status of `vipra gello ARGV`; raises our own errors."""
    try:
        app(argv, prog_name="vipra gello")
    except SystemExit as done:
        return done.code or 0
    return 0
