"""What a stage cuts from an episode: which frames, actions and masks belong to a sample."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from config.dataset import DatasetConfig
from training.data.augment import Draw, prepare
from training.data.episode import DataError, Episode

Unit = Literal["episode", "frame"]  # what one pass over a dataset counts


def pick_view(episode: Episode, views: tuple[str, ...]) -> str:
    """The first of `views` (all, if empty) that the episode has. Raises DataError."""
    for view in views or episode.views:
        if view in episode.views:
            return view
    raise DataError(f"{episode.key}: none of the views {', '.join(views) or '(any)'}; it has {episode.views}")


def check_usable(episode: Episode, config: DatasetConfig) -> None:
    """Raises DataError for an episode that its dataset's config leaves out."""
    if episode.length < config.min_frames:
        raise DataError(f"{episode.key}: has {episode.length} frames, needs {config.min_frames}")
    if config.instructed_only and not episode.instruction:
        raise DataError(f"{episode.key}: has no instruction")


@dataclass(frozen=True)
class Cut:
    """Where and how a sample is cut from its episode."""

    at: int  # frame
    stride: int  # frames from one step to the next
    views: tuple[str, ...]  # to choose from, in order of preference; empty: the episode's
    rng: np.random.Generator
    change: Draw | None = None


@dataclass(frozen=True)
class Clips:
    """Stages 0 and 1: `frames` frames in a row from a random start of an episode; the end is repeat-padded.

    With `views` = 2, of two views drawn from the episode's, synchronised; an episode with one view gives it
    twice and `paired` False.
    """

    frames: int = 8
    size: int = 224
    views: Literal[1, 2] = 1
    unit: Unit = "episode"

    def first(self, length: int, stride: int, rng: np.random.Generator) -> int:
        return int(rng.integers(max(length - (self.frames - 1) * stride, 1)))

    def read(self, episode: Episode, cut: Cut) -> dict[str, Any]:
        """frames u8 [F, s, s, 3] (two views: [2, F, s, s, 3] and paired), valid bool [F]."""
        wanted = cut.at + cut.stride * np.arange(self.frames)
        index = np.minimum(wanted, episode.length - 1)
        pick_view(episode, cut.views)
        known = [view for view in cut.views or episode.views if view in episode.views]
        chosen = [known[i] for i in cut.rng.permutation(len(known))[: self.views]]
        frames = [prepare(episode.frames(view, index), self.size, cut.change) for view in chosen]
        valid = wanted < episode.length
        if self.views == 1:
            return {"frames": frames[0], "valid": valid}
        paired = np.array(len(chosen) == 2)
        return {"frames": np.stack([frames[0], frames[-1]]), "paired": paired, "valid": valid}


@dataclass(frozen=True)
class Chunks:
    """Stage 3: o_{t-1} (`history_seconds` before o_t, by timestamp), o_t, and the actions of t .. t+H-1.

    Action i is the command recorded with frame t+i; past the end the last one repeats and `mask` is False.
    """

    horizon: int = 14
    size: int = 256
    history_seconds: float = 1 / 15
    unit: Unit = "frame"

    def read(self, episode: Episode, cut: Cut) -> dict[str, Any]:
        """frames u8 [2, s, s, 3], actions f32 [H, D], mask bool [H], state f32 [S] (zeros [D] if none).

        Raises DataError where there are no actions.
        """
        if episode.actions is None:
            raise DataError(
                f"{episode.key}: has no actions; set action_key, or use it for stages 1 and 2 only"
            )
        before = history(episode.timestamps, cut.at, self.history_seconds)
        frames = episode.frames(pick_view(episode, cut.views), [before, cut.at])
        wanted = cut.at + cut.stride * np.arange(self.horizon)
        state = (
            np.zeros(episode.actions.shape[1], np.float32) if episode.state is None else episode.state[cut.at]
        )
        return {
            "frames": prepare(frames, self.size, cut.change),
            "actions": episode.actions[np.minimum(wanted, episode.length - 1)],
            "mask": wanted < episode.length,
            "state": state,
        }


Window = Clips | Chunks


def history(timestamps: np.ndarray, at: int, seconds: float) -> int:
    """The frame nearest to `seconds` before frame `at`; the first one where the episode is younger."""
    return int(np.abs(timestamps[: at + 1] - (timestamps[at] - seconds)).argmin())
