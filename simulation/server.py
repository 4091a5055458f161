"""The simulator's process: physics at 1 kHz, an FCI server for each arm, shared state, control socket.

    python -m simulation.server --workcell bimanual --name demo --hostnames left=127.77.0.1,right=127.77.0.2

Prints one line that starts with `ready` when the arms accept connections. SIGINT and SIGTERM end it cleanly.
"""

import argparse
import collections
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass

import franky_sim.simulation_server as franky_server
import mujoco
import numpy as np
from franky_sim.franka_robot_protocol import RobotMode

from config.loading import ConfigError, load
from config.task import Task
from config.workcell import Workcell
from simulation import cloth
from simulation.arm import TICK, Arm
from simulation.control import ControlServer
from simulation.record import Recorder
from simulation.robot import ERRORS, ArmServer, Faults
from simulation.state import Facts, StateError, StateWriter
from simulation.tasks.trial import make_trial
from simulation.workcell import build, place_prop, place_props, signature, strip_visuals

# s of wall time that a tick waits for a command that is owed. Without it every other command of a client on a
# busy machine is missed, and as each may change the torque by so much only, the arm swings. A dead client is
# still found out after 20 ticks, 0.2 s of wall time.
PATIENCE = 0.01
CAMERA_PATIENCE = 0.5  # s of wall time for which simulated time stands still for a picture
CATCH_UP = 0.005  # s: how far behind its deadline the loop may fall before simulated time gives way
_MODES = {
    RobotMode.kOther: "other",
    RobotMode.kIdle: "idle",
    RobotMode.kMove: "move",
    RobotMode.kGuiding: "guiding",
    RobotMode.kReflex: "reflex",
    RobotMode.kUserStopped: "user_stopped",
    RobotMode.kAutomaticErrorRecovery: "recovering",
}


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    workcell: str
    name: str
    hostnames: dict[str, str]  # arm -> loopback address
    seed: int = 0
    task: str = ""  # whose trial `seed` is; "": the workcell's own objects
    split: str = "seen"
    watchdog: bool = True
    homes: dict[str, tuple[float, ...]] | None = None  # rad


