"""Teleoperation: which leaders there are, how they are read, and when an arm may follow one."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from config.loading import Joints, Strict

ServoId = Annotated[int, Field(ge=0, le=252)]
QUARTER = math.pi / 2
_MULTIPLE = 0.01  # rad an offset may be off a multiple of pi/2: written with three digits


class Dynamixel(Strict):
    """The servos of one GELLO. joint = sign (angle - offset), angle = counts 2 pi / 4096."""

    port: str = Field(description="serial device, best /dev/serial/by-id/...")
    baud: int = Field(57600, gt=0, description="bits/s; 57600 is the servos' factory setting")
    ids: Annotated[tuple[ServoId, ...], Field(min_length=7, max_length=7)] = Field(
        (1, 2, 3, 4, 5, 6, 7), description="servo of each joint"
    )
    offsets_rad: Joints = Field(description="multiples of pi/2, from vipra gello calibrate")
    signs: Annotated[tuple[Literal[-1, 1], ...], Field(min_length=7, max_length=7)] = Field(
        (1, -1, 1, -1, 1, 1, 1), description="direction of each servo; GELLO for the FR3"
    )
    gripper_id: ServoId | None = Field(8, description="servo of the trigger; null: none")
    gripper_open_rad: float = Field(3.22, description="trigger servo let go; GELLO Duo")
    gripper_closed_rad: float = Field(2.0, description="trigger servo squeezed; GELLO Duo")

    @model_validator(mode="after")
    def _consistent(self):
        ids = [*self.ids, *([] if self.gripper_id is None else [self.gripper_id])]
        if len(set(ids)) != len(ids):
            raise ValueError(f"servo ids {ids}: each must be different")
        for i, offset in enumerate(self.offsets_rad):
            if abs(math.remainder(offset, QUARTER)) > _MULTIPLE:
                raise ValueError(f"joint {i + 1}: offset {offset} is no multiple of pi/2: calibrate again")
        if self.gripper_id is not None and abs(self.gripper_open_rad - self.gripper_closed_rad) < 0.2:
            raise ValueError("gripper_open_rad and gripper_closed_rad are less than 0.2 rad apart")
        return self


class Leader(Strict):
    """One GELLO: the ROS namespace it publishes in, or its servos."""

    namespace: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_/]*$",
        description="of GELLO's publisher: <namespace>/gello/joint_states; empty: none",
    )
    dynamixel: Dynamixel | None = None


class Filter(Strict):
    """One Euro filter (Casiez, Roussel, Vogel 2012): cut-off = min_cutoff_hz + beta |speed|.

    Its lag is 1 / (2 pi cut-off): 53 ms near rest, 20 ms at 0.5 rad/s with the defaults.
    """

    min_cutoff_hz: float = Field(3.0, gt=0, le=100, description="near rest")
    beta: float = Field(10.0, ge=0, description="Hz of cut-off per rad/s of speed")
    speed_cutoff_hz: float = Field(2.0, gt=0, le=100, description="of the speed estimate")


class Teleop(Strict):
    """Everything the teleop node needs besides the robot."""

    KIND: ClassVar[str] = "teleop"

    source: Literal["topics", "dynamixel"] = Field(
        description="GELLO's ROS 2 publisher, or its servos on a serial port here"
    )
    leaders: dict[Literal["left", "right"], Leader] = Field(
        min_length=1, description="by arm; those the robot has no arm for are not used"
    )
    rate_hz: float = Field(25.0, ge=10, le=200, description="of the leaders (GELLO publishes at 25)")
    delay_s: float = Field(
        0.12, gt=0, le=0.5, description="from a leader's sample to its execution; at least 2 samples"
    )
    knots: int = Field(8, ge=4, le=64, description="samples in each chunk")
    filter: Filter = Filter()
    engage_error_rad: float = Field(
        0.3, gt=0, le=0.8, description="leader and arm further apart than this are not coupled"
    )
    align_velocity_rad_s: float = Field(
        0.18, gt=0, le=0.2, description="of the arm while it moves to its leader; its curve peaks 4 % above"
    )
    align_acceleration_rad_s2: float = Field(1.0, gt=0, le=5)
    aligned_error_rad: float = Field(0.02, gt=0, le=0.05, description="closer than this, the arm follows")
    velocity_rad_s: float = Field(
        1.5, gt=0, le=2.6, description="the arm follows at most at this speed, then falls behind"
    )
    acceleration_rad_s2: float = Field(
        6.0,
        gt=0,
        le=9,
        description="of the arm while it follows; less of it runs further past a leader that stops",
    )
    lost_after_s: float = Field(0.2, gt=0, le=0.5, description="no sample for this long: the leader is lost")
    jump_rad: float = Field(0.3, gt=0, le=1.5, description="a step of one sample beyond this is a fault")
    frozen_after_s: float = Field(
        0.5, gt=0, le=5, description="samples equal to the bit for this long: the leader may have no power"
    )
    frozen_jump_rad: float = Field(
        0.1, gt=0, le=1.5, description="a step of one sample beyond this, after that, is a fault: it is back"
    )

    @model_validator(mode="after")
    def _consistent(self):
        period = 1.0 / self.rate_hz
        if self.delay_s < 2 * period - 1e-9:
            raise ValueError(f"delay_s must be at least {2 * period:g} (two samples): chunks would run out")
        if (self.knots - 1) * period < self.delay_s:
            raise ValueError("knots / rate_hz must exceed delay_s: chunks would begin in the future")
        if self.lost_after_s < 2 * period - 1e-9:
            raise ValueError(f"lost_after_s must be at least {2 * period:g} (two samples)")
        if self.aligned_error_rad >= self.engage_error_rad:
            raise ValueError("aligned_error_rad must be below engage_error_rad")
        for arm, leader in self.leaders.items():
            if self.source == "dynamixel" and leader.dynamixel is None:
                raise ValueError(f"{arm}: no dynamixel section: run vipra gello calibrate --arm {arm}")
        if self.source == "dynamixel":
            what, places = "port", [leader.dynamixel.port for leader in self.leaders.values()]
        else:
            what, places = "namespace", [leader.namespace.strip("/") for leader in self.leaders.values()]
        if len(set(places)) < len(places):
            raise ValueError(f"leaders: {what} {places[0]!r} twice: one GELLO would lead both arms")
        return self
