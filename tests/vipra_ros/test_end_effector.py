"""End-effector steps move the tool as they say, and pass the same checks as joints. Kinematic arm, no ROS."""

import re

import numpy as np
import pytest

from benchmarks.standin import StandIn
from config.embodiment import Embodiment
from config.loading import ConfigError, load, parse
from config.robot import PolicyClient as PolicyConfig
from config.robot import Robot as RobotConfig
from config.safety import Safety
from config.workcell import Workcell
from policy_server.protocol import Chunk as Answer
from tests.vipra_ros.stepped import Robot
from vipra_ros.commander import State
from vipra_ros.execution.cartesian import joint_path
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.robot.executor import State as ArmsState
from vipra_ros.safety.collision import Geometry
from vipra_ros.safety.limits import JointLimits

BODY, SAFETY, CELL = load(Embodiment, "franka_delta"), load(Safety, "fr3"), load(Workcell, "single")
HOME = np.array(load(RobotConfig, "sim_single").arms["right"].home_rad)
SIZE = (48, 64)


class Steps:
    """A policy that answers every request `latency_s` later with the same step, 14 times."""

    def __init__(self, step, latency_s: float = 0.1):
        self.metadata = StandIn("franka_delta", image_size=SIZE).metadata
        self.step, self.latency_s, self.robot = np.asarray(step, np.float32), latency_s, None
        self._due, self._seq = [], 0

    def hello(self, timeout_s):
        return self.metadata

    def submit(self, pictures, task, t_obs, seed, state, deadline_ms):
        assert state is None  # the policy sees no joints
        self._seq += 1
        answer = Answer(session="s", seq=self._seq, t_obs=t_obs, actions=np.tile(self.step, (14, 1)))
        self._due.append((self.robot.t + self.latency_s, answer))
        return self._seq

    def poll(self):
        due = [a for at, a in self._due if at <= self.robot.t]
        self._due = [(at, a) for at, a in self._due if at > self.robot.t]
        return due

    def cancel(self, seq):
        pass


def play(step, seconds: float, **policy) -> Robot:
    client = Steps(step)
    config = PolicyConfig(task="go", action_rate_hz=15.0, **policy)
    robot = Robot(BODY, SAFETY, CELL, HOME, client, config, lambda t: np.zeros((*SIZE, 3), np.uint8))
    client.robot = robot
    robot.commander.start()
    return robot.run(seconds)


def tools(robot: Robot) -> tuple[np.ndarray, np.ndarray]:
    """Tool [T, 3] m along the way and its last rotation against the first one."""
    geometry = Geometry(CELL, ("right",))
    found = [geometry.tools(q)[0] for _, q in robot.arms["right"].told[::20]]
    return np.array([p for p, _, _ in found]), found[-1][1] @ found[0][1].T


@pytest.mark.parametrize("anchor", ["observation", "append"])
def test_steps_move_the_tool_at_their_speed_and_in_their_direction(anchor):
    robot = play([0.0, 0.004, 0.0, 0, 0, 0, 1.0], 3.0, anchor=anchor)
    assert robot.commander.state is State.RUNNING and robot.executor.state is ArmsState.RUNNING
    assert robot.commander.counts.refused == 0 and len(robot.chunks) > 3
    path, turned = tools(robot)
    times = np.array([t for t, _ in robot.arms["right"].told[::20]])
    middle = (times > 101.0) & (times < 103.0)
    speed = np.polyfit(times[middle], path[middle], 1)[0]
    np.testing.assert_allclose(speed, [0.0, 0.06, 0.0], atol=0.003)  # 4 mm, 15 times a second
    assert np.abs(path[:, [0, 2]] - path[0, [0, 2]]).max() < 0.002
    np.testing.assert_allclose(turned, np.eye(3), atol=0.01)


