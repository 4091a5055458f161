"""Trials in lockstep simulation: simulated time stands still while the policy thinks.

So a trial is a function of its seed, the checkpoint and the settings, bit for bit, however busy the machine.
The parts are those that drive the robot: `Commander` asks and checks, `Planner` times the chunks,
`ArmsExecutor` joins, limits and supervises them at 200 Hz. Only franky, ROS and the wall clock are replaced.
Inference takes `inject_latency_ms` of simulated time. MuJoCo renders in this process: torch must stay out.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from config.embodiment import Embodiment
from config.loading import load
from config.robot import PolicyClient as PolicyConfig
from config.robot import Robot, safety_of
from policy_server import protocol
from policy_server.client import Mismatch, PolicyClient, ServerUnavailable
from simulation.demonstrate import Demonstrator
from simulation.lockstep import REFERENCE_TICKS, TICK_S, Lockstep
from simulation.render import Painter, live_meshes
from simulation.tasks.trial import Trial
from vipra_ros.commander import ArmsStatus, Commander
from vipra_ros.evaluation.ledger import EvaluationError, Holds, Key, Ledger, Result, Void
from vipra_ros.evaluation.motion import measure
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.execution.planner import Planner
from vipra_ros.report.video import Video, jpeg
from vipra_ros.robot.commands import Tag
from vipra_ros.robot.executor import ArmsExecutor
from vipra_ros.robot.executor import State as ArmsState
from vipra_ros.robot.franka import ArmState
from vipra_ros.safety.supervisor import Supervisor

PERIOD_S = REFERENCE_TICKS * TICK_S  # of the reference, 5 ms
ASK_EVERY = 2  # reference ticks between two looks at the policy's side, as the policy node's timer
# Why there is no chunk, where that is not the policy's doing.
VOID = dict.fromkeys(("disconnected", "timeout", "not_sent", "shutting_down"), "is gone")
VOID["inference_failed"] = VOID["internal"] = "fails"  # out of GPU memory, say
VOID |= dict.fromkeys(("busy", "expired", "not_ready", "superseded"), "does not answer")  # others use it too
_SERVER_S = 60.0  # wall time a request may take


class Waiting:
    """A policy client whose answers come within the moment of simulated time they were asked in.

    alive: raises when the server's process has ended or serves another policy. Raises Void when the server
    is gone or fails.
    """

    def __init__(self, client: PolicyClient, alive: Callable[[], None] = lambda: None):
        self._client, self._alive = client, alive
        self._answers: list[protocol.Chunk | protocol.Error] = []

    @property
    def metadata(self) -> protocol.Metadata | None:
        return self._client.metadata

    def hello(self, timeout_s: float = 0.0) -> protocol.Metadata:
        try:
            metadata = self._client.hello(timeout_s)
        except ServerUnavailable as error:
            raise Void(f"the policy server is gone: {error}") from error
        except Mismatch as error:  # of a server that was started again: nothing about the policy here
            raise EvaluationError(str(error)) from error
        self._alive()
        return metadata

    def submit(self, *arguments, **options) -> int:
        """Waits for the answer, lest a slow one make what was heard before it look old to the commander."""
        seq = self._client.submit(*arguments, **options)
        while all(answer.seq != seq for answer in self._answers):
            self._answers += (answers := self._client.poll(0.5))
            if not answers:
                self._alive()
        for answer in self._answers:
            if isinstance(answer, protocol.Error) and answer.code == "mismatch":
                raise EvaluationError(answer.message)
            if isinstance(answer, protocol.Error) and answer.code in VOID:
                raise Void(f"the policy server {VOID[answer.code]}: {answer.message}")
        return seq

    def poll(self) -> list[protocol.Chunk | protocol.Error]:
        answers, self._answers = self._answers, []
        return answers

    def cancel(self, seq: int) -> None:
        """Nothing is ever in flight between two moments."""

    def prefetch(self, picture: np.ndarray, task: str) -> bool:
        return False


class Stage:
    """The simulated workcell of a task and its camera, used by one trial after the other."""

    def __init__(self, robot: Robot, cache: Path):
        self.robot, self._cache = robot, cache
        self.size = robot.camera.width, robot.camera.height
        self._props = self._painter = self._demonstrator = None

    def set(self, trial: Trial) -> None:
        """The trial's objects on the table, the arms at home."""
        props = [prop.model_dump(exclude={"xy", "rgb"}) for prop in trial.workcell.props]
        if props != self._props:
            self.close()
            self._demonstrator = Demonstrator(trial, load(Embodiment, self.robot.embodiment).rate_hz)
            self._painter = Painter(trial.workcell, *self.size, live_meshes(self._cache))
            self._props = props
        for prop in trial.workcell.props:
            self._painter.model.material(prop.name).rgba[:3] = prop.rgb
        self.world.reset(trial, self.homes)

    @property
    def homes(self) -> dict[str, np.ndarray]:
        """Joints [7] rad by arm."""
        return {name: np.array(arm.home_rad) for name, arm in self.robot.arms.items()}

    @property
    def demonstrator(self) -> Demonstrator:
        return self._demonstrator

    @property
    def world(self) -> Lockstep:
        return self._demonstrator.world

    def picture(self, qpos: np.ndarray | None = None) -> np.ndarray:
        """uint8 [h, w, 3] of the front camera now, or as it was at `qpos` of the whole scene."""
        return self._painter.paint(self.world.data.qpos if qpos is None else qpos)

    def close(self) -> None:
        if self._painter is not None:
            self._painter.close()
            self._painter = None


