"""Kinematics, distances and what counts as a problem, on the real meshes."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pinocchio as pin
import pytest

from config.loading import load
from config.safety import Safety
from config.workcell import Workcell
from vipra_ros.safety.collision import GROUPS, Geometry
from vipra_ros.safety.limits import JointLimits

SAFETY = load(Safety, "fr3")
TASK = SAFETY.task
READY = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398])
BOTH = np.tile(READY, 2)
STILL = np.zeros(14)


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return Geometry(load(Workcell, "bimanual"), ("left", "right"))


def with_joints(**changes) -> np.ndarray:
    """The ready pose of both arms with some joints changed: left4=-1.0."""
    q = BOTH.copy()
    for name, value in changes.items():
        q[7 * (name[:-1] == "right") + int(name[-1]) - 1] = value
    return q


def test_tool_centre_points_stand_where_the_bases_and_the_datasheet_put_them(geometry):
    workcell = load(Workcell, "bimanual")
    reach, height = 0.3069, 0.4869  # m, Franka's ready pose with the hand
    for i, arm in enumerate(("left", "right")):
        base = workcell.arms[arm]
        turn = np.array([np.cos(base.yaw_rad), np.sin(base.yaw_rad), 0.0])
        expected = np.array(base.xyz) + reach * turn + [0.0, 0.0, height]
        np.testing.assert_allclose(geometry.tcp(BOTH)[i], expected, atol=2e-4)


def test_speed_is_that_of_the_tool_centre_point(geometry):
    rng = np.random.default_rng(0)
    dq, dt = rng.normal(0, 0.5, 14), 1e-6
    _, speed, _ = geometry.motion(BOTH, dq)
    moved = geometry.tcp(BOTH + dq * dt) - geometry.tcp(BOTH)
    np.testing.assert_allclose(speed, np.linalg.norm(moved, axis=1) / dt, rtol=1e-4)


def test_every_pair_that_can_meet_is_looked_at(geometry):
    assert geometry.pairs > 300
    assert set(geometry.distances(BOTH)) == set(GROUPS)
    assert geometry.problem(TASK, BOTH, STILL, BOTH) is None


def test_excluded_pairs_are_the_only_ones_that_always_touch(geometry):
    """Over random poses no pair is too close more often than an obstacle would be."""
    limits, rng, close = JointLimits.of(SAFETY, 2), np.random.default_rng(0), {}
    for _ in range(200):
        for group, (distance, bodies) in geometry.distances(
            rng.uniform(limits.soft_min, limits.soft_max)
        ).items():
            if group == "self" and distance < TASK.self_distance_m:
                close[bodies] = close.get(bodies, 0) + 1
    assert max(close.values(), default=0) < 20, close


def test_hulls_are_never_further_apart_than_the_meshes(geometry):
    folder = Path(find_spec("franky_sim").submodule_search_locations[0]) / "assets"
    urdf = str(folder / "fr3.urdf")
    model = pin.buildModelFromUrdf(urdf)
    meshes = pin.buildGeomFromUrdf(model, urdf, pin.GeometryType.COLLISION, package_dirs=str(folder))
    names = [body.name for body in meshes.geometryObjects]
    pair = pin.CollisionPair(names.index("fr3_link0_0"), names.index("fr3_hand_0"))
    meshes.addCollisionPair(pair)
    data, shapes = model.createData(), pin.GeometryData(meshes)
    limits, rng = JointLimits.of(SAFETY, 1), np.random.default_rng(1)
    for _ in range(5):
        q = rng.uniform(limits.soft_min, limits.soft_max)
        pin.computeDistances(model, data, meshes, shapes, np.r_[q, 0.04, 0.04])
        exact = shapes.distanceResults[0].min_distance
        assert geometry.distances(np.r_[q, READY])["self"][0] <= exact + 1e-6


def test_the_arms_may_not_meet(geometry):
    before = with_joints(left1=0.0, right1=0.0)
    after = with_joints(left1=-0.75, right1=0.75)
    code, _ = geometry.problem(TASK, after, STILL, before)
    assert code in ("arm_collision", "workspace")
    between = [with_joints(left1=-a, right1=a) for a in np.linspace(0, 0.75, 40)]
    codes = [geometry.problem(TASK, q, STILL, between[0]) for q in between]
    first = next(c for c in codes if c)
    assert (
        first[0] == "arm_collision"
        and "left" in first[1]
        and "right" in first[1]
        and "limit 0.03 m" in first[1]
    )


def test_the_table_is_solid(geometry):
    down = with_joints(left2=0.8, left4=-1.9, left6=2.7)
    codes = []
    for u in np.linspace(0, 1, 60):
        found = geometry.problem(TASK, BOTH + u * (down - BOTH), STILL, BOTH)
        codes.append(found[0] if found else None)
    assert codes[0] is None
    assert {"table", "workspace"} & set(codes)
    low = Geometry(load(Workcell, "bimanual").model_copy(update={"workspace": _huge()}), ("left", "right"))
    codes = [low.problem(TASK, BOTH + u * (down - BOTH), STILL, BOTH) for u in np.linspace(0, 1, 60)]
    first = next(c for c in codes if c)
    assert first[0] == "table" and "table" in first[1]


def _huge():
    return load(Workcell, "bimanual").workspace.model_copy(
        update={"min_xyz": (-9.0,) * 3, "max_xyz": (9.0,) * 3}
    )


def test_an_arm_may_not_fold_into_itself(geometry):
    folded = with_joints(left2=-1.6, left4=-2.9, left6=0.7)
    found = geometry.distances(folded)["self"]
    assert found[0] < TASK.self_distance_m and "left" in found[1]


def test_leaving_the_workspace_is_a_problem_and_returning_is_none(geometry):
    outside = with_joints(left4=-1.2, left2=-0.3)
    code, reason = geometry.problem(TASK, outside, STILL, BOTH)
    assert code == "workspace" and "left" in reason
    assert geometry.problem(TASK, outside, STILL, outside) is None, "resting there is allowed"
    back = outside + 0.1 * (BOTH - outside)
    assert geometry.problem(TASK, back, STILL, outside) is None
    further = outside - 0.1 * (BOTH - outside)
    assert geometry.problem(TASK, further, STILL, outside)[0] == "workspace"


def test_moving_apart_is_allowed_where_moving_closer_is_not(geometry):
    angles = np.linspace(0, 0.75, 200)
    close = next(a for a in angles if geometry.distances(with_joints(left1=-a, right1=a))["arms"][0] < 0.025)
    now = with_joints(left1=-close, right1=close)
    assert geometry.problem(TASK, now, STILL, now) is None
    assert geometry.problem(TASK, with_joints(left1=-close + 0.01, right1=close), STILL, now) is None
    assert (
        geometry.problem(TASK, with_joints(left1=-close - 0.01, right1=close), STILL, now)[0]
        == "arm_collision"
    )


def test_what_is_too_close_already_lets_nothing_else_come_close(geometry):
    """The left fingers are in the table, as after hand-guiding: the right ones may not follow them there."""
    deep = next(
        a
        for a in np.arange(-0.785, 1.0, 0.002)
        if geometry.distances(with_joints(left2=a))["table"][0] < -0.01
    )
    near = next(
        a
        for a in np.arange(-0.785, 1.0, 0.002)
        if geometry.distances(with_joints(right2=a))["table"][0] < 0.003
    )
    now = with_joints(left2=deep, right2=near)
    code, text = geometry.problem(TASK, with_joints(left2=deep, right2=near + 0.006), STILL, now)
    assert code == "table" and "right" in text
    assert geometry.problem(TASK, with_joints(left2=deep - 0.01, right2=near), STILL, now) is None, (
        "leads out"
    )


def test_a_fast_tool_and_a_stretched_arm_are_problems(geometry):
    fast = STILL.copy()
    fast[1], fast[3] = 2.3, -2.3
    assert geometry.problem(TASK, BOTH, fast, BOTH)[0] == "speed"
    stretched = with_joints(left2=0.2, left4=-0.3, left6=1.8)
    wide = Geometry(load(Workcell, "bimanual").model_copy(update={"workspace": _huge()}), ("left", "right"))
    code, reason = wide.problem(TASK, stretched, STILL, BOTH)
    assert code == "manipulability" and "left" in reason
    near = [with_joints(left2=0.2, left4=-0.3 + d, left6=1.8) for d in (-0.02, 0.02)]
    worse, better = sorted(near, key=lambda q: wide.motion(q, STILL)[2][0])
    assert wide.problem(TASK, worse, STILL, stretched)[0] == "manipulability"
    assert wide.problem(TASK, better, STILL, stretched) is None, "away from the singularity is allowed"


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="no arm"):
        Geometry(load(Workcell, "bimanual"), ("middle",))


def test_a_single_arm_has_no_other_arm_to_meet():
    workcell = load(Workcell, "single")
    geometry = Geometry(workcell, tuple(workcell.arms))
    assert set(geometry.distances(READY)) == {"self", "table"}
    assert geometry.problem(TASK, READY, np.zeros(7), READY) is None
