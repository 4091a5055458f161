"""Trials on the whole running stack, simulated: camera, policy server, ROS 2 nodes, the arms' protocol.

The processes are those of `vipra up`, in real time, on addresses of their own. Between two trials the table
is cleared, the arms go home by their own motion, the hands open, the next trial's objects are set up, and the
policy starts once its camera has seen nothing else: nothing moves the arms past the safety checks. Truth, for
the score alone, comes from the simulator.

A trial is void, and repeated, when a process ended or this machine stalled; what ended is started again.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot, safety_of
from config.task import Task
from simulation.control import SimulationControl, SimulationError
from simulation.lockstep import judge_for
from simulation.state import StateError
from simulation.tasks.score import things_in
from simulation.tasks.trial import Trial, make_trial
from simulation.workcell import HAND_WIDTH
from vipra_ros import bringup
from vipra_ros.clock import ClockStopped, SimulatedClock
from vipra_ros.evaluation.ledger import Holds, Key, Ledger, Result, Void, run_trials
from vipra_ros.evaluation.rig import LATCHED, SAMPLE_HZ, GraphRig, at, played
from vipra_ros.evaluation.server import Server, in_a_line
from vipra_ros.monitor import CallFailed, Monitor
from vipra_ros.process import Child, ProcessError, Slot, reserve_slot, wait_for
from vipra_ros.up import wait_ready

# Faults of a machine that was too busy: they say nothing about the policy.
STALLS = ("clock", "communication", "deadman", "frozen")
HOME_RAD = 0.03  # so near home a trial begins
OPEN = 0.9  # opening of a hand that a trial may begin with
PATIENCE_S = 90.0  # wall time for each step between two trials, on a machine however slow
FAILURES = (ProcessError, SimulationError, StateError, ClockStopped)


class Cell:
    """The simulated robot: `set` a trial up, as often as wanted, then let `rig` play; `close` at the end.

    changes: fields of the robot, dotted, `policy.server` among them. evaluated: as of GraphRig.
    """

    def __init__(self, robot: str, changes: dict, folder: Path, tell: Callable[[str], None], evaluated: dict):
        self._robot_name, self._changes, self._folder, self._tell = robot, changes, folder, tell
        self._evaluated = evaluated
        self._resources = contextlib.ExitStack()
        self._children: list[Child] = []
        self.robot: Robot | None = None

    def set(self, trial: Trial) -> None:
        """The trial's objects on the table, arms home, hands open, and pictures of nothing else.

        Raises one of FAILURES when that does not succeed with a robot that was started anew either.
        """
        since = None
        if self._children:
            try:
                since = self._set_up(trial)
            except FAILURES as error:
                self._tell(f"starting the robot again: {in_a_line(error)}")
        if since is None:
            since = self._start(trial)
        self._wait(lambda: played(self.monitor.status("policy"))["model"], "the policy's server")
        seen = since + self.embodiment.history_seconds + 0.1
        self._wait(lambda: self.rig.newest_s > seen, "pictures of the trial")

    def _start(self, trial: Trial) -> float:
        self.close()
        first = {"simulation.seed": trial.seed, "simulation.split": trial.split}
        kind = "bimanual" if len(trial.workcell.arms) == 2 else "single"
        folder = self._folder / time.strftime("%Y%m%d-%H%M%S")
        given = {"robot": self._robot_name, "run_dir": str(folder.resolve())}
        graph = bringup.describe(kind, given, {**self._changes, **first})
        self.robot, self.embodiment = graph.robot, load(Embodiment, graph.robot.embodiment)
        enter = self._resources.enter_context
        self._children = enter(bringup.running(graph, folder))
        self.monitor = enter(Monitor(discovery="LOCALHOST"))
        wait_ready(self.monitor, self._children)
        self.clock = enter(contextlib.closing(SimulatedClock(self.robot.simulation.name)))
        self.control = enter(contextlib.closing(SimulationControl(self.robot.simulation.name)))
        self.holds = Holds()
        self.monitor.watch_status("arms", self._see)
        hand = safety_of(self.robot).gripper
        self.rig = GraphRig(self.monitor, tuple(self.robot.arms), hand, self._tell, self._evaluated)
        return self.clock.now()

    def _set_up(self, trial: Trial) -> float:
        """For arms that run; the simulated time from which on the table is the trial's."""
        self.check()
        self.control.clear()
        if self.arms("state") in LATCHED:
            self._wait(lambda: self._granted("/arms/recover"), "arms recovered")
        self._wait(
            lambda: self.arms("state") in ("IDLE", "HOLDING") and not self.arms("lease"), "arms let go"
        )
        self._wait(lambda: self._granted("/arms/home"), "arms on their way home")
        self._wait(self._at_home, "arms at home")
        if not self._hands_open():
            self._wait(lambda: self._granted("/arms/open_hands"), "hands told to open")
            self._wait(self._hands_open, "open hands")
        return self.control.reset(trial.seed, arms=False, split=trial.split)

    def _granted(self, service: str) -> bool:
        with contextlib.suppress(CallFailed):
            return bool(self.monitor.call(service, 30.0))
        return False

    def _at_home(self) -> bool:
        """Raises ProcessError when the arms stopped on their way."""
        state, arms = self.arms("state"), self.control.truth()["arms"]
        away = max(np.abs(np.subtract(arms[n]["q"], a.home_rad)).max() for n, a in self.robot.arms.items())
        if state in LATCHED:
            raise ProcessError(f"the arms stopped on their way home: {self.monitor.status('arms').message}")
        if state == "HOLDING":  # stopped on the way, by a stall of this machine say
            self._granted("/arms/home")
        return state == "IDLE" and away < HOME_RAD

    def _hands_open(self) -> bool:
        arms = self.control.truth()["arms"]
        return all(arms[n]["width"] > OPEN * HAND_WIDTH for n, arm in self.robot.arms.items() if arm.gripper)

    def _see(self, message) -> None:
        values = {value.key: value.value for value in message.values}
        self.holds.see(values["state"], values["code"])

    def arms(self, value: str) -> str:
        """A value of the arms' newest status."""
        return self.monitor.status("arms").values[value]

    @property
    def at_rest(self) -> bool:
        """Neither policy nor arms are at it any more."""
        policy = self.monitor.status("policy").values["state"]
        return policy in ("IDLE", "STOPPED") and self.arms("state") not in ("RUNNING", "ALIGNING")

    def check(self) -> None:
        """Raises ProcessError when one of the processes ended."""
        for child in self._children:
            child.check()

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        wait_for(condition, PATIENCE_S, what, self._children)

    def close(self) -> None:
        self._resources.close()
        self._children = []


