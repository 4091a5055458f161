"""What a demonstration on one of our robots consists of, as features of a LeRobotDataset.

The recorder, the simulator's generator and `vipra dataset` share it. Frame i holds everything at one moment,
the capture of its picture: action i is what the robot was told then. So with frame t as the observation,
action t + i is due i / fps after it.
"""

from collections.abc import Sequence
from typing import Any

from episodes import layout
from episodes.layout import EpisodesError, Feature

CAMERA = "observation.images.front"
STATE = "observation.state"
ACTION = "action"
CAPTURE = "capture_time"  # f64 s, executor clock, of the picture
SYNC = "sync_error"  # f32 s, largest distance in time between what the frame holds and its moment


def features(names: Sequence[str], height: int, width: int) -> dict[str, Feature]:
    """Features of a demonstration with action vector `names` and pictures of height x width px."""
    return {
        CAMERA: layout.camera(height, width),
        STATE: layout.vector(names),
        ACTION: layout.vector(names),
        CAPTURE: layout.vector(["s"], "float64"),
        SYNC: layout.vector(["s"]),
    }


def difference(info: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first thing in which two datasets' info.json do not fit together, naming both; None if they do."""
    if info["robot_type"] != other["robot_type"]:
        return f"robot {info['robot_type']} and {other['robot_type']}"
    if info["fps"] != other["fps"]:
        return f"{info['fps']} and {other['fps']} frames per second"
    ours, theirs = info["features"], other["features"]
    if odd := set(ours) ^ set(theirs):
        return f"only one has {', '.join(sorted(odd))}"
    for key, feature in ours.items():
        for part in ("dtype", "shape", "names"):
            a, b = feature[part], theirs[key][part]
            if a != b:
                return f"{key}: {part} {a} and {b}"
    return None


def check_same(path: Any, info: dict[str, Any], fps: int, robot: str, wanted: dict[str, Feature]) -> None:
    """Raises EpisodesError unless the dataset with `info` can take recordings of this robot."""
    problem = difference(info, layout.new_info(fps, wanted, robot))
    if problem:
        raise EpisodesError(
            f"{path} cannot be continued with this robot (dataset and robot differ): {problem}: "
            "record to another folder, or use the robot it was recorded with"
        )
