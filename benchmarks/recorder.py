"""How well the recorder keeps picture, joints and action together, on the live simulated stack.

    python -m benchmarks.recorder [--episodes 20] [--seconds 6] [--json FILE]

Scripted expert, GELLO's topics, teleop, arms, rendered camera and recorder in real time: the graph of
`vipra dataset generate --real-path`. What the recorder flags is kept all the same, so nothing is sorted out
before it is counted. Simulated arms and camera, not real ones.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from config.loading import load
from config.robot import Robot
from config.task import Task
from episodes.demonstration import CAPTURE, SYNC
from episodes.reader import Dataset
from vipra_ros.process import signals_raise
from vipra_ros.recording.generate import Wanted
from vipra_ros.teleop.expert import demonstrate

LIMITS = {"sync_error_ms_p99": 10.0, "dropped_frames": 0}  # at most
GAP_PERIODS = 1.5  # as config.recording.Quality.gap_frames


def measure(dataset: Dataset) -> dict:
    """Over all episodes: frames without a picture of their own, gaps, and the synchronisation error."""
    episodes = range(len(dataset))
    steps = [np.diff(dataset.values(e, CAPTURE).ravel()) for e in episodes]
    sync = 1000 * np.concatenate([dataset.values(e, SYNC).ravel() for e in episodes])
    return {
        "episodes": len(dataset),
        "frames": int(sum(row.length for row in dataset.rows)),
        "rate_hz": 1 / float(np.mean(np.concatenate(steps))),
        "sync_error_ms_p50": float(np.quantile(sync, 0.5)),
        "sync_error_ms_p99": float(np.quantile(sync, 0.99)),
        "sync_error_ms_max": float(sync.max()),
        "dropped_frames": int(sum((step <= 0).sum() for step in steps)),
        "gaps": int(sum((step > GAP_PERIODS / dataset.fps).sum() for step in steps)),
    }


def main() -> int:
    """0 where every limit is met, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recorder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each episode (default: %(default)s)")
    parser.add_argument("--task", default="stack_cups", help="file in config/tasks (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the dataset there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    given = parser.parse_args()
    task = load(Task, given.task)
    robot = f"sim_{task.workcell}"
    wanted = Wanted(task, load(Robot, robot), given.episodes, seconds=given.seconds, keep_flagged=True)
    with tempfile.TemporaryDirectory() as scratch, signals_raise():
        root = given.out or Path(scratch) / "dataset"
        demonstrate(wanted, robot, given.task, root, print)
        result = measure(Dataset(root)) | {"load_1min": os.getloadavg()[0]}
    table = Table("what", "measured", "at most", title=f"{robot}, {task.name}: the recorder, live")
    for key, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        limit = LIMITS.get(key, "")
        table.add_row(key, shown, f"{limit}" + ("  MISSED" if limit != "" and value > limit else ""))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps({"benchmark": "recorder", **result}, indent=1) + "\n")
    return int(any(result[key] > limit for key, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
