"""Demonstrations in memory: frames, states and action chunks of many short episodes, as one `.npz` file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Demonstrations:
    """N frames of E episodes at one rate, each with the chunk of H actions that starts at it."""

    frames: np.ndarray  # uint8 RGB [N, h, w, 3]
    states: np.ndarray  # float32 [N, D], joint positions in rad and gripper openings at the frame
    actions: np.ndarray  # float32 [N, H, D], commands for this frame's time and the H - 1 steps after it
    episode: np.ndarray  # int32 [N], non-decreasing
    task: np.ndarray  # int32 [N], index into tasks
    tasks: tuple[str, ...]

    @property
    def previous(self) -> np.ndarray:
        """Index [N] of the frame one step earlier in the same episode; an episode's first frame is its
        own.
        """
        index = np.arange(len(self.episode))
        first = np.concatenate([[True], self.episode[1:] != self.episode[:-1]])
        return np.where(first, index, index - 1)

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **{**self.__dict__, "tasks": np.array(self.tasks)})

    @classmethod
    def load(cls, path: Path) -> "Demonstrations":
        with np.load(path, allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        return cls(**{**arrays, "tasks": tuple(str(t) for t in arrays["tasks"])})