class Film:
    """What a trial leaves: video, trajectory, last picture; one sample a picture."""

    def __init__(self, stage: Stage, ledger: Ledger, key: Key, rate_hz: float, video: bool):
        self._stage, self._ledger, self._key, self._rate_hz = stage, ledger, key, rate_hz
        ledger.file(key, ".mp4").unlink(missing_ok=True)  # of an attempt that was interrupted
        self._video = Video(ledger.file(key, ".mp4"), rate_hz) if video else None
        self._rows: list[tuple] = []

    def add(self, commanded: dict[str, np.ndarray], picture: np.ndarray | None = None) -> None:
        """commanded: joints [7] rad and opening by arm, [8]; picture: drawn for the video if not given."""
        world = self._stage.world
        if self._video is not None:
            self._video.add(self._stage.picture() if picture is None else picture, world.time_s)
        things = world.things().values()
        self._rows.append(
            (
                world.time_s,
                [np.append(world.joints(arm), world.opening(arm)) for arm in world.arms],
                [commanded[arm] for arm in world.arms],
                [np.concatenate([thing.xyz, thing.quat]) for thing in things],
                [world.tcp(arm)[0] for arm in world.arms],
            )
        )

    def close(self) -> dict[str, float | None]:
        """Write the files; what `motion` measures."""
        world = self._stage.world
        if self._video is not None:
            self._video.close()
        self._ledger.file(self._key, ".jpg").write_bytes(jpeg(self._stage.picture()))
        times, state, commanded, things, tcp = (np.array(column) for column in zip(*self._rows, strict=True))
        np.savez_compressed(
            self._ledger.file(self._key, ".npz"),
            time_s=times,  # [T]
            arms=np.array(list(world.arms)),  # [A]
            state=state,  # [T, A, 8] measured joints, rad, and opening
            commanded=commanded,  # [T, A, 8]
            objects=np.array(list(world.things())),  # [n]
            poses=things,  # [T, n, 7] m and wxyz
            tcp=tcp,  # [T, A, 3] m
        )
        joints = state[..., :7].reshape(len(times), -1)
        even = np.arange(times[0], times[-1] + 1e-6, 1 / self._rate_hz)  # pictures come at whole ticks
        joints = np.stack([np.interp(even, times, column) for column in joints.T], axis=1)
        hand = safety_of(self._stage.robot).gripper
        return measure(joints, commanded[..., 7], self._rate_hz, hand)

    def abandon(self) -> None:
        """Close the files without finishing them; whoever voids the trial removes them."""
        if self._video is not None:
            self._video.close()


