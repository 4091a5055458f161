"""What a policy commands: the action vector of one robot, dimension by dimension."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from config.loading import Strict


class Dimension(Strict):
    """One entry of the action vector."""

    name: str = Field(description="ROS joint name, e.g. left_fr3_joint1 or left_fr3_gripper")
    kind: Literal["joint", "gripper"] = Field(
        description="joint: absolute position in rad; gripper: opening 0 (closed) to 1 (open)"
    )

    @property
    def unit(self) -> str:
        return "rad" if self.kind == "joint" else "opening"


class Embodiment(Strict):
    """Action space of a robot: names, order and units of the D dimensions, horizon and demonstration rate."""

    KIND: ClassVar[str] = "embodiments"

    name: str
    dimensions: tuple[Dimension, ...] = Field(min_length=1)
    horizon: int = Field(14, ge=2, le=64, description="H, actions in a chunk (ViPRA section 5.1: 14)")
    rate_hz: float = Field(gt=0, le=100, description="rate of the demonstrations")
    history_seconds: float = Field(
        gt=0, le=2, description="how long o_{t-1} lies before o_t, by capture stamp"
    )

    @model_validator(mode="after")
    def _unique_names(self):
        if len(set(self.names)) != len(self.names):
            raise ValueError("dimension names must be unique")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dimensions)

    @property
    def action_dim(self) -> int:
        """D."""
        return len(self.dimensions)