def run(
    task: Task,
    task_file: str,
    which: str,
    robot: str,
    policy: dict,
    settings: dict,
    wanted: list[Key],
    limit_s: float,
    out: Path,
    tell: Callable[[str], None],
) -> Ledger:
    """Start everything, play what is missing of `wanted`, stop everything.

    policy: fields of `config.robot.PolicyClient` that the robot's file does not decide. The ledger knows the
    checkpoint, so that no other goes on there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        slot = reserve_slot()
        stack.callback(slot.release)
        os.environ["ROS_DOMAIN_ID"] = str(slot.domain)  # of this process's own commands too
        threads = max(1, (os.cpu_count() or 1) // 2)  # the robot and its camera are simulated on the others
        server = Server(which, load(Embodiment, load(Robot, robot).embodiment), out, _address(slot), threads)
        stack.callback(server.stop)
        server.start()
        known = {"model": server.metadata.model, "checkpoint": server.metadata.checkpoint}
        ledger = Ledger(out, settings | known)
        changes = {f"policy.{name}": value for name, value in policy.items()}
        changes |= {"policy.server": server.address, "simulation.task": task_file}
        changes |= {"simulation.name": slot.name}
        for number, arm in enumerate(load(Robot, robot).arms, 1):
            changes[f"arms.{arm}.hostname"] = slot.host(number)
        cell = Cell(robot, changes, out / "logs", tell, known)
        stack.callback(cell.close)

        def play(key: Key) -> Result:
            trial = make_trial(task, key.seed, key.split)
            try:
                cell.set(trial)
                return play_trial(cell, server, trial, ledger, limit_s)
            except FAILURES as error:
                server.check()  # the cause, where it is that
                raise Void(in_a_line(error)) from error

        def repair() -> None:
            if server.lost:
                tell("starting the policy server again")
                server.start()

        run_trials(ledger, wanted, play, repair, tell)
        return ledger


def play_trial(cell: Cell, server: Server, trial: Trial, ledger: Ledger, limit_s: float) -> Result:
    """The policy plays the trial that is set up; ends with its success, the limit or a latched stop.

    Raises Void, or one of FAILURES.
    """
    key, rig, clock = Key(trial.split, trial.seed), cell.rig, cell.clock
    judge = judge_for(trial)
    before = _counts(cell)
    truths, ended = [], "time limit"
    try:
        cell.monitor.set_seed(trial.seed, PATIENCE_S)
        rig.start(trial.instruction, ledger.file(key, ".mp4"))
        started, wall, due = clock.now(), time.monotonic(), clock.now()
        with contextlib.suppress(
            ProcessError
        ):  # its status may come late; one that stopped at once shows below
            wait_for(
                lambda: cell.monitor.status("policy").values["state"] == "RUNNING", 10.0, "policy running"
            )
        while True:
            truth = cell.control.truth()
            truths.append(truth)
            seconds = truth["time_s"] - started
            tcps = {name: np.array(arm["tcp_position"]) for name, arm in truth["arms"].items()}
            judge.update(seconds, things_in(truth), tcps)
            if judge.success or seconds >= limit_s:
                break
            server.check()
            cell.check()
            if (trouble := _trouble(cell)) is not None:
                ended = f"stopped: {trouble}"
                break
            due = max(due + 1 / SAMPLE_HZ, clock.now())
            clock.sleep_until(due)
        factor = (clock.now() - started) / (time.monotonic() - wall)
        rig.stop()
        wait_for(lambda: cell.at_rest, PATIENCE_S, "policy and arms at rest")
        after = _counts(cell)
        joints, told = rig.finish(ledger.file(key, ".jpg"))
    except BaseException:
        rig.discard()
        ledger.file(key, ".mp4").unlink(missing_ok=True)
        with contextlib.suppress(CallFailed):
            rig.stop()
        raise
    _save(ledger.file(key, ".npz"), truths, started, told)
    success = judge.success and judge.success_s <= limit_s + 1e-6
    faults = [fault for fault in json.loads(cell.arms("faults")) if fault["t"] >= started]
    return Result(
        seed=trial.seed,
        split=trial.split,
        success=success,
        partial=judge.partial or success,
        seconds=round(judge.success_s if success else seconds, 3),
        interventions=after["holds"] - before["holds"] + len(faults),
        ended="success" if success else ended,
        instruction=trial.instruction,
        wrong_object=judge.wrong_object,
        drops=judge.drops,
        **rig.measure(joints, told),
        chunks=after["chunks"] - before["chunks"],
        refused=after["refused"] - before["refused"],
        limited={k: n - before["limited"].get(k, 0) for k, n in after["limited"].items()},
        real_time_factor=round(factor, 3),
        latency_ms=cell.monitor.status("policy").number("latency_ms_p50"),
    )


def _trouble(cell: Cell) -> str | None:
    """Why the policy no longer moves the arms. Raises Void where it is not the policy's doing."""
    found = cell.rig.trouble()
    if found is None:
        return None
    kind, reason = found
    if kind == "void":
        raise Void(reason)
    if cell.arms("state") in LATCHED and cell.arms("code") in STALLS:
        raise Void(f"this machine stalled: {reason}")
    return reason


