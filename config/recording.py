"""Recording demonstrations: where to, how many, and what makes an episode suspicious."""

import re

from pydantic import Field, field_validator

from config.loading import Strict, load, root
from config.task import Task

FIRST_SEED = 10_000  # demonstrations are trials from here on; evaluate on other seeds


def names_task(text: str) -> bool:
    """Whether `text` is a file in config/tasks or a path to one, there or not, and no instruction."""
    if text.endswith((".yaml", ".yml")) or re.fullmatch(r"\S*[_/-]\S*", text):
        return True
    return text.isalnum() and (root() / "config" / "tasks" / f"{text}.yaml").is_file()


class Recording(Strict):
    """The recorder node's parameters besides the robot."""

    dataset: str = Field("", description="folder of the dataset; a new one is made, an old one continued")
    task: str = Field(
        "",
        max_length=512,
        description="what is demonstrated, in words, or a file in config/tasks, whose trials are then "
        "asked for one after the other; may change in between",
    )
    first_seed: int = Field(
        FIRST_SEED,
        ge=0,
        description="episode n is trial first_seed + n of a task file; evaluate on other seeds",
    )
    target: int = Field(200, ge=1, description="episodes the dataset shall have in the end")
    rate_hz: int | None = Field(
        None, ge=1, le=60, description="frames per second; null: the embodiment's rate"
    )
    max_episode_s: float = Field(120.0, gt=0, le=3600, description="an episode ends by itself after this")
    keep_clean: bool = Field(False, description="keep at ~/stop what has no warning; with one, always ask")
    crf: int = Field(23, ge=0, le=40, description="H.264 quality of the pictures, lower is better")
    queue_frames: int = Field(
        90, ge=4, le=1000, description="frames that may wait for the encoder, then they are lost"
    )
    reserve_mb: int = Field(500, ge=0, description="free disk below which an episode is ended, MB")
    raw: bool = Field(
        False,
        description="also every message but pictures as <dataset>/raw/<time>.mcap; needs the package mcap",
    )

    @field_validator("task")
    @classmethod
    def _readable(cls, task: str) -> str:
        if names_task(task := task.strip()):
            load(Task, task)
        return task


class Quality(Strict):
    """Above these, an episode is suspicious. Used while recording and by `vipra dataset check`."""

    sync_ms: float = Field(10.0, gt=0, description="99th percentile of a frame's synchronisation error")
    stale_ms: float = Field(
        100.0, gt=0, description="synchronisation error of a single frame: arms were not heard of"
    )
    gap_frames: float = Field(
        1.75, gt=1, description="frame periods between two captures; 1.5 is three of a camera twice as fast"
    )
    pace_ms: float = Field(
        20.0, gt=0, description="that captures may stray from the even rate within a second, 95th percentile"
    )
    freeze_s: float = Field(
        0.3, gt=0, description="no picture change while an arm or hand moves by freeze_motion_rad or _opening"
    )
    freeze_motion_rad: float = Field(0.05, gt=0)
    freeze_motion_opening: float = Field(0.1, gt=0, description="share of the whole opening")
    freeze_levels: float = Field(
        3.0, ge=0, description="largest mean change of a 16x16 px block that counts as none, of 255"
    )
    copies_share: float = Field(
        0.2, gt=0, le=1, description="of the pictures of a second, equal to the one before while an arm moves"
    )
    idle_s: float = Field(0.3, gt=0, description="longest rest, start and end of an episode included")
    idle_speed_rad_s: float = Field(0.02, gt=0, description="slower than this in every joint is rest")
    idle_opening_per_s: float = Field(0.05, gt=0, description="the same for hands")
    min_s: float = Field(1.0, ge=0, description="shortest episode")
    tracking_rad: float = Field(0.1, gt=0, description="largest distance of action and state")
