"""The scene: clear at home, the same for a seed, and its objects can be handled."""

import mujoco
import numpy as np
import pytest
from franky_sim.franka_robot_state import FrankaRobotState

from config.loading import load
from config.workcell import Workcell
from simulation.arm import Arm
from simulation.workcell import HOME, build, place_props, signature, strip_visuals


def _physics(name: str):
    workcell = load(Workcell, name)
    sim = build(workcell, robot_class=Arm)
    strip_visuals(sim.scene)
    sim.start()
    return workcell, sim


@pytest.mark.parametrize("name", ["bimanual", "single"])
def test_home_is_clear_of_everything(name):
    workcell, sim = _physics(name)
    model, data = sim.model, sim.data
    place_props(model, data, workcell, 0)
    model.geom_margin[:] = 0.05  # contacts are then reported from 10 cm
    mujoco.mj_forward(model, data)
    roots = [model.body(model.body_rootid[b]).name for b in range(model.nbody)]
    for contact in data.contact[: data.ncon]:
        bodies = [int(model.geom_bodyid[g]) for g in contact.geom]
        arms = {roots[b] for b in bodies if roots[b].startswith("robot")}
        assert not arms or len({roots[b] for b in bodies}) == 1, [model.body(b).name for b in bodies]


@pytest.mark.parametrize("name", ["bimanual", "single"])
def test_every_object_stands_on_the_table_apart_from_the_others_for_any_seed(name):
    workcell, sim = _physics(name)
    top = workcell.table.centre_xyz[2]
    reach = {prop.name: 0.085 if prop.kind == "bowl" else 0.04 for prop in workcell.props}
    for seed in range(50):
        place_props(sim.model, sim.data, workcell, seed)
        mujoco.mj_forward(sim.model, sim.data)
        places = {p.name: sim.data.body(p.name).xpos.copy() for p in workcell.props}
        for a, place in places.items():
            assert abs(place[2] - top) < 0.002
            assert (np.array(workcell.workspace.min_xyz[:2]) < place[:2]).all()
            assert (place[:2] < np.array(workcell.workspace.max_xyz[:2])).all()
            for b, other in places.items():
                assert a == b or np.linalg.norm(place - other) > reach[a] + reach[b], (seed, a, b)


def test_objects_stay_where_they_are_put():
    workcell, sim = _physics("bimanual")
    place_props(sim.model, sim.data, workcell, 5)
    mujoco.mj_forward(sim.model, sim.data)
    before = {p.name: sim.data.body(p.name).xpos.copy() for p in workcell.props}
    _hold(sim, 1500)
    for name, place in before.items():
        assert np.linalg.norm(sim.data.body(name).xpos - place) < 0.002, name


def test_the_same_seed_gives_the_same_poses_bit_for_bit():
    workcell, sim = _physics("bimanual")

    def poses(seed):
        place_props(sim.model, sim.data, workcell, seed)
        return sim.data.qpos.copy()

    np.testing.assert_array_equal(poses(4), poses(4))
    assert not np.array_equal(poses(4), poses(5))


def test_bases_stand_where_the_configuration_says():
    workcell, sim = _physics("bimanual")
    for robot, base in zip(sim.robots, workcell.arms.values(), strict=True):
        body = sim.data.body(robot.base_body)
        np.testing.assert_allclose(body.xpos, base.xyz, atol=1e-9)
        yaw = np.arctan2(body.xmat[3], body.xmat[0])
        np.testing.assert_allclose(yaw, base.yaw_rad, atol=1e-6)


def test_a_cup_can_be_grasped_by_friction_and_lifted():
    workcell, sim = _physics("bimanual")
    place_props(sim.model, sim.data, workcell, 0)
    mujoco.mj_forward(sim.model, sim.data)
    arm, base = sim.robots[1], list(workcell.arms.values())[1]
    cup = sim.data.body("red_cup").xpos.copy()
    above, at = np.add(cup, (0.0, 0.0, 0.20)), np.add(cup, (0.0, 0.0, 0.06))
    q = np.array(HOME)
    for goal, width, ticks in ((above, 0.08, 1500), (at, 0.08, 1200), (at, 0.0, 600), (above, 0.0, 1500)):
        arm.set_hand_goal(width, 0.05, 30.0)
        q = _move(sim, arm, q, _inverse(arm, q, _in_base(goal, base)), ticks)
    lifted = sim.data.body("red_cup").xpos
    assert lifted[2] - cup[2] > 0.10
    assert np.linalg.norm(lifted[:2] - cup[:2]) < 0.03


