"""A scripted expert in the place of operator and GELLO: demonstrations through the nodes, in real time.

The expert sees the running simulator's truth and moves leaders that publish what GELLO's do. Everything after
that is what an operator has: teleop node with its soft start, arms, camera, recorder and its services.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import mujoco
import numpy as np
import rclpy
from rclpy.qos import qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import JointState
from std_msgs.msg import Float32

from config.loading import load
from config.teleop import Teleop
from episodes.writer import saved_episodes
from simulation.control import SimulationControl
from simulation.demonstrate import SETTLE_S, lead
from simulation.experts.ik import HandIK
from simulation.lockstep import judge_for
from simulation.tasks.score import Judge, Thing, things_in
from simulation.tasks.trial import Trial
from simulation.workcell import HAND_WIDTH
from vipra_ros import bringup
from vipra_ros.clock import ClockStopped, SimulatedClock
from vipra_ros.commander import LATCHED
from vipra_ros.monitor import CallFailed, Monitor
from vipra_ros.nodes.messages import stamp
from vipra_ros.process import ProcessError, reserve_slot, wait_for
from vipra_ros.recording.generate import ATTEMPTS, START_SPREAD_RAD, ExpertFailed, Wanted
from vipra_ros.up import run_folder, wait_ready

HAND_S = 1.2  # longest wait for a hand that was told to move
BEGUN = 0.05  # change of its opening
START_S = 180.0  # wall time for the first picture: a busy machine gets there as well
WAIT_S = 90.0  # wall time for the arms or the recorder to get somewhere

Command = tuple[dict[str, np.ndarray], dict[str, float]]  # joints [7] rad and openings by arm


class LiveWorld:
    """The simulator's truth, as an expert looks at it. `refresh` brings it up to date."""

    def __init__(self, control: SimulationControl, trial: Trial):
        self.trial, self.arms = trial, tuple(trial.workcell.arms)
        self.judge = judge_for(trial)
        self._control = control
        self.refresh()

    def refresh(self) -> None:
        self._truth = self._control.truth()
        self.time_s = self._truth["time_s"]
        self.judge.update(self.time_s, self.things(), {arm: self.tcp(arm)[0] for arm in self.arms})

    def things(self) -> dict[str, Thing]:
        return things_in(self._truth)

    def tcp(self, arm: str) -> tuple[np.ndarray, np.ndarray]:
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, np.array(self._truth["arms"][arm]["hand_quaternion"]))
        return np.array(self._truth["arms"][arm]["tcp_position"]), rotation.reshape(3, 3)

    def joints(self, arm: str) -> np.ndarray:
        return np.array(self._truth["arms"][arm]["q"])

    def opening(self, arm: str) -> float:
        return float(np.clip(self._truth["arms"][arm]["width"] / HAND_WIDTH, 0.0, 1.0))


def watching_hands(commands: Iterable[Command], world: LiveWorld, rate_hz: float) -> Iterator[Command]:
    """`commands`, but the arms wait while a hand that was told to move has not begun to.

    By the time the arms follow the next command it has done.
    """
    last: Command | None = None
    waited, before = np.inf, {}
    for command in commands:
        joints, openings = command
        while waited < HAND_S * rate_hz and _differ(joints, last[0], 1e-6):
            if _differ({arm: world.opening(arm) for arm in world.arms}, before, BEGUN):
                waited = np.inf
                break
            waited += 1
            yield last
        if last is not None and openings != last[1]:
            waited, before = 0, {arm: world.opening(arm) for arm in world.arms}
        last = command
        yield command


def _differ(a: dict, b: dict, limit: float) -> bool:
    return any(np.abs(a[arm] - b[arm]).max() > limit for arm in a)


