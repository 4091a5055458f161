"""One robot: its arms, camera, controller, policy client and, where there is no hardware, its simulator."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from config.loading import ConfigError, Joints, Strict, load
from config.safety import Safety


class Arm(Strict):
    """One Franka arm."""

    hostname: str = Field(description="FCI address of the arm")
    model: Literal["fr3", "panda"] = "fr3"
    gripper: bool = Field(True, description="a Franka Hand is mounted")
    home_rad: Joints = Field(description="joint positions of ~/home, rad")


class Camera(Strict):
    """The front camera."""

    source: Literal["zed", "sim", "file", "uvc"]
    width: int = Field(ge=32, le=4096, description="px, of the published image")
    height: int = Field(ge=32, le=4096, description="px, of the published image")
    rate_hz: float = Field(gt=0, le=120)
    serial: int | None = Field(None, description="ZED serial number; null: the first camera found")
    path: str | None = Field(None, description="video file of source 'file'")
    loop: bool = Field(True, description="source 'file' starts again at its end")
    device: int = Field(0, ge=0, description="index of source 'uvc' (/dev/videoN)")
    freeze_timeout_s: float = Field(
        0.5, gt=0, le=5, description="same picture for longer than this is a frozen camera"
    )


class Control(Strict):
    """The arms' reference loop and impedance controller."""

    reference_rate_hz: float = Field(200.0, ge=50, le=1000)
    stiffness: Joints = Field((600.0,) * 7, description="Nm/rad; damping is critical")
    max_delta_tau_nm: float = Field(1.0, gt=0, le=1.0, description="largest torque step per 1 ms cycle, Nm")
    deadman_refresh_s: float = Field(0.04, gt=0, description="how often a fresh dead-man motion is armed")
    deadman_timeout_s: float = Field(0.12, gt=0, description="age at which franky stops the arm by itself")
    lease_timeout_s: float = Field(
        5.0, gt=0, description="a lease without an accepted chunk for this long is freed"
    )
    joint_state_rate_hz: float = Field(100.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _deadman_order(self):
        if self.deadman_timeout_s < 2 * self.deadman_refresh_s:
            raise ValueError("deadman_timeout_s must be at least twice deadman_refresh_s")
        return self


class PolicyClient(Strict):
    """How the policy node asks the server and plays its chunks (ViPRA section 5.4, appendix G)."""

    server: str = Field("tcp://127.0.0.1:5555", description="ZeroMQ address of the policy server")
    server_public_key: str | None = Field(None, description="file with the server's CURVE public key")
    client_secret_key: str | None = Field(None, description="file with this client's CURVE secret key")
    task: str = Field("", max_length=512, description="instruction; empty: ~/start asks for one")
    action_rate_hz: float = Field(22.0, gt=0, le=22, description="executed actions per second")
    replan_after: Literal[7, 14] = Field(
        7, description="actions of each chunk that run before the next takes over"
    )
    mode: Literal["asynchronous", "synchronous"] = "asynchronous"
    anchor: Literal["observation", "append"] = Field(
        "observation",
        description="asynchronous: where a chunk's time starts (append: open loop within a chunk)",
    )
    min_cycle_s: float = Field(
        0.0, ge=0, le=10, description="synchronous: shortest time between two inferences"
    )
    deadline_s: float = Field(2.0, gt=0, le=60, description="budget of one request at the server")
    camera_timeout_s: float = Field(
        0.3, gt=0, le=5, description="no new frame for this long is a lost camera"
    )
    jpeg_quality: int | None = Field(None, ge=50, le=100, description="null: raw pixels")
    inject_latency_ms: float = Field(
        0.0, ge=0, le=5000, description="added to every inference, for experiments"
    )
    seed: int = Field(0, ge=0, description="noise seed of every request; each refused chunk adds one")
    gripper_sustained_actions: int = Field(
        1,
        ge=1,
        le=14,
        description="a chunk that opens or closes a hand for fewer actions leaves it as it was",
    )


# ViPRA section 5.4: "3.5 Hz" and "7 Hz" are executed actions per second, one inference in 2 s.
PRESETS: dict[str, dict[str, str | float]] = {
    "3.5hz": {"mode": "synchronous", "action_rate_hz": 15.0, "replan_after": 7, "min_cycle_s": 2.0},
    "7hz": {"mode": "synchronous", "action_rate_hz": 15.0, "replan_after": 14, "min_cycle_s": 2.0},
    "22hz": {"mode": "asynchronous", "anchor": "append", "action_rate_hz": 22.0, "replan_after": 14},
}


class Simulation(Strict):
    """The simulated workcell that stands in for the hardware."""

    name: str = Field(
        "vipra_workcell",
        pattern=r"^[a-z0-9_-]{1,40}$",
        description="names its shared memory and control socket",
    )
    seed: int = Field(0, ge=0)
    task: str = Field(
        "", description="file in config/tasks: its trial `seed` instead of the workcell's objects"
    )
    split: Literal["seen", "unseen"] = Field("seen", description="of the task's trial")
    watchdog: bool = Field(True, description="communication watchdog and reflexes like the real robot's")
    wait_for_camera: bool = Field(
        False, description="simulated time stands until each picture is taken: none is lost on a slow machine"
    )


class Robot(Strict):
    """Everything the robot PC needs to know about one robot."""

    KIND: ClassVar[str] = "robots"
    FILES: ClassVar[tuple[str, ...]] = ("embodiment", "workcell", "safety")

    embodiment: str = Field(description="file in config/embodiments")
    workcell: str = Field(description="file in config/workcells")
    safety: str = Field(description="file in config/safety")
    clock: Literal["monotonic", "simulated"] = Field(
        description="executor clock: CLOCK_MONOTONIC or simulated time"
    )
    arms: dict[Literal["left", "right"], Arm] = Field(min_length=1)
    camera: Camera
    control: Control = Control()
    policy: PolicyClient = PolicyClient()
    simulation: Simulation | None = None

    @model_validator(mode="after")
    def _consistent(self):
        simulated = self.simulation is not None
        if (self.clock == "simulated") != simulated:
            raise ValueError("clock 'simulated' and a simulation section go together")
        if self.camera.source == "sim" and not simulated:
            raise ValueError("camera source 'sim' needs a simulation section")
        return self


def safety_of(robot: Robot) -> Safety:
    """The limits `robot` names. Raises ConfigError where they are of another arm than one of its own."""
    safety = load(Safety, robot.safety)
    for name, arm in robot.arms.items():
        if arm.model != safety.model:
            raise ConfigError(
                f"arm {name} is a {arm.model}, safety {robot.safety} is for {safety.model}: correct "
                "`model` of the arm or `safety` of the robot"
            )
    return safety