def play_policy(
    stage: Stage,
    trial: Trial,
    ledger: Ledger,
    client: Waiting,
    policy: PolicyConfig,
    time_limit_s: float,
    video: bool = True,
) -> Result:
    """The policy behind `client` plays `trial`; ends with its success, the limit or a latched stop.

    Raises Void when the server goes.
    """
    embodiment = load(Embodiment, stage.robot.embodiment)
    stage.set(trial)
    world, key = stage.world, Key(trial.split, trial.seed)
    camera_s, pictures, ended, tick = 1 / embodiment.rate_hz, 0, "time limit", 0
    film = Film(stage, ledger, key, embodiment.rate_hz, video)
    policy = policy.model_copy(update={"task": trial.instruction, "deadline_s": _SERVER_S})
    arms = _Arms(world, stage.robot, trial)
    gate = Supervisor(arms.safety, tuple(world.arms), trial.workcell, arms.measured(), 0.0)
    planner = Planner(policy, embodiment.horizon, camera_s, arms.safety.chunk_lead_s)
    commander = Commander(
        policy, embodiment, tuple(world.arms), client, planner, gate, _WorldClock(world), arms.send
    )
    arms.commander = commander
    try:
        commander.start()
        while not world.judge.success and world.time_s < time_limit_s - 1e-9:
            if world.time_s >= pictures * camera_s - 1e-9:
                pictures += 1
                world.judge_now()
                picture = stage.picture()
                commander.on_picture(picture, world.time_s)
                film.add(arms.commanded(), picture)
            if tick % ASK_EVERY == 0:
                arms.report()
                commander.tick()
                if commander.wants_lease:
                    arms.grant()
                if not commander.active or arms.latched:
                    ended = f"stopped: {arms.executor.reason if arms.latched else commander.reason}"
                    break
            world.follow(arms.step())
            tick += 1
        world.judge_now()
        film.add(arms.commanded())
    except Void:
        film.abandon()
        raise
    moved = film.close()
    executor = arms.executor
    return _result(
        trial,
        world,
        ended,
        time_limit_s,
        interventions=arms.holds.count + len(executor.faults),
        chunks=len({chunk[0] for chunk in executor.log.chunks}),
        refused=commander.counts.refused,
        limited=dict(executor.counters.interventions),
        **moved,
    )


def play_expert(
    stage: Stage, trial: Trial, ledger: Ledger, time_limit_s: float, video: bool = True
) -> Result:
    """The scripted expert, with everything the simulator knows, plays `trial`."""
    stage.set(trial)
    world, key = stage.world, Key(trial.split, trial.seed)
    rate_hz = stage.demonstrator.rate_hz
    film, ended = Film(stage, ledger, key, rate_hz, video), "expert finished"
    for step in stage.demonstrator.play(trial, 0, homes=stage.homes, limit_s=time_limit_s):
        film.add({arm: np.append(q, step.action_openings[arm]) for arm, q in step.action_joints.items()})
        if world.judge.success:
            break
        if world.time_s >= time_limit_s:
            ended = "time limit"
            break
    return _result(trial, world, ended, time_limit_s, **film.close())


def _result(trial: Trial, world: Lockstep, ended: str, limit_s: float, **more) -> Result:
    judge = world.judge
    success = judge.success and judge.success_s <= limit_s + 1e-6
    return Result(
        seed=trial.seed,
        split=trial.split,
        success=success,
        partial=judge.partial or success,
        seconds=round(judge.success_s if success else world.time_s, 3),
        interventions=more.pop("interventions", 0),
        ended="success" if success else ended,
        instruction=trial.instruction,
        wrong_object=judge.wrong_object,
        drops=judge.drops,
        **more,
    )


class _WorldClock:
    """Simulated time as the executor clock."""

    def __init__(self, world: Lockstep):
        self._world = world

    def now(self) -> float:
        return self._world.time_s


class _Stepped(ArmsExecutor):
    """The robot's executor, ticked by the trial instead of by a thread of its own."""

    def _run(self) -> None:
        """The thread ends at once."""

    def tick(self, now: float) -> None:
        self._tick(now, 0.0, PERIOD_S)