def test_state_packets_are_what_franky_sim_would_send():
    """Bytes against the original's own packing, for a state with every part different."""
    _, sim = _physics("single")
    arm = sim.robots[0]
    arm.follow(np.array(HOME) + 0.01, np.full(7, 0.1))
    sim.step()
    tau_ext, wrench = np.arange(7.0), np.arange(6.0) + 10
    ours = np.frombuffer(arm.numbers(tau_ext, wrench, idle=False), "<f4")
    full = FrankaRobotState().pack_state()
    assert 4 * len(ours) == len(full) - struct_tail()
    q, dq = arm.joints()
    named = FrankaRobotState(
        q=tuple(q),
        dq=tuple(dq),
        q_d=tuple(np.array(HOME) + 0.01),
        dq_d=(0.1,) * 7,
        O_T_EE=arm.to_franka_pose(arm.kinematics(q)),
        tau_J=tuple(arm.applied_tau),
        tau_J_d=tuple(arm.commanded_tau),
        tau_ext_hat_filtered=tuple(tau_ext),
        O_F_ext_hat_K=tuple(wrench),
        theta=tuple(q),
        dtheta=tuple(dq),
        m_ee=0.73,
    )
    theirs = np.frombuffer(named.pack_state()[: 4 * len(ours)], "<f4")
    # Fields that `named` sets sit at the same places; markers are unlikely to agree by chance.
    for values in (q, dq, tau_ext, wrench, arm.applied_tau, arm.to_franka_pose(arm.kinematics(q))):
        pattern = np.asarray(values, "<f4")
        places = [i for i in range(len(theirs)) if np.array_equal(theirs[i : i + len(pattern)], pattern)]
        assert places, "the original carries it"
        for i in places:
            np.testing.assert_array_equal(ours[i : i + len(pattern)], pattern)


def struct_tail() -> int:
    """Bytes after the floats: two modes, 2 x 41 flags, robot mode, success rate."""
    return 2 + 82 + 1 + 4


def test_the_layout_signature_depends_on_the_workcell():
    (_, one), (_, two) = _physics("single"), _physics("bimanual")
    assert signature(one.model) != signature(two.model)


def _hold(sim, ticks: int) -> None:
    targets = [robot.joints()[0].copy() for robot in sim.robots]
    for _ in range(ticks):
        for robot, q in zip(sim.robots, targets, strict=True):
            robot.follow(q, np.zeros(7))
        sim.step()


def _in_base(point: np.ndarray, base) -> np.ndarray:
    c, s = np.cos(base.yaw_rad), np.sin(base.yaw_rad)
    x, y, z = point - base.xyz
    return np.array([c * x + s * y, -s * x + c * y, z])


def _inverse(arm, q: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Joints that put the tool at `goal` (base frame) with the orientation it has at home."""
    import pinocchio as pin

    target = pin.SE3(arm.kinematics(np.array(HOME)).rotation.copy(), goal)
    q = q.copy()
    for _ in range(100):
        error = pin.log6(arm.kinematics(q).inverse() * target)
        if np.linalg.norm(error.vector) < 1e-5:
            return q
        world = arm.kinematics(q).rotation
        twist = np.concatenate([world @ error.linear, world @ error.angular])
        jacobian = np.stack([arm.d_kinematics(q, column) for column in np.eye(7)], axis=1)
        q += 0.5 * jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), twist)
    raise AssertionError(f"{goal} not reached")


def _move(sim, arm, start: np.ndarray, end: np.ndarray, ticks: int) -> np.ndarray:
    """Minimum-jerk move of `arm`; the others hold."""
    others = [(robot, robot.joints()[0].copy()) for robot in sim.robots if robot is not arm]
    for k in range(ticks):
        s = (k + 1) / ticks
        share, rate = s**3 * (10 - 15 * s + 6 * s * s), 30 * s * s * (1 - s) ** 2 / (ticks * 0.001)
        arm.follow(start + share * (end - start), rate * (end - start))
        for robot, q in others:
            robot.follow(q, np.zeros(7))
        sim.step()
    return end