class Leaders:
    """A GELLO for each arm: publishes where it is held at its rate, and goes through the motions of `play`.

    Stamps are those of an even grid of simulated time, whenever the message gets out.
    """

    def __init__(self, config: Teleop, arms: tuple[str, ...], domain: int, clock: SimulatedClock):
        self._context = rclpy.Context()
        rclpy.init(
            args=[], context=self._context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO
        )
        self._node = rclpy.create_node("gello", context=self._context)
        self.rate_hz, self._period_s, self._clock = config.rate_hz, 1.0 / config.rate_hz, clock
        self._states, self._triggers = {}, {}
        for arm in arms:
            namespace = config.leaders[arm].namespace.strip("/")
            prefix = f"/{namespace}" if namespace else ""
            topic = f"{prefix}/gripper/gripper_client/target_gripper_width_percent"
            states = f"{prefix}/gello/joint_states"
            self._states[arm] = self._node.create_publisher(JointState, states, qos_profile_sensor_data)
            self._triggers[arm] = self._node.create_publisher(Float32, topic, qos_profile_sensor_data)
        self.held: Command | None = None  # where the leaders are
        self._motion: Iterator[Command] = iter(())
        self._done = threading.Event()
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leaders", daemon=True)
        self._thread.start()

    def hold(self, joints: dict[str, np.ndarray]) -> None:
        """Stay at `joints`, triggers let go."""
        self.held = joints, dict.fromkeys(joints, 1.0)

    def play(self, motion: Iterator[Command], check: Callable[[], None]) -> None:
        """Go through `motion`, one command a sample, then hold its last. Raises what it or `check` raises."""
        self._error, self._motion = None, motion
        self._done.clear()  # after: the end of the one before would count as this one's
        try:
            while not self._done.wait(0.1):
                check()
        finally:
            self._motion = iter(())
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        due = self._clock.now()
        while not self._closing.is_set():
            due += self._period_s
            try:
                self._clock.sleep_until(due)
                self.held = next(self._motion)
            except StopIteration:
                self._done.set()
            except Exception as error:  # for `play`
                self._error, self._motion = error, iter(())
                self._done.set()
                due = self._clock.now()
            if self.held is not None:
                self._publish(due, *self.held)

    def _publish(self, t: float, joints: dict[str, np.ndarray], openings: dict[str, float]) -> None:
        for arm, publisher in self._states.items():
            self._triggers[arm].publish(Float32(data=float(openings[arm])))
            message = JointState(name=[f"fr3_joint{i}" for i in range(1, 8)], position=joints[arm].tolist())
            message.header.stamp = stamp(t)
            publisher.publish(message)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(5.0)
        self._node.destroy_node()
        self._context.try_shutdown()


class _Lost(ProcessError):
    """Something let go in the middle of an episode."""