class Simulator:
    """The running workcell. `step` once per simulated millisecond; the rest are the control socket's verbs.

    Raises ConfigError, StateError (name taken) or OSError (address taken), each with a one-line message.
    """

    def __init__(self, options: Options):
        self.options = options
        self.task = load(Task, options.task) if options.task else None
        if self.task is None:
            self.workcell = load(Workcell, options.workcell)
        elif self.task.workcell == options.workcell:
            self.workcell = make_trial(self.task, options.seed, options.split).workcell
        else:
            raise ConfigError(f"--task {options.task} needs --workcell {self.task.workcell}")
        arms = tuple(self.workcell.arms)
        if set(options.hostnames) != set(arms):
            raise ConfigError(
                f"--hostnames must name exactly the arms of {options.workcell}: {', '.join(arms)}"
            )
        self.sim = build(self.workcell, options.homes, Arm)
        strip_visuals(self.sim.scene)
        self.server = franky_server.SimulationServer(self.sim, [])
        self._start_servers(arms)
        self.arms: dict[str, ArmServer] = dict(zip(arms, self.server.robot_servers, strict=True))
        self.time_s, self.ticks = 0.0, 0
        model, data = self.sim.model, self.sim.data
        self._place(options.seed, options.split)
        mujoco.mj_forward(model, data)
        self.state = StateWriter(
            Facts(
                name=options.name,
                pid=os.getpid(),
                arms=arms,
                hostnames=tuple(options.hostnames[arm] for arm in arms),
                signature=signature(model),
                nq=model.nq,
                nv=model.nv,
                task=options.task,
            )
        )
        self.state.set_trial(options.split, options.seed)
        self.recorder: Recorder | None = None
        self._started = time.monotonic()
        self._laps = collections.deque(
            [(self._started, 0.0)], maxlen=11
        )  # (wall, simulated) each 100 ms simulated

    def _start_servers(self, arms: tuple[str, ...]) -> None:
        for arm, robot in zip(arms, self.sim.robots, strict=True):
            hostname = self.options.hostnames[arm]
            server = ArmServer(robot, [hostname], self.options.watchdog)
            try:
                server.init()
            except OSError as error:
                raise OSError(
                    f"arm {arm}: {hostname} ports 1337 and 1338 are taken or not on this machine: "
                    "stop the other simulator or choose another address with --hostnames"
                ) from error
            self.server.robot_servers.append(server)
        self.sim.start()
        for server in self.server.robot_servers:
            server.reset_state()

    def step(self) -> None:
        """One simulated millisecond: commands in, physics, reflexes, states out."""
        for arm in self.arms.values():
            arm.process_commands()
        self.sim.step()
        model, data = self.sim.model, self.sim.data
        for arm in self.arms.values():
            arm.after_step(model, data)
            arm.send_state()
        self.ticks += 1
        self.time_s = self.ticks * TICK
        q, dq = self._joints()
        self.state.write(self.time_s, data.qpos, data.qvel, q, dq)
        if self.recorder is not None:
            self.recorder.add(
                self.time_s,
                q,
                dq,
                [robot.applied_tau for robot in self.sim.robots],
                [robot.commanded_tau for robot in self.sim.robots],
                [arm.mode for arm in self.arms.values()],
                [arm.torque_controlled() for arm in self.arms.values()],
            )
        if self.ticks % 100 == 0:
            self._laps.append((time.monotonic(), self.time_s))

    def _joints(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = [robot.joints() for robot in self.sim.robots]
        return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])

    def close(self) -> None:
        self.server.cleanup()
        self.sim.cleanup()
        self.state.close()

    # --- verbs of the control socket ------------------------------------------------------------------------

    def reset(self, seed: int, arms: bool = True, split: str = "seen") -> dict:
        """Objects to their places of `seed`, of its trial in `split` where there is a task. Time runs on.

        With `arms`, the arms to their initial pose. Raises ValueError while an arm moves or a record runs (a
        teleport is not a motion), and for a trial whose objects have other shapes than those that were built.
        """
        if arms:
            if self.recorder is not None:
                raise ValueError("a record is running: stop it before a reset, or reset with arms=False")
            moving = [name for name, arm in self.arms.items() if arm.moving()]
            if moving:
                raise ValueError(
                    f"arm {', '.join(moving)} is moving: stop it before a reset, or use arms=False"
                )
        self._place(seed, split)
        if arms:
            for robot, arm in zip(self.sim.robots, self.arms.values(), strict=True):
                robot.teleport()
                arm.hold_here()
        self.state.set_trial(split, seed)
        return self._settle()

    def clear(self) -> dict:
        """Objects to the floor behind the arms, until the next reset: a person who clears the table."""
        for number, prop in enumerate(self.workcell.props):
            place_prop(self.sim.model, self.sim.data, prop, np.array([-2.0, 0.4 * number]), 0.0, 0.0)
        return self._settle()

    def _place(self, seed: int, split: str) -> None:
        model, data = self.sim.model, self.sim.data
        if self.task is None:
            place_props(model, data, self.workcell, seed)
            return
        trial = make_trial(self.task, seed, split)
        if trial.workcell.shapes != self.workcell.shapes:
            raise ValueError(
                f"{split} {seed} has objects of other shapes: start a simulator with --seed {seed}"
            )
        for prop, yaw in zip(trial.workcell.props, trial.yaws_rad, strict=True):
            place_prop(model, data, prop, np.array(prop.xy), yaw, trial.workcell.table.centre_xyz[2])

    def _settle(self) -> dict:
        self.sim.data.qacc_warmstart[:] = 0.0
        mujoco.mj_forward(self.sim.model, self.sim.data)
        return {"time_s": self.time_s}

    def truth(self) -> dict:
        """Poses as the physics knows them: m, rad, wxyz quaternions, world frame; a cloth's surface too."""
        data = self.sim.data
        objects = {}
        for prop in self.workcell.props:
            body = data.body(prop.name)
            velocity = data.joint(f"{prop.name}_free").qvel
            objects[prop.name] = {
                "position": body.xpos.tolist(),
                "quaternion": body.xquat.tolist(),
                "velocity": velocity.tolist(),
            }
            if prop.kind == "cloth":
                points = cloth.surface(self.sim.model, data, prop.name)
                objects[prop.name]["surface"] = points.tolist()
        arms = {}
        for name, robot, arm in zip(self.arms, self.sim.robots, self.arms.values(), strict=True):
            q, dq = robot.joints()
            hand = data.body(robot.hand_body)
            tcp = hand.xpos + hand.xmat.reshape(3, 3) @ [
                0.0,
                0.0,
                0.1034,
            ]  # Franka Hand, flange to fingertips
            arms[name] = {
                "q": q.tolist(),
                "dq": dq.tolist(),
                "width": float(robot.hand_width),
                "tcp_position": tcp.tolist(),
                "hand_quaternion": hand.xquat.tolist(),
                "mode": _MODES[arm.mode],
            }
        return {"time_s": self.time_s, "objects": objects, "arms": arms}

    def fault(self, arm: str, kind: str, error: str = "cartesian_reflex", fraction: float = 0.5) -> dict:
        """Inject a fault: reflex (`error` of robot.ERRORS), silent, loss, freeze_state, user_stop.

        All but a reflex last until `clear_fault`. Raises ValueError for names that do not exist.
        """
        server = self._arm(arm)
        if kind == "reflex":
            if error not in ERRORS:
                raise ValueError(f"unknown error {error!r}; one of {', '.join(ERRORS)}")
            server.trip(error)
        elif kind == "user_stop":
            server.stop_by_user()
        elif kind == "silent":
            server.faults.silent = True
        elif kind == "freeze_state":
            server.faults.freeze_state = True
        elif kind == "loss":
            if not 0.0 <= fraction <= 1.0:
                raise ValueError(f"fraction {fraction}: 0 to 1")
            server.faults.loss = float(fraction)
        else:
            raise ValueError(f"unknown fault {kind!r}; one of reflex, silent, loss, freeze_state, user_stop")
        return {"time_s": self.time_s}

    def clear_fault(self, arm: str) -> dict:
        """End injected faults of `arm`. A reflex stays until the client recovers from it, as on the robot."""
        self._arm(arm).faults = Faults()
        return {"time_s": self.time_s}

    def record_start(self, max_duration_s: float = 300.0) -> dict:
        """Keep every millisecond from now on, at most `max_duration_s` (simulated)."""
        if self.recorder is not None:
            raise ValueError("a record is already running")
        if not 0.0 < max_duration_s <= 3600.0:
            raise ValueError(f"max_duration_s {max_duration_s}: above 0, at most 3600")
        self.recorder = Recorder(round(max_duration_s / TICK), tuple(self.arms))
        return {"time_s": self.time_s}

    def record_stop(self, path: str):
        """End the record and write it to `path` (npz, see simulation.record) beside the running physics."""
        if self.recorder is None:
            raise ValueError("no record is running")
        recorder, self.recorder = self.recorder, None
        return recorder.save(path)

    def status(self) -> dict:
        """Time, pace and modes."""
        wall, simulated = self._laps[0]
        now = time.monotonic()
        return {
            "time_s": self.time_s,
            "real_time_factor": (self.time_s - simulated) / max(now - wall, 1e-9),  # over the last second
            "real_time_factor_total": self.time_s / max(now - self._started, 1e-9),
            "recording": self.recorder is not None,
            "arms": {
                name: {
                    "hostname": arm.hostname,
                    "mode": _MODES[arm.mode],
                    "reflex": arm.reflex,
                    "aborts": arm.aborts,
                    "touched": arm.touched,
                    "connected": arm.udp_connected,
                    "tau_ext": arm.tau_ext.tolist(),
                }
                for name, arm in self.arms.items()
            },
        }

    def _arm(self, name: str) -> ArmServer:
        if name not in self.arms:
            raise ValueError(f"unknown arm {name!r}; one of {', '.join(self.arms)}")
        return self.arms[name]


