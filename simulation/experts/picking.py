"""Experts that pick one object and put it on or in another, with everything the simulator knows.

An expert is a generator: it reads the world's truth when it needs it and yields one hand pose an arm and
control step. So it re-aims at every phase, notices a failed grasp and tries again; `pick_and_put` begins
wherever the hand and the object are. Speeds, approach heights and grasp yaw vary with its seed, and it never
rests longer than the hand needs to close.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from simulation.tasks.score import Thing
from simulation.tasks.trial import Trial
from simulation.workcell import BOWL, top_points

CUP_GRASP_M = 0.068  # of the fingertips above the cup's base: below the rim, above a cup it is nested in
CUP_NEST_M = 0.037  # base of a nested cup above the base of the one below (the tapers meet)
KNOB_GRASP_M = 0.022  # of the fingertips above the cloth's middle
RIM_GRASP_M = 0.042  # of the fingertips above the bowl's base, across its rim
LEAN_RAD = 0.7  # of the hand that holds the bowl
SIDE_M = 0.02  # of the object from the held bowl's centre
TURN_RAD_S = 0.6  # slow: near straight down the wrist has to turn far for a little lean
CLEAR_M = 0.13  # of the carried object's base above the table
GRASP_S, RELEASE_S = 0.28, 0.2
KNOB_GRASP_S = 0.7  # the fingers have further to close than on a cup
DROP_M = 0.012  # of the cloth: a held knob pressed on a rigid top makes contacts that throw the object
HANGING = 0.7  # how far the lifted cloth reaches below the fingers, as a share of its side
TRIES = 4
DONE_M = 0.05  # of the object beside its place: it was put there
AT_M = 0.01  # beside where the hand or the object has to be: it is there
HELD_M = 0.025  # of the tool centre from the grasp, with fingers that far apart: it holds the object
HELD_OPENING = (0.3, 0.9)
EMPTY = 0.03  # closed fingers: not even a rim between them


@dataclass(frozen=True)
class Pose:
    """Where the hand shall be: tool centre m [3] in `world`, and how it is turned from straight down."""

    xyz: np.ndarray
    yaw: float = 0.0  # rad about the vertical, from the arm's base
    tilt: float = 0.0  # rad about the hand's own x axis, then
    opening: float = 1.0


class World(Protocol):
    """What an expert may look at; `simulation.lockstep.Lockstep` is one."""

    trial: Trial

    def things(self) -> dict[str, Thing]: ...
    def tcp(self, arm: str) -> tuple[np.ndarray, np.ndarray]: ...
    def opening(self, arm: str) -> float: ...


@dataclass(frozen=True)
class Style:
    """How this demonstration is done."""

    speed_m_s: float
    approach_m: float  # above the grasp before descending
    yaw_rad: float
    carry_m: float
    settle_m: float  # above the final height before opening

    @classmethod
    def draw(cls, random: np.random.Generator, yaw_rad: float) -> "Style":
        return cls(
            speed_m_s=random.uniform(0.22, 0.34),
            approach_m=random.uniform(0.07, 0.12),
            yaw_rad=random.uniform(-yaw_rad, yaw_rad),
            carry_m=random.uniform(0.0, 0.04),
            settle_m=random.uniform(0.003, 0.008),
        )


def expert(world: World, rate_hz: float, random: np.random.Generator) -> Iterator[dict[str, Pose]]:
    """The trial's task, one pose an arm and control step."""
    task = world.trial.task
    if task.holder is None:
        motion = cover if task.kind == "cover" else pick_and_put
        for pose in motion(world, rate_hz, random):
            yield {task.arm: pose}
        return
    scene = Scene()
    hands = {
        task.holder: hold_bowl(world, rate_hz, random, scene),
        task.arm: pick_and_put(world, rate_hz, random, scene),
    }
    poses: dict[str, Pose] = {}
    while hands:
        for arm, motion in list(hands.items()):
            pose = next(motion, None)
            if pose is None:
                del hands[arm]
                scene.placed |= arm == task.arm
            else:
                poses[arm] = pose
        yield dict(poses)


@dataclass
class Scene:
    """What two arms tell each other."""

    held: bool = False  # the target is held
    placed: bool = False  # the moved object is where it belongs, and the hand is away