class _Arms:
    """The arms node's part, over arms and hands of the lockstep world."""

    def __init__(self, world: Lockstep, robot: Robot, trial: Trial):
        self.safety = safety_of(robot)
        self.commander: Commander | None = None
        self.holds = Holds()
        self._world, self._robot = world, robot
        self._arms = {name: _Arm(world, name) for name in world.arms}
        self._hands = {name: _Hand(world, name) for name in world.arms if robot.arms[name].gripper}
        homes = {name: np.array(robot.arms[name].home_rad) for name in world.arms}
        minutes = math.ceil(trial.task.time_limit_s / 60) + 1
        self.executor = _Stepped(
            self._arms,
            self._hands,
            homes,
            _WorldClock(world),
            robot.control,
            self.safety,
            trial.workcell,
            log_minutes=minutes,
        )
        self.executor.start()

    @property
    def latched(self) -> bool:
        return self.executor.state in (ArmsState.FAULT, ArmsState.STOPPED, ArmsState.STOPPING)

    def measured(self) -> np.ndarray:
        return np.concatenate([self._world.joints(name) for name in self._world.arms])

    def commanded(self) -> dict[str, np.ndarray]:
        """Joints rad and opening last sent, [8] by arm."""
        told = self.executor.commanded()
        if told is None:
            return {n: np.append(self._world.joints(n), self._world.opening(n)) for n in self._world.arms}
        return {name: np.append(q, 1.0 if o is None else o) for name, (q, _, o) in told[1].items()}

    def report(self) -> None:
        """Joint states and status to the policy's side."""
        executor, world = self.executor, self._world
        for name in world.arms:
            positions = world.joints(name)
            if name in self._hands:
                positions = np.append(positions, world.opening(name))
            self.commander.on_joints(name, world.time_s, positions)
        lease = executor.lease
        self.commander.on_arms(
            ArmsStatus(
                state=executor.state.value,
                reason=executor.reason,
                lease=f"{lease.holder}:{lease.epoch}" if lease.holder else "",
                time_s=world.time_s,
                accepted_seq=executor.accepted_seq,
                rejected=executor.rejected,
            )
        )

    def grant(self) -> None:
        try:
            self.commander.granted(self.executor.acquire_lease())
        except Rejected as error:
            self.commander.refused(str(error))

    def send(self, seq: int, chunk: Chunk | None) -> None:
        self.executor.submit(Tag.parse(f"{self.commander.lease}:{seq}"), chunk)

    def step(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """One tick of the 200 Hz loop; what the arms are to follow until the next."""
        self.executor.tick(self._world.time_s)
        state, code, _ = self.executor.phase
        self.holds.see(state.value, code)
        return {name: arm.target for name, arm in self._arms.items()}


class _Arm:
    """As `FrankaArm` to the executor."""

    streaming, link_error = True, ""

    def __init__(self, world: Lockstep, name: str):
        self._world, self._name = world, name
        self.target = (world.joints(name), np.zeros(7))

    def start(self) -> np.ndarray:
        return self._world.joints(self._name)

    def read(self) -> ArmState:
        arm = self._world.arms[self._name]
        q, dq = arm.joints()
        return ArmState(self._world.time_s, q.copy(), dq.copy(), arm.applied_tau.copy(), "Move", "")

    def set_target(self, q: np.ndarray, dq: np.ndarray, now: float, fresh: bool = False) -> None:
        self.target = (q.copy(), dq.copy())

    def abort(self) -> None:
        """The executor's own deceleration goes on."""


class _Hand:
    """As `GripperWorker` to the executor; a new wish takes over at once."""

    fault, grasped, moving = "", None, None

    def __init__(self, world: Lockstep, name: str):
        self._world, self._name = world, name

    def start(self) -> None:
        pass

    def wish(self, wish: str) -> None:
        self._world.open_hand(self._name, float(wish == "open"))

    def lost(self) -> bool:
        return False

    def forget(self) -> None:
        pass

    @property
    def opening(self) -> float:
        return self._world.opening(self._name)
