"""What a policy commands: the action vector of one robot, dimension by dimension.

Two action spaces:

absolute_joints
    Per arm its joints' positions, then at most one gripper (ViPRA section 5.1, appendix H.1).
end_effector_deltas
    Per arm x, y, z and the rotations about them, then at most one gripper: one step of the tool centre point
    in the axes of the arm's base (its link 0), as in Open X-Embodiment, LIBERO and SIMPLER (ViPRA table 5:
    "7 (End-Effector Deltas)"). From a pose (p, R), action i asks for (p + d, exp(w) R), d in m, w a rotation
    vector in rad, one period after its moment: at t_obs + (i + 1) / rate. Sources: robosuite's OSC_POSE
    controller, which LIBERO uses (set_goal_position, set_goal_orientation); Bridge gives w as roll, pitch and
    yaw, which differs in second order only. LIBERO's files hold that controller's input, -1 to 1, of which 1
    means 0.05 m and 0.5 rad, and grippers from -1 (open) to 1 (closed): convert both first.
    The state of such a robot is its joints: the policy is not shown it, the robot side starts from it.

A gripper is an opening, 0 (closed) to 1 (open), absolute in both.
"""

from math import inf
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from config.loading import Strict

ActionSpace = Literal["absolute_joints", "end_effector_deltas"]
UNITS = {"joint": "rad", "translation": "m/action", "rotation": "rad/action", "gripper": "opening"}
_KINDS = {
    "absolute_joints": ("joint", "gripper"),
    "end_effector_deltas": ("translation", "rotation", "gripper"),
}
FRAME_SLACK = 0.02  # of a frame, by which a rounded history_seconds may be off
_STEP = ["translation"] * 3 + ["rotation"] * 3


class Dimension(Strict):
    """One entry of the action vector."""

    name: str = Field(description="arm, underscore, rest: left_fr3_joint1 (its ROS name), left_fr3_gripper")
    kind: Literal["joint", "gripper", "translation", "rotation"] = Field(
        description="joint: absolute position in rad; gripper: opening 0 (closed) to 1 (open); "
        "translation, rotation: step in m, rad per action, in the base's axes"
    )
    low: float | None = Field(None, description="least value that a demonstration may hold")
    high: float | None = Field(None, description="greatest one; null: not checked")

    @model_validator(mode="after")
    def _range(self):
        if self.kind == "gripper" and (self.low, self.high) != (None, None):
            raise ValueError(f"{self.name}: an opening is always 0 to 1: leave out low and high")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.name}: give both low and high, or neither")
        if self.low is not None and self.low >= self.high:
            raise ValueError(f"{self.name}: low {self.low} must be below high {self.high}")
        if self.kind in ("translation", "rotation") and self.low is None:
            raise ValueError(f"{self.name}: a step needs low and high, {UNITS[self.kind]}")
        return self

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    @property
    def arm(self) -> str:
        return self.name.split("_")[0]


class Crop(Strict):
    """Part of a picture, as shares of its width and height."""

    left: float = Field(ge=0, lt=1)
    top: float = Field(ge=0, lt=1)
    width: float = Field(gt=0, le=1)
    height: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _inside(self):
        if self.left + self.width > 1 + 1e-6 or self.top + self.height > 1 + 1e-6:
            raise ValueError("left + width and top + height must not exceed 1")
        return self

    def of(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of a picture of `height` x `width` px; at least one of each."""
        top, left = round(self.top * height), round(self.left * width)
        down, across = max(round(self.height * height), 1), max(round(self.width * width), 1)
        return slice(top, top + down), slice(left, left + across)


class Embodiment(Strict):
    """Action space of a robot: names, order and units of the D dimensions, horizon and demonstration rate."""

    KIND: ClassVar[str] = "embodiments"

    name: str
    action_space: ActionSpace = "absolute_joints"
    dimensions: tuple[Dimension, ...] = Field(min_length=1, max_length=128)
    horizon: int = Field(14, ge=1, le=64, description="H, actions in a chunk (ViPRA section 5.1: 14)")
    rate_hz: float = Field(gt=0, le=100, description="rate of the demonstrations")
    history_seconds: float = Field(
        gt=0,
        le=2,
        description="how long o_{t-1} lies before o_t, by capture stamp: whole frames of the demonstrations",
    )
    camera: str | None = Field(
        None, description="view that the policy sees, by its name in datasets; null: their first"
    )
    crop: Crop | None = Field(
        None, description="part of the front camera's picture that the policy sees; null: all of it"
    )

    @model_validator(mode="after")
    def _history(self):
        frames = self.history_seconds * self.rate_hz
        whole = max(round(frames), 1)
        if abs(frames - whole) > FRAME_SLACK:
            raise ValueError(
                f"history_seconds {self.history_seconds:g} is {frames:.2f} frames at rate_hz "
                f"{self.rate_hz:g}, and demonstrations have whole ones: {whole / self.rate_hz:.7g} is {whole}"
            )
        return self

    @model_validator(mode="after")
    def _vector(self):
        twice = [name for name in self.names if self.names.count(name) > 1]
        if twice:
            raise ValueError(f"dimension {twice[0]} occurs twice: names must be unique")
        allowed = _KINDS[self.action_space]
        for dimension in self.dimensions:
            if dimension.kind not in allowed:
                raise ValueError(
                    f"{dimension.name} is a {dimension.kind}: action_space {self.action_space} has "
                    f"{', '.join(allowed)} only"
                )
        if self.action_space == "end_effector_deltas":
            for arm, numbers in self.by_arm.items():
                kinds = [self.dimensions[n].kind for n in numbers]
                together = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
                if not together or kinds not in (_STEP, [*_STEP, "gripper"]):
                    raise ValueError(
                        f"arm {arm} has {', '.join(kinds)}: end_effector_deltas need three translations, "
                        "three rotations, then at most one gripper, with names that begin with the arm's"
                    )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dimensions)

    @property
    def by_arm(self) -> dict[str, list[int]]:
        """Arm -> numbers of its dimensions, both in the action vector's order."""
        rows: dict[str, list[int]] = {}
        for number, dimension in enumerate(self.dimensions):
            rows.setdefault(dimension.arm, []).append(number)
        return rows

    @property
    def limits(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Least and greatest value [D] of each dimension; infinite where none is given."""
        low = [0.0 if d.kind == "gripper" else -inf if d.low is None else d.low for d in self.dimensions]
        high = [1.0 if d.kind == "gripper" else inf if d.high is None else d.high for d in self.dimensions]
        return tuple(low), tuple(high)

    @property
    def stateful(self) -> bool:
        """Whether a state in the actions' units exists, which actions may be relative to."""
        return self.action_space == "absolute_joints"

    @property
    def action_dim(self) -> int:
        """D."""
        return len(self.dimensions)
