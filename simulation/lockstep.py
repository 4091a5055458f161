"""The workcell without processes, sockets or real time: a trial stepped as fast as the machine can.

For demonstrations in volume and for paired comparisons of policies. The arms follow joint references with the
law of the real tracker (stiffness and critical damping from `config.robot.Control`), so a motion looks as
it does on the real path; nothing here checks limits, which is the arms node's work.
"""

import mujoco
import numpy as np

from config.robot import Control
from config.workcell import Workcell
from simulation import cloth
from simulation.arm import Arm
from simulation.tasks.score import Judge, Thing
from simulation.tasks.trial import Trial
from simulation.workcell import HAND_WIDTH, HOME, build, place_prop, strip_visuals, top_points, widest

TICK_S = 0.001
TCP_M = 0.1034  # Franka Hand: from its flange to between the fingertips (Franka documentation)
GRASP_SPEED_M_S, GRASP_FORCE_N = 0.05, 40.0
REFERENCE_TICKS = 5  # the reference is sampled at 200 Hz, as on the robot


class Lockstep:
    """One trial at a time, in one arm order: `arms`. Positions in rad and m, `world` frame."""

    def __init__(self, trial: Trial, control: Control | None = None):
        control = control or Control()
        self._load(trial)
        self._stiffness = np.array(control.stiffness)
        self._damping = 2 * np.sqrt(self._stiffness)
        self._max_step = control.max_delta_tau_nm
        self.reset(trial)

    def _load(self, trial: Trial) -> None:
        self.sim = build(trial.workcell, None, Arm)
        strip_visuals(self.sim.scene)
        self.sim.start()
        self.model, self.data = self.sim.model, self.sim.data
        self.arms = dict(zip(trial.workcell.arms, self.sim.robots, strict=True))
        self._built = trial.workcell.shapes

    def reset(self, trial: Trial, start: dict[str, np.ndarray] | None = None) -> None:
        """Another trial of the same task. start: joints by arm, rad, or home.

        Other shapes than before make another `model` and `data`; colours do not matter.
        """
        if trial.workcell.shapes != self._built:
            self._load(trial)
        self.trial, self.time_s = trial, 0.0
        mujoco.mj_resetData(self.model, self.data)
        self._targets, self._tau = {}, {}
        for name, arm in self.arms.items():
            q = np.array((start or {}).get(name, HOME), float)
            self.data.qpos[arm.qpos_slice] = q
            self.data.qpos[arm._finger_qpos_addrs] = HAND_WIDTH / 2
            self._targets[name] = (q, q)
            self._tau[name] = np.zeros(7)
            self.open_hand(name, 1.0)
        top = trial.workcell.table.centre_xyz[2]
        for prop, yaw in zip(trial.workcell.props, trial.yaws_rad, strict=True):
            place_prop(self.model, self.data, prop, np.array(prop.xy), yaw, top)
        mujoco.mj_forward(self.model, self.data)
        self.judge = judge_for(trial)

    def restore(
        self, joints: dict[str, np.ndarray], openings: dict[str, float], poses: dict[str, np.ndarray]
    ) -> None:
        """After `reset`: everything at rest as it once was, arms held there.

        joints: [7] rad by arm; openings: 0 closed to 1 open; poses: [7] by object, m and wxyz.
        """
        for name, arm in self.arms.items():
            q = np.array(joints[name], float)
            self.data.qpos[arm.qpos_slice] = q
            self.data.qpos[arm._finger_qpos_addrs] = HAND_WIDTH / 2 * openings[name]
            self._targets[name] = (q, q)
        for name, pose in poses.items():
            at = int(self.model.joint(f"{name}_free").qposadr[0])
            self.data.qpos[at : at + 7] = pose
        mujoco.mj_forward(self.model, self.data)

    def open_hand(self, arm: str, opening: float) -> None:
        """opening 0 closes with the grasp force, 1 opens; the rules of the gripper node are the caller's."""
        width = HAND_WIDTH * float(opening > 0.5)
        self.arms[arm].set_hand_goal(width, GRASP_SPEED_M_S, GRASP_FORCE_N)

    def advance(self, seconds: float, targets: dict[str, np.ndarray]) -> None:
        """Let `seconds` pass while every named arm's reference moves to `targets` (joints, rad).

        Cubic between successive targets, velocities from their differences, as the arms node plays a chunk.
        """
        ticks = max(1, round(seconds / TICK_S))
        paths = {}
        for name, (q0, before) in self._targets.items():
            q1 = np.asarray(targets.get(name, q0), float)
            paths[name] = (q0, q1, (q0 - before) / seconds, (q1 - q0) / seconds)
            self._targets[name] = (q1, q0)
        span = ticks * TICK_S
        for tick in range(0, ticks, REFERENCE_TICKS):
            s = (tick + REFERENCE_TICKS) / ticks
            now = {name: _hermite(*path, min(s, 1.0), span) for name, path in paths.items()}
            self._step(min(REFERENCE_TICKS, ticks - tick), now)
        self.time_s += span
        self.judge_now()

    def follow(self, reference: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Let one tick of the 200 Hz reference pass; reference: positions [7] rad and velocities by arm.

        Every arm must be named, and `judge_now` called now and then.
        """
        self._step(REFERENCE_TICKS, reference)
        self.time_s += REFERENCE_TICKS * TICK_S

    def judge_now(self) -> None:
        """Let the judge see how things stand."""
        self.judge.update(self.time_s, self.things(), {arm: self.tcp(arm)[0] for arm in self.arms})

    def _step(self, ticks: int, reference: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        for _ in range(ticks):
            for name, arm in self.arms.items():
                self._track(name, arm, *reference[name])
                arm._pre_step()
            mujoco.mj_step(self.model, self.data)

    def _track(self, name: str, arm: Arm, q: np.ndarray, dq: np.ndarray) -> None:
        """The joint impedance law; its torque changes by at most `max_delta_tau_nm` a millisecond."""
        measured, speed = arm.joints()
        wanted = self._stiffness * (q - measured) + self._damping * (dq - speed)
        before = self._tau[name]
        self._tau[name] = before + np.clip(wanted - before, -self._max_step, self._max_step)
        arm.torque_control(self._tau[name])

    # --- truth

    def joints(self, arm: str) -> np.ndarray:
        """Measured positions [7], rad."""
        return self.arms[arm].joints()[0].copy()

    def opening(self, arm: str) -> float:
        """Measured opening, 0 closed to 1 open."""
        return float(np.clip(self.arms[arm]._get_hand_width() / HAND_WIDTH, 0.0, 1.0))

    def tcp(self, arm: str) -> tuple[np.ndarray, np.ndarray]:
        """Tool centre point [3] m and rotation [3, 3] of the hand."""
        body = self.arms[arm].hand_body
        rotation = self.data.xmat[body].reshape(3, 3).copy()
        return self.data.xpos[body] + rotation[:, 2] * TCP_M, rotation

    def things(self) -> dict[str, Thing]:
        """Every object's pose and velocity."""
        return things(self.model, self.data, self.trial.workcell)


def things(model, data, workcell: Workcell) -> dict[str, Thing]:
    """The workcell's props by name as the physics knows them; a cloth's pose and velocity are its knob's."""
    found = {}
    for prop in workcell.props:
        joint = model.joint(f"{prop.name}_free")
        at, speed = int(joint.qposadr[0]), int(joint.dofadr[0])
        found[prop.name] = Thing(
            data.qpos[at : at + 3].copy(),
            data.qpos[at + 3 : at + 7].copy(),
            data.qvel[speed : speed + 3].copy(),
            cloth.surface(model, data, prop.name) if prop.kind == "cloth" else None,
        )
    return found


def judge_for(trial: Trial) -> Judge:
    """A judge of `trial` that has seen nothing yet."""
    target = trial.task.named("target")
    kinds = {prop.name: prop.kind for prop in trial.workcell.props}
    radii = {name: widest(kind) for name, kind in kinds.items()}
    return Judge(trial.task, trial.workcell.table.centre_xyz[2], radii, top_points(kinds[target]))


def _hermite(q0, q1, v0, v1, s: float, span: float) -> tuple[np.ndarray, np.ndarray]:
    """Cubic from (q0, v0) to (q1, v1) in `span` s: position and velocity at s in [0, 1]."""
    s2, s3 = s * s, s * s * s
    q = (2 * s3 - 3 * s2 + 1) * q0 + (s3 - 2 * s2 + s) * span * v0
    q = q + (3 * s2 - 2 * s3) * q1 + (s3 - s2) * span * v1
    dq = (6 * s2 - 6 * s) * (q0 - q1) / span + (3 * s2 - 4 * s + 1) * v0 + (3 * s2 - 2 * s) * v1
    return q, dq
