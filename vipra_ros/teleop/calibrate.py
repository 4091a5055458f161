"""`vipra gello calibrate`: find a GELLO's offsets, check its signs and its trigger, write them down."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from config.loading import ConfigError, load, parse
from config.teleop import Dynamixel, Teleop
from vipra_ros.teleop.dynamixel import LeaderError, Servos, median_counts
from vipra_ros.teleop.servos import CalibrationError, offsets_in_pose, sign_of_turn, trigger_range

# Positive directions of the FR3's joints, from the calibration pose and seen from behind.
TURNS = (
    "swing the whole arm to the left",
    "lean the upper arm forward, so that the hand goes down",
    "twist the upper arm, so that the forearm swings to the left",
    "open the elbow, so that the hand goes up",
    "twist the forearm, so that the fingers swing to the left",
    "tilt the fingers forward, away from the base",
    "turn the hand clockwise, seen from above",
)
POSE = (
    "Hold the GELLO as the FR3 at (0, 0, 0, -90, 0, 90, 0) degrees: upper arm straight up, forearm level and "
    "forward, fingers straight down."
)


def calibrate(
    servos: Servos,
    baud: int,
    signs: tuple[int, ...],
    check_signs: bool,
    ask: Callable[[str], str],
    say: Callable[[str], None],
) -> Dynamixel:
    """Ask an operator for one pose after the other. `servos`: seven joints, then the trigger if there is one.

    A step that fails says why and is asked for again. Raises LeaderError.
    """
    if missing := servos.missing():
        raise LeaderError(
            f"{servos.port}: servo {', '.join(map(str, missing))} does not answer: "
            "check power, cables, ids and baud rate"
        )

    def step(prompt: str, work: Callable[[np.ndarray], object]):
        while True:
            try:
                ask(f"{prompt} Then press Enter. ")
                return work(median_counts(servos))
            except CalibrationError as error:
                say(str(error))
            except EOFError as error:
                raise LeaderError("calibration asks questions: run it in a terminal") from error

    pose = step(POSE, lambda counts: (offsets_in_pose(counts, signs), counts))
    if check_signs:
        before, found = pose[1], []
        say("Now each joint by 10 to 90 degrees, one after the other; let the others go where they like.")
        for j, turn in enumerate(TURNS):
            found.append(
                step(
                    f"Joint {j + 1}: {turn}.",
                    lambda counts, j=j, before=before: (sign_of_turn(before[j], counts[j], j + 1), counts),
                )
            )
            before = found[-1][1]
        turned = tuple(sign for sign, _ in found)
        if turned != tuple(signs):
            say(f"signs are {list(turned)}, not {list(signs)}: using what was found")
            signs = turned
            pose = step(POSE, lambda counts: (offsets_in_pose(counts, signs), counts))
    values = {
        "port": servos.port,
        "baud": baud,
        "ids": servos.ids[:7],
        "offsets_rad": [round(float(offset), 3) for offset in pose[0]],
        "signs": [int(sign) for sign in signs],
        "gripper_id": None,
    }
    if len(servos.ids) > 7:
        opened = step("Let the trigger go.", lambda counts: counts[7])
        span = step("Squeeze the trigger.", lambda counts: trigger_range(opened, counts[7]))
        values["gripper_id"] = servos.ids[7]
        values["gripper_open_rad"], values["gripper_closed_rad"] = (round(value, 3) for value in span)
    return parse(Dynamixel, values, "calibration")


def held(path: Path) -> dict:
    """What the teleop file `path` holds; nothing where there is none. Raises ConfigError unless it can be
    read and written.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written: choose another --out")
    if not path.exists() or not path.read_text().strip():
        return {}
    load(Teleop, str(path))
    return yaml.safe_load(path.read_text())


def write(path: Path, arm: str, found: Dynamixel) -> None:
    """Put the leader of `arm` into the teleop file `path`, beside what is there. Raises ConfigError."""
    data = {"source": "dynamixel", "leaders": {}} | held(path)
    section = {k: list(v) if isinstance(v, tuple) else v for k, v in found.model_dump().items()}
    data["source"], data["leaders"] = "dynamixel", {**data["leaders"], arm: {"dynamixel": section}}
    others = {
        a: lead for a, lead in data["leaders"].items() if "dynamixel" in lead
    }  # topics' ones do not fit
    data["leaders"] = others
    parse(Teleop, data, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_yaml(data))


def as_yaml(data: dict) -> str:
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)
