"""Scripted hand motions towards cups, without physics: joints by damped least squares.

For demonstrations in quantity: reach, pick up, push, put in the bowl. What a hand holds follows it rigidly,
what it pushes slides ahead of it. Frames and units are the workcell's (m, rad; y to the robot's left).
"""

import itertools
from dataclasses import dataclass

import mujoco
import numpy as np

from config.workcell import Workcell
from simulation.workcell import BOWL, CUP

TCP_M = 0.1034  # from the hand's frame to between the fingertips
GRASP_M, CARRY_M = 0.068, 0.16  # of the fingertips above the table
PUSH_M = 0.05
HELD = 0.84  # opening with a cup between the fingers
CLOSE_S = 0.35
APART_M = 0.13  # between cups
MAX_RAD_S = 2.0
_CUP_RADIUS, _FINGER_RADIUS = CUP[-1][1], 0.012
_TOLERANCE_M = 0.012
SHORT = ("reach", "pick", "push")
KINDS = (*SHORT, "bowl")
_LONGER = {"bowl": 1.5}


class Unreachable(ValueError):
    """The arm does not get to where a motion wants it: draw another one."""


@dataclass(frozen=True)
class Place:
    """One corner of a hand's path."""

    xyz: np.ndarray  # fingertips, m
    opening: float
    dwell_s: float = 0.0  # the hand opens or closes here


@dataclass(frozen=True)
class Motion:
    """A motion of one arm, step by step."""

    task: str
    arm: str
    joints: np.ndarray  # [T, 7] rad
    command: np.ndarray  # [T] commanded opening 0..1
    opening: np.ndarray  # [T] opening that is seen
    things: dict[str, np.ndarray]  # name -> [T, 3] m, of those that move