def _counts(cell: Cell) -> dict:
    """What has been counted so far."""
    policy = cell.monitor.status("policy").values
    limited = json.loads(cell.arms("interventions"))
    return {
        "holds": cell.holds.count,
        "chunks": int(policy["chunks"]),
        "refused": int(policy["refused"]),
        "limited": limited,
    }


def _save(path: Path, truths: list[dict], started: float, told: list) -> None:
    """The trajectory, with the names and shapes of a lockstep trial's."""
    times = np.array([truth["time_s"] for truth in truths])
    arms, objects = list(truths[0]["arms"]), list(truths[0]["objects"])
    state = [
        [[*t["arms"][a]["q"], min(t["arms"][a]["width"] / HAND_WIDTH, 1.0)] for a in arms] for t in truths
    ]
    poses = [[t["objects"][o]["position"] + t["objects"][o]["quaternion"] for o in objects] for t in truths]
    np.savez_compressed(
        path,
        time_s=times - started,  # [T]
        arms=np.array(arms),  # [A]
        state=np.array(state),  # [T, A, 8] measured joints, rad, and opening
        commanded=np.stack([at(times, track) for track in told], axis=1),  # [T, A, 8]
        objects=np.array(objects),  # [n]
        poses=np.array(poses),  # [T, n, 7] m and wxyz
        tcp=np.array([[t["arms"][a]["tcp_position"] for a in arms] for t in truths]),  # [T, A, 3] m
    )


def _address(slot: Slot) -> str:
    return f"tcp://{slot.host(9)}:5555"