def pick_and_put(
    world: World, rate_hz: float, random: np.random.Generator, scene: Scene | None = None
) -> Iterator[Pose]:
    """Pick the task's moved object, put it on the target, retreat. Ends when done or after `TRIES` grasps.

    A hand that is at the object closes, one that holds it goes on from there, one beside it rises, having let
    go of a rim, and comes from above.

    With a `scene` it waits above the target until that is held, and keeps to the side away from the holder.
    """
    task = world.trial.task
    style = Style.draw(random, task.expert_yaw_rad)
    moved, target, arm = task.named("moved"), task.named("target"), task.arm
    table = world.trial.workcell.table.centre_xyz[2]
    fast, slow = style.speed_m_s, 0.6 * style.speed_m_s
    here = Pose(world.tcp(arm)[0], opening=float(world.opening(arm) > HELD_OPENING[1]))

    def of(name: str) -> np.ndarray:
        return world.things()[name].xyz

    def grasp() -> np.ndarray:
        return of(moved) + _up(CUP_GRASP_M)

    def done() -> bool:
        return bool(np.hypot(*(of(moved) - of(target))[:2]) < DONE_M)

    def held() -> bool:
        closed = HELD_OPENING[0] < world.opening(arm) < HELD_OPENING[1]
        return closed and bool(np.linalg.norm(world.tcp(arm)[0] - grasp()) < HELD_M)

    def goal() -> np.ndarray:
        """Where the hand must be for the object, which hangs where it was gripped, to be over its place."""
        place = of(target)
        if scene is not None:
            place = place + _up(0.0, *(SIDE_M * _away(world)))
        return place - (of(moved) - world.tcp(arm)[0])

    def pick(here: Pose) -> Generator[Pose, None, Pose]:
        off = world.tcp(arm)[0] - grasp()
        low, aside = off[2] < style.approach_m, np.hypot(*off[:2]) > AT_M
        if low and aside:
            if not here.opening and world.opening(arm) > EMPTY:
                here = yield from _stay(replace(here, opening=1.0), RELEASE_S, rate_hz)
            here = yield from _go(
                here, replace(here, xyz=here.xyz + _up(style.approach_m - off[2])), fast, rate_hz
            )
        if aside or not low:
            above = Pose(grasp() + _up(style.approach_m), style.yaw_rad)
            here = yield from _go(here, above, fast, rate_hz)
        here = yield from _go(here, replace(here, xyz=grasp(), opening=1.0), slow, rate_hz)
        return (yield from _stay(replace(here, opening=0.0), GRASP_S, rate_hz))

    for _ in range(TRIES):
        holds = held()
        if not holds and not done():
            here = yield from pick(here)
            holds = True
        if holds and np.hypot(*(goal() - world.tcp(arm)[0])[:2]) > AT_M:
            height = table + CLEAR_M + CUP_GRASP_M + style.carry_m
            here = yield from _go(here, replace(here, xyz=np.array([*here.xyz[:2], height])), fast, rate_hz)
            if of(moved)[2] - table < 0.5 * CLEAR_M:
                here = replace(here, opening=1.0)
                continue  # it slipped
            here = yield from _go(here, replace(here, xyz=np.array([*goal()[:2], height])), fast, rate_hz)
        while scene is not None and not scene.held:
            yield here
        if holds:
            down = goal() + _up(_rest_height(task.kind) + style.settle_m)
            here = yield from _go(here, replace(here, xyz=down), slow, rate_hz)
        here = yield from _stay(replace(here, opening=1.0), RELEASE_S, rate_hz)
        here = yield from _go(here, replace(here, xyz=here.xyz + _up(0.13)), fast, rate_hz)
        if done():
            break
    yield from _stay(here, 0.25, rate_hz)


def cover(world: World, rate_hz: float, random: np.random.Generator) -> Iterator[Pose]:
    """Lift the cloth by its knob until it hangs free, lower it over the target's middle, let go, retreat.

    Ends when the knob came to lie over the target, or after `TRIES` grasps.
    """
    task = world.trial.task
    style = Style.draw(random, task.expert_yaw_rad)
    moved, target, arm = task.named("moved"), task.named("target"), task.arm
    props = {prop.name: prop for prop in world.trial.workcell.props}
    height = float(top_points(props[target].kind)[0, 2])
    hanging = HANGING * props[moved].size_m
    fast, slow = style.speed_m_s, 0.6 * style.speed_m_s
    here = Pose(world.tcp(arm)[0])

    def of(name: str) -> np.ndarray:
        return world.things()[name].xyz

    for _ in range(TRIES):
        above = Pose(of(moved) + _up(KNOB_GRASP_M + style.approach_m), style.yaw_rad)
        here = yield from _go(here, above, fast, rate_hz)
        here = yield from _go(here, replace(here, xyz=of(moved) + _up(KNOB_GRASP_M)), slow, rate_hz)
        here = yield from _stay(replace(here, opening=0.0), KNOB_GRASP_S, rate_hz)
        carry = of(target)[2] + height + hanging + style.carry_m
        here = yield from _go(here, replace(here, xyz=np.array([*here.xyz[:2], carry])), slow, rate_hz)
        if of(moved)[2] < carry - 2 * KNOB_GRASP_M - 0.02:
            here = replace(here, opening=1.0)
            continue  # it slipped
        goal = of(target) - (of(moved) - world.tcp(arm)[0])
        here = yield from _go(here, replace(here, xyz=np.array([*goal[:2], carry])), fast, rate_hz)
        goal = of(target) - (of(moved) - world.tcp(arm)[0]) + _up(height + DROP_M + style.settle_m)
        here = yield from _go(here, replace(here, xyz=goal), slow, rate_hz)
        here = yield from _stay(replace(here, opening=1.0), RELEASE_S, rate_hz)
        here = yield from _go(here, replace(here, xyz=here.xyz + _up(0.13)), fast, rate_hz)
        if np.hypot(*(of(moved) - of(target))[:2]) < DONE_M:
            break
    yield from _stay(here, 0.25, rate_hz)