class Hand:
    """One arm of a MuJoCo workcell as a kinematic chain."""

    def __init__(self, model: mujoco.MjModel, index: int, home: np.ndarray):
        self._model, self._data = model, mujoco.MjData(model)
        self._body = model.body(f"robot{index}_hand").id
        joints = [model.joint(f"robot{index}_fr3_joint{i}") for i in range(1, 8)]
        self._qpos = [int(j.qposadr[0]) for j in joints]
        self._dofs = [int(j.dofadr[0]) for j in joints]
        self._low, self._high = np.array([j.range for j in joints]).T
        self.home = home
        self.down = self.pose(home)[1]

    def pose(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(fingertips [3] m, rotation [3, 3] of the hand) in world."""
        self._data.qpos[self._qpos] = q
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        rotation = self._data.xmat[self._body].reshape(3, 3).copy()
        return self._data.xpos[self._body] + rotation[:, 2] * TCP_M, rotation

    def solve(self, xyz: np.ndarray, yaw: float, near: np.ndarray, rounds: int = 8) -> np.ndarray:
        """Joints [7] near `near` with the fingertips at `xyz`, straight down, `yaw` from home's.

        Raises Unreachable.
        """
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        wanted, q = turn @ self.down, np.array(near, float)
        jacobian = np.zeros((6, self._model.nv))
        for _ in range(rounds):
            tip, rotation = self.pose(q)
            tilt = 0.5 * np.cross(rotation.T, wanted.T).sum(0)  # small-angle difference of the two frames
            error = np.concatenate([xyz - tip, tilt])
            if np.linalg.norm(error[:3]) < 5e-4 and np.linalg.norm(tilt) < 5e-3:
                return q
            mujoco.mj_jac(self._model, self._data, jacobian[:3], jacobian[3:], tip, self._body)
            own = jacobian[:, self._dofs]
            step = own.T @ np.linalg.solve(own @ own.T + 1e-4 * np.eye(6), error)
            null = np.eye(7) - np.linalg.pinv(own) @ own
            q = np.clip(q + step + 0.05 * null @ (self.home - q), self._low + 0.02, self._high - 0.02)
        if np.linalg.norm(xyz - self.pose(q)[0]) > _TOLERANCE_M:
            raise Unreachable(f"no joints for {np.round(xyz, 3)}")
        return q


def tidy(scene: Workcell, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Places [3] m of all things: where the workcell has them, within its jitter."""
    jitter, top = np.array(scene.props_jitter_xy), scene.table.centre_xyz[2]
    return {p.name: np.array([*(p.xy + rng.uniform(-jitter, jitter)), top + 0.0005]) for p in scene.props}


def scatter(scene: Workcell, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Places [3] m of all things: apart from each other, where the arms reach."""
    bases = np.array([base.xyz[:2] for base in scene.arms.values()])
    wide = 0.17 + (np.ptp(bases[:, 1]) / 2 if len(bases) > 1 else 0.0)
    top = scene.table.centre_xyz[2]
    while True:
        places: dict[str, np.ndarray] = {}
        for prop in scene.props:
            for _ in range(50):
                spot = np.array([rng.uniform(0.40, 0.60), rng.uniform(-wide, wide)])
                gap = APART_M + (BOWL[-1][1] - _CUP_RADIUS if prop.kind == "bowl" else 0.0)
                if all(np.linalg.norm(spot - other[:2]) > gap for other in places.values()):
                    places[prop.name] = np.array([*spot, top + 0.0005])
                    break
        if len(places) == len(scene.props):
            return places


def draw(
    scene: Workcell,
    hands: dict[str, Hand],
    places: dict[str, np.ndarray],
    kind: str,
    steps: int,
    rate_hz: float,
    rng: np.random.Generator,
) -> Motion:
    """A motion of `kind` (one of KINDS) of at least `steps` at `rate_hz`. Raises Unreachable."""
    steps = round(steps * _LONGER.get(kind, 1.0))
    cups = [p.name for p in scene.props if p.kind == "cup" and p.name in places]
    bowls = [p.name for p in scene.props if p.kind == "bowl"]
    cup = cups[int(rng.integers(len(cups)))]
    side = 1.0 if rng.random() < 0.5 else -1.0
    base = {arm: np.array(scene.arms[arm].xyz) for arm in hands}
    arm = min(hands, key=lambda name: np.linalg.norm(base[name][:2] - places[cup][:2]))
    word, top = cup.replace("_", " "), scene.table.centre_xyz[2]
    at = places[cup] * [1, 1, 0] + [0, 0, top]
    hover = _up(at, GRASP_M + rng.uniform(0.06, 0.12))
    grasp = _up(at, GRASP_M)
    pushed = None
    if kind == "reach":
        task = f"reach for the {word}"
        path = [Place(hover, 1.0), Place(grasp, 1.0)]
    elif kind == "push":
        task = f"push the {word} to the {'left' if side > 0 else 'right'}"
        aside = _CUP_RADIUS + _FINGER_RADIUS + rng.uniform(0.02, 0.04)
        before = at + np.array([0, -side * aside, PUSH_M])
        after = before + np.array([0, side * rng.uniform(0.11, 0.17), 0])
        path = [Place(_up(before, 0.09), 0.0), Place(before, 0.0), Place(after, 0.0)]
        pushed = side
    elif kind == "pick" or not bowls:
        task = f"pick up the {word}"
        lift = grasp + rng.uniform([-0.03, -0.03, 0.10], [0.03, 0.03, CARRY_M])
        path = [Place(hover, 1.0), Place(grasp, 0.0, CLOSE_S), Place(lift, 0.0)]
    else:
        task = f"put the {word} in the bowl"
        bowl = places[bowls[0]] * [1, 1, 0] + [0, 0, top]
        over = _up(bowl, GRASP_M + CARRY_M)
        low = _up(bowl, GRASP_M + 0.02)
        path = [
            Place(hover, 1.0),
            Place(grasp, 0.0, CLOSE_S),
            Place(_up(grasp, CARRY_M), 0.0),
            Place(over, 0.0),
            Place(low, 1.0, CLOSE_S),
            Place(over, 1.0),
        ]
    hand = hands[arm]
    begin = hand.pose(hand.home)[0] + rng.uniform([-0.06, -0.08, -0.06], [0.06, 0.08, 0.06])
    first = hand.solve(begin, 0.0, hand.home, rounds=60)
    tips, command, rest = _walk(begin, path, steps, rate_hz, rng)
    yaw = rng.uniform(-0.3, 0.3) * np.minimum(np.arange(steps) / max(steps / 3, 1), 1)
    joints, q = np.empty((steps, 7)), first
    for step in range(steps):
        q = hand.solve(tips[step], yaw[step], q) if step else first
        joints[step] = q
    if np.abs(np.diff(joints, axis=0)).max() * rate_hz > MAX_RAD_S:
        raise Unreachable(f"the arm would have to move faster than {MAX_RAD_S} rad/s")
    opening, moved = _consequences(
        hand, joints, command, rest, places[cup], pushed, top, kind in ("pick", "bowl")
    )
    return Motion(task, arm, joints, command, opening, {cup: moved})


def _up(xyz: np.ndarray, metres: float) -> np.ndarray:
    return xyz + np.array([0.0, 0.0, metres])


def _walk(
    start: np.ndarray, path: list[Place], steps: int, rate_hz: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimum-jerk legs through the places, stretched to fill the time but for a short end.

    Returns fingertips [T, 3], commanded openings [T], and whether the hand rests to open or close [T].
    """
    corners = [start, *(p.xyz for p in path)]
    legs = np.array([max(np.linalg.norm(b - a), 0.03) for a, b in itertools.pairwise(corners)])
    legs = legs**0.7 * rng.uniform(0.85, 1.15, len(legs))
    total = steps / rate_hz
    moving = total - sum(p.dwell_s for p in path) - rng.uniform(0.1, 0.5)
    durations = legs / legs.sum() * moving
    tips, command, rest = np.empty((steps, 3)), np.empty(steps), np.zeros(steps, bool)
    opening, clock, rows = path[0].opening if path[0].dwell_s == 0 else 1.0, 0.0, iter(range(steps))
    row = next(rows)
    for place, begin, duration in zip(path, corners[:-1], durations, strict=True):
        if place.dwell_s == 0:
            opening = place.opening
        while row is not None and row / rate_hz < clock + duration:
            s = (row / rate_hz - clock) / duration
            tips[row] = begin + (place.xyz - begin) * (10 * s**3 - 15 * s**4 + 6 * s**5)
            command[row] = opening
            row = next(rows, None)
        clock += duration
        opening = place.opening
        while row is not None and row / rate_hz < clock + place.dwell_s:
            tips[row], command[row], rest[row] = place.xyz, opening, True
            row = next(rows, None)
        clock += place.dwell_s
    for left in [row, *rows] if row is not None else []:
        tips[left], command[left] = path[-1].xyz, opening
    return tips, command, rest


def _consequences(
    hand: Hand,
    joints: np.ndarray,
    command: np.ndarray,
    rest: np.ndarray,
    cup: np.ndarray,
    pushed: float | None,
    top: float,
    grasps: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(openings seen [T], where the cup is [T, 3]) of a motion."""
    steps, now = len(joints), cup.copy()
    opening, moved = np.empty(steps), np.empty((steps, 3))
    seen, held = command[0], None
    for step in range(steps):
        tip, _ = hand.pose(joints[step])
        closing = command[step] < 0.5
        if grasps and held is None and closing and rest[step] and seen <= HELD:
            held = now - tip
        if held is not None and not closing:
            held, now = None, np.array([*now[:2], max(now[2], top + 0.0005)])
        limit = HELD if grasps and closing else 0.0
        seen = (
            max(seen - 0.25, command[step], limit)
            if command[step] < seen
            else min(seen + 0.25, command[step])
        )
        if held is not None:
            now = tip + held
        elif pushed is not None and tip[2] < top + PUSH_M + 0.02:
            gap = _CUP_RADIUS + _FINGER_RADIUS
            if (now[1] - tip[1]) * pushed < gap:
                now = np.array([now[0], tip[1] + pushed * gap, now[2]])
        opening[step], moved[step] = seen, now
    return opening, moved