def run(options: Options) -> None:
    """Simulate until SIGINT, SIGTERM or a `shutdown` request. Raises as `Simulator`."""
    running = True

    def stop(*_):
        nonlocal running
        running = False

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    simulator = Simulator(options)
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a robot's controller does not share its processor with a policy
    control = ControlServer(options.name, simulator, stop)
    where = " ".join(f"{arm}={host}" for arm, host in options.hostnames.items())
    print(f"ready name={options.name} {where} control={control.address}", flush=True)
    # Everything made so far lives to the end: keep the collector from walking it in the middle of a tick.
    gc.collect()
    gc.freeze()
    try:
        deadline = time.monotonic()
        while running:
            simulator.step()
            if simulator.ticks % 5 == 0:
                control.serve()
            # A busy machine is not a broken cable: a client that fell behind gets wall time, not simulated.
            for arm in simulator.arms.values():
                if arm.owed():
                    arm.await_command(PATIENCE)
            _await_camera(simulator, control)
            deadline += TICK
            delay = deadline - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            elif delay < -CATCH_UP:
                deadline -= delay + CATCH_UP
    finally:
        control.close()
        simulator.close()


def _await_camera(simulator: Simulator, control: ControlServer) -> None:
    """Stand still at a reader's limit; not for long, for the reader may be dead."""
    end = None
    while simulator.time_s >= simulator.state.limit_s():
        end = end or time.monotonic() + CAMERA_PATIENCE
        if time.monotonic() > end:
            simulator.state.lift_limit()
            return
        control.serve()
        time.sleep(TICK / 2)