class Operator:
    """Does with services what a person does with keys: one episode after the other."""

    def __init__(
        self, wanted: Wanted, monitor: Monitor, leaders: Leaders, control: SimulationControl, children: list
    ):
        self._wanted, self._monitor, self._leaders = wanted, monitor, leaders
        self._control, self._children = control, children
        self._ik = HandIK(wanted.trial(0).workcell)
        self._homes = {name: np.array(arm.home_rad) for name, arm in wanted.robot.arms.items()}

    def record(self, number: int, tell: Callable[[str], None]) -> None:
        """Bring episode `number` into the dataset. Raises ExpertFailed, ProcessError."""
        trial = self._wanted.trial(number)
        for attempt in range(ATTEMPTS):
            try:
                judge = self._demonstrate(trial, attempt)
            except (CallFailed, ClockStopped, _Lost) as error:
                self._discard()
                tell(f"episode {number}: once more: {error}")
                continue
            recorder = self._values("recorder")
            flagged = recorder["flagged"] == "true"
            parts = (
                "flagged" if flagged else "",
                f"{recorder['last_length_s']} s",
                recorder["last_findings"],
            )
            text = "; ".join(filter(None, parts))
            done = self._wanted.seconds is not None or judge.success
            if done and (not flagged or self._wanted.keep_flagged):
                self._keep()
                tell(f"episode {number}: {text}")
                return
            self._discard()
            tell(f"episode {number}: once more: {text if done else 'the expert failed'}")
        raise ExpertFailed(
            f"{trial.task.name}, trial {trial.seed}: no episode in {ATTEMPTS} attempts: "
            "is this machine too busy? --keep-flagged keeps what is flagged; or choose another --first-seed"
        )

    def _demonstrate(self, trial: Trial, style: int) -> Judge:
        """Reset, couple, record; leaves the recorder with an episode to keep or discard."""
        wanted, random = self._wanted, np.random.default_rng([trial.seed, style])
        self._go_home()
        reset_s = self._control.reset(trial.seed, arms=False, split=trial.split)
        start = {arm: home + random.normal(0, START_SPREAD_RAD, 7) for arm, home in self._homes.items()}
        self._leaders.hold(start)
        self._monitor.set_task(trial.instruction, node="recorder")
        self._wait(lambda: self._monitor.newest_frame_s() > reset_s, "a picture of the new trial")
        self._insist("/teleop/start")
        self._wait(lambda: self._state("teleop") in ("FOLLOWING", "LOST"), "the arms at their leaders")
        self._free_hands()
        self._insist("/recorder/start")
        self._wait(lambda: self._state("recorder") == "RECORDING", "the recorder")
        world, rate_hz = LiveWorld(self._control, trial), self._leaders.rate_hz
        motion = _cut(lead(world, self._ik, rate_hz, random), world, rate_hz, wanted.seconds)
        self._leaders.play(motion, lambda: self._check("teleop", "recorder"))
        self._monitor.call("/recorder/stop", 15.0)
        self._leaders.play(_rest(world, self._leaders.held, round(SETTLE_S * rate_hz)), self._check)
        self._wait(lambda: self._state("recorder") in ("PENDING", "IDLE"), "the recorded episode")
        if self._state("recorder") == "IDLE":
            raise _Lost(f"recorder: {self._monitor.status('recorder').message}")
        return world.judge

    def _go_home(self) -> None:
        """Let go, recover if need be, home; objects out of the way."""
        self._monitor.call("/teleop/stop", 15.0)
        self._control.clear()
        self._wait(lambda: self._state("arms") in ("IDLE", "HOLDING", *LATCHED), "the arms at rest")
        if self._state("arms") in LATCHED:
            self._wait(self._recovered, "recovery")
        told, asked_s = self._insist("/arms/home"), self._control.status()["time_s"]

        def over() -> bool:
            return float(self._values("arms")["time_s"]) > asked_s and self._state("arms") != "HOMING"

        self._wait(over, f"the arms at home ({told})")

    def _free_hands(self) -> None:
        """Squeeze the triggers and let them go: teleop keeps a hand closed that was told to close last."""
        if "move the trigger" not in self._monitor.status("teleop").message:
            return
        joints, opened = self._leaders.held
        samples = round(HAND_S * self._leaders.rate_hz)
        squeezed = [(joints, dict.fromkeys(joints, 0.0))] * (samples // 4)
        self._leaders.play(iter([*squeezed, *[(joints, opened)] * samples]), lambda: self._check("teleop"))

    def _insist(self, service: str) -> str:
        """Call until it is not refused: arms may still brake, samples and pictures be a moment late.

        Returns its answer; raises CallFailed.
        """
        end_s = time.monotonic() + WAIT_S
        while True:
            try:
                return self._monitor.call(service, 15.0)
            except CallFailed:
                self._check()
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.3)

    def _recovered(self) -> bool:
        with contextlib.suppress(CallFailed):
            self._monitor.call("/arms/recover", 30.0)
        return self._state("arms") not in LATCHED

    def _keep(self) -> None:
        flagged = self._values("recorder")["flagged"] == "true"
        with contextlib.suppress(CallFailed) if flagged else contextlib.nullcontext():  # asks once more
            self._monitor.call("/recorder/keep", 15.0)
        if flagged:
            self._monitor.call("/recorder/keep", 15.0)
        self._wait(lambda: self._state("recorder") == "IDLE", "the saved episode")

    def _discard(self) -> None:
        if self._state("recorder") != "IDLE":
            self._monitor.call("/recorder/discard", 15.0)

    def _check(self, *nodes: str) -> None:
        """Raises _Lost when one of `nodes` does not work on, ProcessError when a process has ended."""
        for child in self._children:
            child.check()
        for node, state in (("teleop", "FOLLOWING"), ("recorder", "RECORDING")):
            if node in nodes and self._state(node) != state:
                raise _Lost(f"{node} {self._state(node)}: {self._monitor.status(node).message}")

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        wait_for(condition, WAIT_S, what, self._children)

    def _values(self, node: str) -> dict[str, str]:
        return self._monitor.status(node).values

    def _state(self, node: str) -> str:
        return self._values(node)["state"]


