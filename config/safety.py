"""Every limit a command is held to. Units are in the key names; sources are comments in
`config/safety/*.yaml`.

Camera time-outs belong to the camera and the policy client (`config.robot`); everything about motion is here.
"""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from config.loading import Strict, Vector3

Positive = Annotated[float, Field(gt=0)]
Joints = Annotated[tuple[float, ...], Field(min_length=1, max_length=32)]
PositiveJoints = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=32)]
_NOT_JOINTS = ("contact_force", "collision_force", "load_centre_m", "load_inertia_kg_m2")
Wrench = Annotated[tuple[Positive, ...], Field(min_length=6, max_length=6)]


def _same_length(model: Strict, joints: int) -> None:
    """Raises ValueError unless every list of `model` that has a value a joint has `joints` of them."""
    for key, value in model:
        if isinstance(value, tuple) and key not in _NOT_JOINTS and len(value) != joints:
            raise ValueError(f"{key} has {len(value)} values, the arm has {joints} joints (position_min_rad)")


class VelocityEnvelope(Strict):
    """Velocity that still allows braking before the end of travel, joint by joint.

    Up: dq <= -offset + sqrt(coefficient (upper - q)); down: dq >= offset - sqrt(coefficient (q - lower)).
    Following the curve into the end of travel decelerates by at most coefficient / 2.
    """

    upper_rad: Joints
    lower_rad: Joints
    offset_rad_s: Joints
    coefficient_rad_s2: PositiveJoints
    share: float = Field(0.5, gt=0, le=1, description="part of the coefficient that commands may rely on")


class JointRange(Strict):
    """Ends of travel and derivatives of one arm's joints, as many as position_min_rad has (Franka: seven)."""

    position_min_rad: Joints
    position_max_rad: Joints
    soft_margin_rad: float = Field(
        0.1, gt=0, lt=0.5, description="commands stay this far inside the ends of travel"
    )
    velocity_rad_s: PositiveJoints
    velocity_envelope: VelocityEnvelope
    acceleration_rad_s2: PositiveJoints
    jerk_rad_s3: PositiveJoints
    torque_nm: PositiveJoints
    torque_rate_nm_s: Positive
    software_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="part of velocity and acceleration that commands use; the rest is for tracking",
    )
    reference_jerk_share: float = Field(
        0.5, gt=0, le=1, description="part of the jerk that the reference may use"
    )

    @model_validator(mode="after")
    def _soft_inside_hard(self):
        envelope = self.velocity_envelope
        _same_length(self, len(self.position_min_rad))
        _same_length(envelope, len(self.position_min_rad))
        for j in range(len(self.position_min_rad)):
            lower, upper = self.position_min_rad[j], self.position_max_rad[j]
            if upper - lower <= 2 * self.soft_margin_rad:
                raise ValueError(
                    f"joint {j + 1}: no travel left inside {lower}..{upper} rad less the soft margin"
                )
            if (
                envelope.upper_rad[j] < upper - self.soft_margin_rad
                or envelope.lower_rad[j] > lower + self.soft_margin_rad
            ):
                raise ValueError(f"joint {j + 1}: the velocity envelope ends inside the soft position limits")
            braking = 0.5 * envelope.share * envelope.coefficient_rad_s2[j]
            if braking > self.software_share * self.acceleration_rad_s2[j]:
                raise ValueError(
                    f"joint {j + 1}: following the velocity envelope needs {braking} rad/s2, over the limit"
                )
            if envelope.offset_rad_s[j] < 0:
                raise ValueError(f"joint {j + 1}: offset_rad_s must not be negative")
        return self


class Stop(Strict):
    """Controlled stop: both arms at |dq| < rest_velocity by settle_s + |dq| / deceleration."""

    deceleration_rad_s2: Positive = 5.0
    jerk_rad_s3: Positive = 1000.0
    reaction_s: float = Field(
        0.02, gt=0, le=0.1, description="from an arm, peer or command fault to deceleration"
    )
    settle_s: float = Field(0.05, gt=0, le=0.2)
    rest_velocity_rad_s: Positive = 0.02


class Join(Strict):
    """How a new chunk takes over: its difference to the running reference decays as a quintic.

    T = max(min_duration_s, sqrt(5.8 |e| / a), 1.9 |e| / v), a and v being `share` of the limits.
    """

    fault_error_rad: float = Field(0.15, gt=0, le=0.5)
    min_duration_s: float = Field(0.25, gt=0, le=2)
    share: float = Field(0.5, gt=0, le=1, description="part of velocity and acceleration a join may use")
    chunk_share: float = Field(
        0.7, gt=0, le=1, description="part of acceleration a chunk itself may use; a rougher one is smoothed"
    )