def _pairs(text: str) -> dict[str, str]:
    pairs = [item.split("=", 1) for item in text.split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: write arm=value,arm=value")
    return dict(pairs)


def _home(text: str) -> tuple[str, tuple[float, ...]]:
    arm, _, numbers = text.partition("=")
    try:
        q = tuple(float(v) for v in numbers.split(","))
    except ValueError:
        q = ()
    if len(q) != 7:
        raise argparse.ArgumentTypeError(f"{text!r}: write arm=q1,q2,q3,q4,q5,q6,q7 in rad")
    return arm, q


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulation.server", description=__doc__.splitlines()[0])
    parser.add_argument("--workcell", default="bimanual", help="name in config/workcells or a YAML file")
    parser.add_argument("--name", default="vipra_workcell", help="of the shared state and the control socket")
    parser.add_argument(
        "--hostnames", type=_pairs, required=True, help="arm=address,... (loopback addresses)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the objects' poses")
    parser.add_argument(
        "--task", default="", help="file in config/tasks: its trials instead of the workcell's objects"
    )
    parser.add_argument("--split", choices=("seen", "unseen"), default="seen", help="of the task's trial")
    parser.add_argument(
        "--no-watchdog", action="store_true", help="no communication watchdog and no reflexes"
    )
    parser.add_argument(
        "--home", type=_home, action="append", default=[], help="arm=q1,...,q7 rad; repeatable"
    )
    parser.add_argument("--die-with-parent", action="store_true", help="end when the starting process ends")
    given = parser.parse_args(arguments)
    if given.die_with_parent:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    options = Options(
        workcell=given.workcell,
        name=given.name,
        hostnames=given.hostnames,
        seed=given.seed,
        task=given.task,
        split=given.split,
        watchdog=not given.no_watchdog,
        homes=dict(given.home),
    )
    try:
        run(options)
    except (ConfigError, StateError, OSError) as error:
        print(f"simulator {given.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
