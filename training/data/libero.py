"""LIBERO demonstrations: HDF5 files with `data/demo_<i>/{actions, obs/...}`.

The simulator renders bottom row first, so pictures are turned over; the instruction is in
`data.attrs["problem_info"]`; 20 frames/s.
"""

import json
from pathlib import Path

import h5py
import numpy as np

from config.dataset import DatasetConfig
from training.data.episode import DataError, Episode, finite, uniform_times
from training.data.videos import fingerprint

RATE_HZ = 20.0
STATE = "obs/joint_states,obs/gripper_states"


class LiberoReader:
    """Views `agentview` and `eye_in_hand`; actions 7 end-effector deltas; state 7 joints and 2 fingers.

    `action_key`, `state_key`: other datasets of a demo, joined in order where comma-separated.
    """

    action_names = None

    def __init__(self, path: Path, config: DatasetConfig):
        self.broken: list[tuple[str, str]] = []
        self._rate = config.rate_hz or RATE_HZ
        self._action, self._state = config.action_key or "actions", config.state_key or STATE
        self._required = config.state_key is not None
        self._demos: list[tuple[Path, str]] = []
        views: dict[str, None] = {}
        self._root = path if path.is_dir() else path.parent
        for file in sorted(path.rglob("*.hdf5")) if path.is_dir() else [path]:
            try:
                with h5py.File(file) as data:
                    demos = sorted(data["data"], key=lambda name: int(name.rsplit("_", 1)[-1]))
                    self._demos += [(file, name) for name in demos]
                    for key in data["data"][demos[0]]["obs"] if demos else ():
                        if key.endswith("_rgb"):
                            views[key.removesuffix("_rgb")] = None
            except (OSError, KeyError, ValueError) as error:
                self.broken.append((str(file), f"not a LIBERO file: {error}"))
        self.views = tuple(views)
        self._demos = self._demos[: config.max_episodes]

    def __len__(self) -> int:
        return len(self._demos)

    def key(self, index: int) -> str:
        file, name = self._demos[index]
        return f"{file.relative_to(self._root).with_suffix('').as_posix()}/{name}"

    def length(self, index: int) -> int:
        file, name = self._demos[index]
        try:
            with h5py.File(file) as data:
                return len(data["data"][name]["actions"])
        except (OSError, KeyError) as error:
            raise DataError(f"{file}: {name}: {error}") from error

    def episode(self, index: int) -> Episode:
        file, name = self._demos[index]
        key = self.key(index)
        try:
            with h5py.File(file) as data:
                demo = data["data"][name]
                actions = _columns(demo, self._action)
                stored = all(part in demo for part in self._state.split(","))
                state = _columns(demo, self._state) if stored or self._required else None
                views = tuple(v for v in self.views if f"{v}_rgb" in demo["obs"])
                problem = data["data"].attrs.get("problem_info", "{}")
                counts = {view: len(demo["obs"][f"{view}_rgb"]) for view in views}
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{file}: {name}: {error}") from error
        counts |= {} if state is None else {"state": len(state)}
        for what, count in counts.items():
            if count != len(actions):
                raise DataError(f"{file}: {name}: {len(actions)} actions, {count} frames of {what}")

        def decode(view: str, indices: np.ndarray) -> np.ndarray:
            wanted, back = np.unique(indices, return_inverse=True)
            try:
                with h5py.File(file) as data:  # h5py reads ascending indices only
                    return data["data"][name]["obs"][f"{view}_rgb"][wanted][:, ::-1][back]
            except (OSError, KeyError) as error:
                raise DataError(f"{file}: {name}: {error}") from error

        return Episode(
            key=key,
            timestamps=uniform_times(len(actions), self._rate),
            views=views,
            instruction=_instruction(problem),
            decode=decode,
            actions=finite(actions, key, "action"),
            state=finite(state, key, "state"),
        )

    def fingerprint(self) -> str:
        return fingerprint(dict.fromkeys(file for file, _ in self._demos))


def _columns(demo: h5py.Group, names: str) -> np.ndarray:
    return np.concatenate(
        [np.asarray(demo[name]).reshape(len(demo[name]), -1) for name in names.split(",")], -1
    )


def _instruction(problem: str | bytes) -> str:
    try:
        text = json.loads(problem).get("language_instruction", "")
    except (ValueError, AttributeError):
        return ""
    return (" ".join(text) if isinstance(text, list) else str(text)).strip().strip('"')