def _cut(
    commands: Iterator[Command], world: LiveWorld, rate_hz: float, seconds: float | None
) -> Iterator[Command]:
    """The expert's commands with fresh truth for each, until the time limit or `seconds` have passed."""
    end_s = world.time_s + (seconds or world.trial.task.time_limit_s)
    for command in watching_hands(commands, world, rate_hz):
        yield command
        world.refresh()
        if world.time_s > end_s:
            return


def _rest(world: LiveWorld, command: Command, samples: int) -> Iterator[Command]:
    for _ in range(samples):
        yield command
        world.refresh()


def demonstrate(wanted: Wanted, robot: str, task_file: str, root: Path, tell: Callable[[str], None]) -> int:
    """Record through the nodes until the dataset at `root` has `wanted.episodes`; how many were made now.

    robot: file in config/robots, simulated. task_file: what `wanted.task` was loaded from. Starts and stops a
    graph of its own, anew where a trial has objects of other shapes. Raises ExpertFailed, ProcessError,
    ConfigError.
    """
    begun = saved_episodes(root)
    missing = range(begun, wanted.episodes)
    for _, numbers in itertools.groupby(missing, lambda n: wanted.trial(n).workcell.shapes):
        first, *others = numbers
        with _operator(wanted, robot, task_file, root, first, tell) as operator:
            for number in (first, *others):
                operator.record(number, tell)
    return len(missing)


@contextlib.contextmanager
def _operator(
    wanted: Wanted, robot: str, task_file: str, root: Path, first: int, tell: Callable[[str], None]
) -> Iterator[Operator]:
    """With everything running that records episode `first` and those after it."""
    folder = run_folder("generate").resolve()
    with contextlib.ExitStack() as stack:
        slot = reserve_slot()
        stack.callback(slot.release)
        arms = tuple(wanted.robot.arms)
        teleop = "gello_single" if arms == ("right",) else "gello"
        trial = wanted.trial(first)
        given = {
            "robot": robot,
            "teleop": teleop,
            "dataset": str(root.resolve()),
            "task": trial.instruction,
            "target": wanted.episodes,
            "seed": trial.seed,
            "run_dir": str(folder),
        }
        hosts = {f"arms.{arm}.hostname": slot.host(i + 1) for i, arm in enumerate(arms)}
        names = {"simulation.name": slot.name, "simulation.task": task_file}
        paced = {"simulation.split": wanted.split, "simulation.wait_for_camera": True}
        graph = bringup.describe("teleop", given, {**hosts, **names, **paced})
        tell(f"starting {', '.join(p.name for p in graph.processes)}; logs in {folder}")
        environment = {"ROS_DOMAIN_ID": str(slot.domain)}
        children = stack.enter_context(bringup.running(graph, folder, environment))
        clock = SimulatedClock(slot.name)
        stack.callback(clock.close)
        control = SimulationControl(slot.name)
        stack.callback(control.close)
        monitor = stack.enter_context(Monitor(slot.domain, "LOCALHOST"))
        leaders = Leaders(load(Teleop, teleop), arms, slot.domain, clock)
        stack.callback(leaders.close)
        wait_for(monitor.frames_per_second, START_S, "a picture", children)
        wait_ready(monitor, children)
        wait_for(
            lambda: (s := monitor.status("recorder")) and "ready" in s.message,
            WAIT_S,
            "the recorder",
            children,
        )
        yield Operator(wanted, monitor, leaders, control, children)