def test_a_gripper_dimension_closes_the_hand():
    robot = play([0, 0, 0, 0, 0, 0, 0.0], 1.0)
    assert robot.hands["right"].opening == 0.0
    np.testing.assert_allclose(robot.arms["right"].q, HOME, atol=1e-3)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ([0.006, 0, -0.01, 0, 0, 0, 1.0], r"finger.* and table would stop"),
        ([0, 0, 0.0, 0, 0, 0.2, 1.0], r"the right arm comes no closer"),  # joint 7's soft limit
        ([0.06, 0, 0, 0, 0, 0, 1.0], r"the right arm comes no closer"),  # out of reach
    ],
)
def test_what_is_unsafe_as_joints_is_unsafe_as_steps(step, why):
    robot = play(step, 5.0)
    assert robot.commander.state is State.STOPPED
    assert re.search(why, robot.commander.reason), robot.commander.reason
    limits, q = JointLimits.of(SAFETY, 1), np.array([q for _, q in robot.arms["right"].told])
    assert (q >= limits.soft_min - 1e-9).all() and (q <= limits.soft_max + 1e-9).all()
    geometry = Geometry(CELL, ("right",))
    assert all(geometry.distances(row)["table"][0] > 0 for row in q[::25])
    assert robot.executor.state is not ArmsState.FAULT


def test_joints_after_steps_are_where_the_steps_lead():
    geometry, limits = Geometry(CELL, ("right",)), JointLimits.of(SAFETY, 1)
    rng = np.random.default_rng(0)
    steps = rng.uniform(-1, 1, (14, 1, 6)) * [0.02, 0.02, 0.02, 0.1, 0.1, 0.1]
    path = joint_path(geometry, HOME, steps, limits.soft_min, limits.soft_max)
    before = geometry.tools(HOME)[0]
    for q, step in zip(path, steps[:, 0], strict=True):
        after = geometry.tools(q)[0]
        np.testing.assert_allclose(after[0] - before[0], step[:3], atol=5e-4)
        turned = after[1] @ before[1].T  # about the base's axes
        np.testing.assert_allclose(
            [turned[2, 1] - turned[1, 2], turned[0, 2] - turned[2, 0], turned[1, 0] - turned[0, 1]],
            2 * step[3:] * np.sinc(np.linalg.norm(step[3:]) / np.pi),
            atol=4e-3,
        )
        before = after


def test_steps_are_never_taken_for_joints():
    with pytest.raises(Rejected, match="franka_delta commands end_effector_deltas") as refused:
        Chunk.from_actions(0, 0.0, 15.0, np.zeros((14, 7)), BODY)
    assert refused.value.code == "units"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dimensions": "kinds"}, "right_fr3_x is a joint: action_space end_effector_deltas has translation"),
        ({"dimensions": "order"}, "arm right has translation, translation, rotation"),
        ({"dimensions": "twice"}, "right_fr3_x occurs twice"),
        ({"dimensions": "limits"}, "right_fr3_x: a step needs low and high, m/action"),
        ({"dimensions": "range"}, "low 0.1 must be below high 0.1"),
        ({"dimensions": "opening"}, "an opening is always 0 to 1"),
        ({"action_space": "velocities"}, "my.yaml: action_space: Input should be"),
        ({"rate": 15}, "my.yaml: rate: unknown key"),
        ({"action_space": "absolute_joints"}, "right_fr3_x is a translation: action_space absolute_joints"),
    ],
)
def test_an_impossible_embodiment_names_file_key_and_fix(change, word):
    data = BODY.model_dump(exclude_none=True) | {k: v for k, v in change.items() if k != "dimensions"}
    d = data["dimensions"] = [dict(one) for one in data["dimensions"]]
    match change.get("dimensions"):
        case "kinds":
            d[0]["kind"] = "joint"
        case "order":
            d[2], d[3] = d[3], d[2]
        case "twice":
            d[1]["name"] = d[0]["name"]
        case "limits":
            del d[0]["low"], d[0]["high"]
        case "range":
            d[0]["low"] = d[0]["high"] = 0.1
        case "opening":
            d[6] |= {"low": 0.0, "high": 1.0}
    with pytest.raises(ConfigError, match=r"my\.yaml") as error:
        parse(Embodiment, data, "my.yaml")
    assert word in str(error.value)
