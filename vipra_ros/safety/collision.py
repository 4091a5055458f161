"""Where the arms are and how close to anything: distances, tool centre points, speed, manipulability.

Kinematics and meshes are franky-sim's FR3 with hand (Apache-2.0). The Panda has the same Denavit-Hartenberg
parameters and nearly the same shells, so the FR3 stands in for it. Bodies are convex hulls, a little larger
than the real shells; fingers count as fully open. Frame: `world` of `config.workcell`, metres.
"""

from importlib.util import find_spec
from pathlib import Path

import coal
import numpy as np
import pinocchio as pin

from config.safety import Task
from config.workcell import Base, Workcell

TABLE_THICKNESS_M = 0.2
FINGER_OPENING_M = 0.04  # each finger's travel from the middle
GROUPS = ("self", "arms", "table")


class Geometry:
    """Kinematics and distances of the arms of a workcell. Not thread-safe (holds work buffers)."""

    def __init__(self, workcell: Workcell, arms: tuple[str, ...]):
        """arms: names in `workcell.arms`, in the joints' order. Raises ValueError for an unknown one."""
        unknown = [arm for arm in arms if arm not in workcell.arms]
        if unknown:
            raise ValueError(f"the workcell has no arm {unknown}; it has {sorted(workcell.arms)}")
        self.arms, self.workspace = tuple(arms), workcell.workspace
        self._model, self._shapes = _assemble(workcell, arms)
        self._data = self._model.createData()
        self._bases = [_placement(workcell.arms[arm]) for arm in arms]
        self._tcp = [self._model.getFrameId(f"{arm}_fr3_hand_tcp") for arm in arms]
        self._group = _pair_up(self._model, self._shapes)
        self._shapes_data = pin.GeometryData(self._shapes)
        self._task: Task | None = None  # whose limits these are
        self._limits = np.zeros(len(self._group))  # least distance of each pair, m

    @property
    def pairs(self) -> int:
        """How many pairs of bodies are looked at."""
        return len(self._group)

    def tcp(self, q: np.ndarray) -> np.ndarray:
        """Tool centre points [A, 3] m in `world` at `q` [J] rad."""
        pin.forwardKinematics(self._model, self._data, q)
        return np.array([pin.updateFramePlacement(self._model, self._data, f).translation for f in self._tcp])

    def tools(self, q: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of every arm at `q` [J] rad: tool centre point [3] m, its rotation [3, 3] and its Jacobian [6, 7]
        (linear, then angular), all in the axes of the arm's base.
        """
        pin.computeJointJacobians(self._model, self._data, q)
        tools = []
        for i, (frame, base) in enumerate(zip(self._tcp, self._bases, strict=True)):
            tool = base.actInv(pin.updateFramePlacement(self._model, self._data, frame))
            jacobian = pin.getFrameJacobian(self._model, self._data, frame, pin.LOCAL_WORLD_ALIGNED)
            own = jacobian[:, 7 * i : 7 * i + 7].reshape(2, 3, 7)
            tools.append(
                (tool.translation.copy(), tool.rotation.copy(), (base.rotation.T @ own).reshape(6, 7))
            )
        return tools

    def motion(self, q: np.ndarray, dq: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tool centre points [A, 3] m, their speeds [A] m/s and manipulabilities [A] at `q`, `dq` [J]."""
        pin.computeJointJacobians(self._model, self._data, q)
        tcp = [pin.updateFramePlacement(self._model, self._data, f).translation for f in self._tcp]
        jacobians = [
            pin.getFrameJacobian(self._model, self._data, f, pin.LOCAL_WORLD_ALIGNED)[:, 7 * i : 7 * i + 7]
            for i, f in enumerate(self._tcp)
        ]
        speed = [np.linalg.norm(j[:3] @ dq[7 * i : 7 * i + 7]) for i, j in enumerate(jacobians)]
        manipulability = [np.sqrt(max(np.linalg.det(j @ j.T), 0.0)) for j in jacobians]
        return np.array(tcp), np.array(speed), np.array(manipulability)

    def distances(self, q: np.ndarray) -> dict[str, tuple[float, str]]:
        """Smallest distance (m; negative: overlap) and which bodies, for each of GROUPS that has any pair."""
        distances = self._distances(q)
        nearest: dict[str, tuple[float, str]] = {}
        for k, group in enumerate(self._group):
            if group not in nearest or distances[k] < nearest[group][0]:
                nearest[group] = float(distances[k]), self._bodies(k)
        return nearest

    def _distances(self, q: np.ndarray) -> np.ndarray:
        """Of each pair of bodies, m; negative: overlap."""
        pin.computeDistances(self._model, self._data, self._shapes, self._shapes_data, q)
        return np.array([result.min_distance for result in self._shapes_data.distanceResults])

    def _bodies(self, k: int) -> str:
        """The two of pair `k`."""
        pair = self._shapes.collisionPairs[k]
        return " and ".join(self._shapes.geometryObjects[i].name for i in (pair.first, pair.second))

    def problem(self, task: Task, q: np.ndarray, dq: np.ndarray, now: np.ndarray) -> tuple[str, str] | None:
        """What is wrong with being at `q` [J] rad and moving at `dq` [J] rad/s: (code, reason) or None.

        now: where the arms are, [J] rad. Whatever is already wrong there is allowed as long as it does not
        get worse, so that one can move away from an obstacle.
        """
        tcp, speed, manipulability = self.motion(q, dq)
        if (speed > task.speed_m_s).any():
            i = int(speed.argmax())
            return "speed", f"{self.arms[i]} tool at {speed[i]:.2f} m/s, limit {task.speed_m_s}"
        low, high = np.array(self.workspace.min_xyz), np.array(self.workspace.max_xyz)
        outside = np.maximum(low - tcp, tcp - high).max(axis=1)
        if outside.max() > 0 or manipulability.min() < task.manipulability:
            tcp_now, _, manipulability_now = self.motion(now, dq)
            outside_now = np.maximum(low - tcp_now, tcp_now - high).max(axis=1)
            for i, arm in enumerate(self.arms):
                if outside[i] > max(outside_now[i], 0.0) + 1e-6:
                    return "workspace", f"{arm} tool would stop {outside[i]:.3f} m outside the workspace"
                least = min(task.manipulability, manipulability_now[i] - 1e-9)
                if manipulability[i] < least:
                    return (
                        "manipulability",
                        f"{arm}: {manipulability[i]:.4f}, least {task.manipulability}: near a singularity",
                    )
        if self._too_close(task, q):
            then, before = self._distances(q), self._distances(now)
            worse = (then < self._limits) & (then < before - 1e-6)
            if worse.any():
                k = int(np.where(worse, then, np.inf).argmin())
                code = {"self": "self_collision", "arms": "arm_collision", "table": "table"}[self._group[k]]
                return code, f"{self._bodies(k)} would stop {then[k]:.3f} m apart, limit {self._limits[k]} m"
        return None

    def _too_close(self, task: Task, q: np.ndarray) -> bool:
        if self._task is not task:
            limits = dict(
                zip(GROUPS, (task.self_distance_m, task.arm_distance_m, task.table_distance_m), strict=True)
            )
            self._limits = np.array([limits[group] for group in self._group])
            for request, limit in zip(self._shapes_data.collisionRequests, self._limits, strict=True):
                request.security_margin = limit
            self._task = task
        return pin.computeCollisions(self._model, self._data, self._shapes, self._shapes_data, q, True)


def _placement(base: Base) -> pin.SE3:
    """Of an arm's link 0 in `world`."""
    return pin.SE3(pin.rpy.rpyToMatrix(0.0, 0.0, base.yaw_rad), np.array(base.xyz))


def _assemble(workcell: Workcell, arms: tuple[str, ...]) -> tuple[pin.Model, pin.GeometryModel]:
    folder = Path(find_spec("franky_sim").submodule_search_locations[0]) / "assets"
    urdf = str(folder / "fr3.urdf")
    full = pin.buildModelFromUrdf(urdf)
    shells = pin.buildGeomFromUrdf(full, urdf, pin.GeometryType.COLLISION, package_dirs=str(folder))
    for body in shells.geometryObjects:
        if isinstance(body.geometry, coal.BVHModelBase):
            body.geometry.buildConvexHull(True, "Qt")
            body.geometry = body.geometry.convex
    rest = pin.neutral(full)
    fingers = [full.getJointId(f"fr3_finger_joint{i}") for i in (1, 2)]
    for finger in fingers:
        rest[full.joints[finger].idx_q] = FINGER_OPENING_M
    arm_model, arm_shapes = pin.buildReducedModel(full, shells, fingers, rest)

    model, shapes = pin.Model(), pin.GeometryModel()
    for arm in arms:
        one, parts = arm_model.copy(), arm_shapes.copy()
        for j in range(1, one.njoints):
            one.names[j] = f"{arm}_{one.names[j]}"
        for f in range(1, one.nframes):  # 0 is the universe; a slice would be a copy
            one.frames[f].name = f"{arm}_{one.frames[f].name}"
        for body in parts.geometryObjects:
            body.name = f"{arm} {body.name.removeprefix('fr3_').rsplit('_', 1)[0]}" + (
                f" {body.name[-1]}" if "finger" in body.name else ""
            )
        model, shapes = pin.appendModel(model, one, shapes, parts, 0, _placement(workcell.arms[arm]))
    table = workcell.table
    centre = np.array(table.centre_xyz) - [0.0, 0.0, 0.5 * TABLE_THICKNESS_M]
    box = coal.Box(table.size_xy[0], table.size_xy[1], TABLE_THICKNESS_M)
    shapes.addGeometryObject(pin.GeometryObject("table", 0, 0, pin.SE3(np.eye(3), centre), box))
    return model, shapes


def _pair_up(model: pin.Model, shapes: pin.GeometryModel) -> list[str]:
    """Give `shapes` its pairs; returns each pair's group.

    Left out: bodies on the same or on neighbouring joints, links 5 and 7 (only joint 6 is between them; their
    hulls touch near its end of travel, the shells never do), and the table with the two links that stand on
    it.
    """
    bodies = shapes.geometryObjects

    def group(a, b) -> str | None:
        if "table" in (a.name, b.name):
            other = b if a.name == "table" else a
            return None if other.name.split()[1] in ("link0", "link1") else "table"
        if a.name.split()[0] != b.name.split()[0]:
            return "arms"
        if {a.name.split()[1], b.name.split()[1]} == {"link5", "link7"}:
            return None
        depth = [(body.parentJoint - 1) % 7 + 1 if body.parentJoint else 0 for body in (a, b)]
        return None if abs(depth[0] - depth[1]) <= 1 else "self"

    shapes.removeAllCollisionPairs()  # appendModel made some
    groups = []
    for i, a in enumerate(bodies):
        for k in range(i + 1, len(bodies)):
            found = group(a, bodies[k])
            if found:
                shapes.addCollisionPair(pin.CollisionPair(i, k))
                groups.append(found)
    return groups