def hold_bowl(world: World, rate_hz: float, random: np.random.Generator, scene: Scene) -> Iterator[Pose]:
    """Pinch the bowl's rim on the holder's side, one finger inside, until the object is placed; then let go.

    The hand leans outwards, which leaves the other one room above the bowl.
    """
    task = world.trial.task
    style = Style.draw(random, task.expert_yaw_rad)
    arm, bowl = task.holder, task.named("target")

    def rim() -> Pose:
        outwards = -_away(world)
        point = world.things()[bowl].xyz + _up(RIM_GRASP_M, *(outwards * (BOWL[-1][1] + BOWL[-1][2]) / 2))
        base_yaw = world.trial.workcell.arms[arm].yaw_rad
        closing = np.arctan2(outwards[1], outwards[0]) + np.pi / 2 - base_yaw  # a hand closes along its y
        yaw = float((closing + np.pi / 2) % np.pi - np.pi / 2)
        along = np.array([np.sin(yaw + base_yaw), -np.cos(yaw + base_yaw)])
        return Pose(point, yaw, float(np.sign(along @ outwards)) * LEAN_RAD)

    pose = rim()
    away = _up(style.approach_m, *(-0.5 * style.approach_m * _away(world)))
    here = yield from _go(
        Pose(world.tcp(arm)[0]), replace(pose, xyz=pose.xyz + away), 0.6 * style.speed_m_s, rate_hz
    )
    here = yield from _go(here, rim(), 0.6 * style.speed_m_s, rate_hz)
    here = yield from _stay(replace(here, opening=0.0), GRASP_S, rate_hz)
    scene.held = True
    while not scene.placed:
        yield here
    here = yield from _stay(replace(here, opening=1.0), RELEASE_S, rate_hz)
    yield from _go(here, replace(here, xyz=here.xyz + away), style.speed_m_s, rate_hz)


def _away(world: World) -> np.ndarray:
    """Unit vector [2] from the holder's side of the target to the other."""
    task = world.trial.task
    base = np.array(world.trial.workcell.arms[task.holder].xyz)
    towards = (base - world.things()[task.named("target")].xyz)[:2] * (0.35, 1.0)  # beside it, not behind it
    return -towards / np.linalg.norm(towards)


def _up(height: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    return np.array([x, y, height])


def _rest_height(kind: str) -> float:
    """Base of the moved object above the target's base once released, m."""
    return CUP_NEST_M if kind == "stack" else BOWL[1][0]


def _go(start: Pose, end: Pose, speed_m_s: float, rate_hz: float) -> Generator[Pose, None, Pose]:
    """Minimum-jerk from `start` to `end`, peak `speed_m_s`; the opening changes at once. Returns `end`."""
    length = float(np.linalg.norm(end.xyz - start.xyz))
    turn = max(abs(end.yaw - start.yaw), abs(end.tilt - start.tilt))
    seconds = max(1.875 * length / speed_m_s, 1.875 * turn / TURN_RAD_S, 2 / rate_hz)
    steps = int(np.ceil(seconds * rate_hz))
    for step in range(1, steps + 1):
        s = step / steps
        ease = s**3 * (10 - 15 * s + 6 * s**2)
        yield Pose(
            start.xyz + ease * (end.xyz - start.xyz),
            start.yaw + ease * (end.yaw - start.yaw),
            start.tilt + ease * (end.tilt - start.tilt),
            end.opening,
        )
    return end


def _stay(pose: Pose, seconds: float, rate_hz: float) -> Generator[Pose, None, Pose]:
    for _ in range(int(np.ceil(seconds * rate_hz))):
        yield pose
    return pose
