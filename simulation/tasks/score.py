"""Success and partial success from the simulator's truth, as ViPRA scores trials (appendices F and G)."""

import math
from dataclasses import dataclass, field

import numpy as np

from config.task import Task
from simulation.cloth import coverage
from simulation.workcell import BOWL

LIFTED_M = 0.03  # of an object's lowest point above the table: it was grasped
UPRIGHT = 0.94  # cosine of the tilt, 20 degrees
RESTED_M_S = 0.03  # slower than this is at rest
GRASPED = {"cup": np.array([0.0, 0.0, 0.07]), "cloth": np.array([0.0, 0.0, 0.02])}  # m, from its base
COVERED = 0.8  # share of the object's top that lies under the cloth
HELD_M = 0.04  # from the holder's tool centre point to the bowl's rim
RIM = (sum(BOWL[-1][1:]) / 2, BOWL[-1][0])  # m, radius and height of the middle of the bowl's rim
CLEAR_M = 0.06  # from the hand's tool centre point to the object's grasped part: released
SETTLED_S = 0.5  # so long must everything hold
# Height of the moved object's base above the target's, m: nested or on the rim; on the bowl's floor or rim.
_HEIGHT = {"stack": (0.02, 0.10), "pick_place": (-0.01, 0.07), "place_in_bowl": (-0.01, 0.07)}
# m, between the axes: over the target, so for a cup on the rim up to the rim's radius; and fallen beside it.
_OFFSET = {"stack": 0.035, "pick_place": 0.05, "place_in_bowl": 0.05, "cover": 0.1}
_BESIDE = {"stack": 0.03, "pick_place": 0.1, "place_in_bowl": 0.1, "cover": 0.2}


@dataclass(frozen=True)
class Thing:
    """Pose of an object: base centre m, wxyz quaternion, linear velocity m/s, all in `world`."""

    xyz: np.ndarray
    quat: np.ndarray
    velocity: np.ndarray
    surface: np.ndarray | None = None  # of a cloth: its points [n, 3] m

    @property
    def up(self) -> float:
        """Cosine of its tilt."""
        _, x, y, _ = self.quat
        return float(1 - 2 * (x * x + y * y))

    def lowest(self, radius: float) -> float:
        """At most its lowest point, m, if no part is further than `radius` from its axis.

        How high it is, is not known: upside down that point may be anywhere below.
        """
        if self.up < 0:
            return -math.inf
        return float(self.xyz[2] - radius * math.sqrt(max(1 - self.up**2, 0.0)))


def things_in(truth: dict) -> dict[str, Thing]:
    """Every object of a running simulator's truth (`simulation.control`)."""
    return {
        name: Thing(
            np.array(thing["position"]),
            np.array(thing["quaternion"]),
            np.array(thing["velocity"][:3]),
            np.array(thing["surface"]) if "surface" in thing else None,
        )
        for name, thing in truth["objects"].items()
    }


@dataclass
class Judge:
    """Fed with truth as time goes on. `partial`: the right object was lifted; `success` latches."""

    task: Task
    table_z: float
    radii: dict[str, float] = field(default_factory=dict)  # m, by name: no part is further from the axis
    target_top: np.ndarray | None = None  # [k, 3] m from the target's base, spread over its top; for cover
    partial: bool = False
    success: bool = False
    success_s: float | None = None
    wrong_object: bool = False  # something else was lifted first
    drops: int = 0  # times the moved object was lifted and came down without success
    _held_since: float | None = None
    _aloft: bool = False
    _in_place: bool = False
    _steadied: bool = False  # by the holder's hand, when the object came into the bowl

    def update(self, time_s: float, things: dict[str, Thing], tcps: dict[str, np.ndarray]) -> None:
        """things: by name; tcps: by arm, tool centre point [3] m, world."""
        tcp_xyz = tcps[self.task.arm]
        moved, target = things[self.task.named("moved")], things[self.task.named("target")]
        right = {self.task.named("moved")}
        if self.task.holder:  # who may lift the target too
            right.add(self.task.named("target"))
        lifted = self._lifted(self.task.named("moved"), moved)
        if lifted:
            self.partial = True
        elif not self.partial:
            self.wrong_object |= any(self._lifted(n, t) for n, t in things.items() if n not in right)
        if self.task.holder:
            in_place, before = self._at_its_place(moved, target), self._in_place
            if in_place and not before:
                self._steadied = _from_rim(tcps[self.task.holder], target) < HELD_M
            self._in_place = in_place
        done = self._placed(moved, target, tcp_xyz) and (self._steadied or not self.task.holder)
        beside = np.hypot(*(moved.xyz - target.xyz)[:2]) > _BESIDE[self.task.kind]
        if self._aloft and not lifted and beside:
            self.drops += 1
        self._aloft = lifted
        if not done:
            self._held_since = None
        elif self._held_since is None:
            self._held_since = time_s
        elif time_s - self._held_since >= SETTLED_S and not self.success:
            self.success, self.success_s = True, time_s

    def _lifted(self, name: str, thing: Thing) -> bool:
        """No part of it is on the table: a cup on its side has its base's centre 3 cm above."""
        return thing.lowest(self.radii.get(name, 0.0)) - self.table_z > LIFTED_M

    def _placed(self, moved: Thing, target: Thing, tcp_xyz: np.ndarray) -> bool:
        if self.task.kind == "cover":
            return self._covered(moved, target, tcp_xyz)
        upright = min(moved.up, target.up) > UPRIGHT if self.task.kind == "stack" else target.up > UPRIGHT
        return bool(
            self._at_its_place(moved, target)
            and upright
            and np.linalg.norm(moved.velocity) < RESTED_M_S
            and np.linalg.norm(target.velocity) < RESTED_M_S
            and np.linalg.norm(tcp_xyz - moved.xyz - GRASPED["cup"]) > CLEAR_M
        )

    def _at_its_place(self, moved: Thing, target: Thing) -> bool:
        low, high = _HEIGHT[self.task.kind]
        x, y, z = moved.xyz - target.xyz
        return bool(math.hypot(x, y) < _OFFSET[self.task.kind] and low < z < high)

    def _covered(self, moved: Thing, target: Thing, tcp_xyz: np.ndarray) -> bool:
        """The cloth, let go and at rest, lies over `COVERED` of the top of the target, which still stands."""
        return bool(
            target.up > UPRIGHT
            and np.linalg.norm(moved.velocity) < RESTED_M_S
            and np.linalg.norm(target.velocity) < RESTED_M_S
            and np.linalg.norm(tcp_xyz - moved.xyz - GRASPED["cloth"]) > CLEAR_M
            and coverage(moved.surface, target.xyz + self.target_top @ turned(target.quat).T) >= COVERED
        )


def _from_rim(tcp_xyz: np.ndarray, bowl: Thing) -> float:
    """Distance, m, of a hand from the rim of an upright bowl."""
    x, y, z = tcp_xyz - bowl.xyz
    return math.hypot(math.hypot(x, y) - RIM[0], z - RIM[1])


def turned(quat: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] of a wxyz quaternion."""
    w, x, y, z = quat
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