class Start(Strict):
    """First motion after start, home or recovery."""

    refuse_error_rad: float = Field(0.3, gt=0, le=1)
    aligned_error_rad: float = Field(0.05, gt=0)
    velocity_rad_s: float = Field(0.2, gt=0, le=0.5, description="until the error is below aligned_error_rad")
    acceleration_rad_s2: Positive = 1.0
    jerk_rad_s3: Positive = 20.0

    @model_validator(mode="after")
    def _order(self):
        if self.aligned_error_rad >= self.refuse_error_rad:
            raise ValueError("aligned_error_rad must be below refuse_error_rad")
        return self


class Task(Strict):
    """Limits in Cartesian space, at the configuration where a stop begun now would end."""

    speed_m_s: float = Field(1.0, gt=0, le=2, description="of the tool centre point")
    manipulability: float = Field(ge=0, description="Yoshikawa's sqrt(det(J J')), least allowed")
    self_distance_m: float = Field(0.01, ge=0, description="between parts of one arm that are not neighbours")
    arm_distance_m: float = Field(0.03, ge=0, description="between the two arms")
    table_distance_m: float = Field(0.002, ge=0, description="between the table and everything after link 1")


class Tracking(Strict):
    """Reference against measurement."""

    error_rad: Positive = 0.1
    duration_s: Positive = 0.05


class Contact(Strict):
    """Thresholds and load given to the robot with set_collision_behavior and set_load."""

    contact_torque_nm: PositiveJoints
    collision_torque_nm: PositiveJoints
    contact_force: Wrench = Field(description="N, N, N, Nm, Nm, Nm")
    collision_force: Wrench = Field(description="N, N, N, Nm, Nm, Nm")
    load_mass_kg: float = Field(0.0, ge=0, le=3, description="carried besides the hand")
    load_centre_m: Vector3 = (0.0, 0.0, 0.0)
    load_inertia_kg_m2: Vector3 = Field((0.0, 0.0, 0.0), description="diagonal")

    @model_validator(mode="after")
    def _order(self):
        pairs = [
            *zip(self.contact_torque_nm, self.collision_torque_nm, strict=True),
            *zip(self.contact_force, self.collision_force, strict=True),
        ]
        if any(contact > collision for contact, collision in pairs):
            raise ValueError("contact thresholds must not exceed collision thresholds")
        return self


class GripperLimits(Strict):
    """Franka Hand: opening 0 (closed) to 1 (max_width_m)."""

    max_width_m: float = Field(0.08, gt=0, le=0.08)
    speed_m_s: float = Field(0.05, gt=0, le=0.1)
    force_n: float = Field(30.0, gt=0, le=70)
    close_below: float = Field(0.35, ge=0, le=1)
    open_above: float = Field(0.65, ge=0, le=1)
    consecutive_actions: int = Field(2, ge=1, le=10)
    grasp_epsilon_outer_m: float = Field(0.08, ge=0, le=0.08)
    grasped_width_m: float = Field(0.003, ge=0, description="a grasp narrower than this holds nothing")
    timeout_s: float = Field(5.0, gt=0, description="longest a hand command may take")

    @model_validator(mode="after")
    def _order(self):
        if self.close_below >= self.open_above:
            raise ValueError("close_below must be below open_above")
        return self


class Watchdogs(Strict):
    """Silence longer than this is a loss."""

    state_time_s: float = Field(0.02, gt=0, le=1, description="robot.state.time not moving")
    tick_gap_s: float = Field(
        0.1, gt=0, le=1, description="reference loop; later ticks reseed instead of catching up"
    )


class Safety(Strict):
    """Limits of one arm model; every arm of a robot uses the same file."""

    KIND: ClassVar[str] = "safety"

    model: str = Field(min_length=1, description="of the arms these limits are for, as in the robot file")
    joints: JointRange
    stop: Stop = Stop()
    join: Join = Join()
    start: Start = Start()
    chunk_lead_s: float = Field(
        2.0, gt=0, le=10, description="a chunk may begin at most this far in the future"
    )
    task: Task
    tracking: Tracking = Tracking()
    contact: Contact
    gripper: GripperLimits = GripperLimits()
    watchdogs: Watchdogs = Watchdogs()

    @model_validator(mode="after")
    def _stop_within_limits(self):
        joints = self.joints
        _same_length(self.contact, len(joints.position_min_rad))
        if self.stop.deceleration_rad_s2 > joints.software_share * min(joints.acceleration_rad_s2):
            raise ValueError("stop.deceleration_rad_s2 exceeds a joint's acceleration")
        if self.stop.jerk_rad_s3 > joints.reference_jerk_share * min(joints.jerk_rad_s3):
            raise ValueError("stop.jerk_rad_s3 exceeds a joint's jerk")
        return self
