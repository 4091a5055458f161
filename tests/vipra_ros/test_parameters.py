"""Configuration sections as ROS parameters, on a real rclpy node."""

import pytest
import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter

from config.loading import ConfigError, load
from config.robot import PolicyClient, Robot
from vipra_ros.parameters import declare, declare_robot, declare_run_dir, revise


@pytest.fixture
def make_node():
    contexts, nodes = [], []

    def make(*overrides: str) -> Node:
        args = ["--ros-args", *(word for o in overrides for word in ("-p", o))]
        contexts.append(Context())
        rclpy.init(args=args, context=contexts[-1], domain_id=69)
        nodes.append(Node("parameters_under_test", context=contexts[-1], start_parameter_services=False))
        return nodes[-1]

    yield make
    for node in nodes:
        node.destroy_node()
    for context in contexts:
        context.shutdown()


def test_without_overrides_the_model_is_returned_unchanged_and_fully_declared(make_node):
    node = make_node()
    assert declare(node, PolicyClient(), "policy") == PolicyClient()
    declared = {name.removeprefix("policy.") for name in node.get_parameters_by_prefix("policy")}
    assert declared == set(PolicyClient.model_fields)


def test_command_line_overrides_reach_the_model_and_the_parameter(make_node):
    node = make_node(
        "policy.action_rate_hz:=10", "policy.replan_after:=14", "policy.jpeg_quality:=80", "policy.task:=fold"
    )
    model = declare(node, PolicyClient(), "policy")
    assert (model.action_rate_hz, model.replan_after, model.jpeg_quality, model.task) == (
        10.0,
        14,
        80,
        "fold",
    )
    assert node.get_parameter("policy.action_rate_hz").value == 10.0
    assert node.get_parameter("policy.action_rate_hz").type_ == Parameter.Type.DOUBLE


def test_the_empty_string_is_null_where_null_is_allowed(make_node):
    model = declare(make_node("policy.jpeg_quality:=''"), PolicyClient(jpeg_quality=90), "policy")
    assert model.jpeg_quality is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.action_rate_hz:=30.0", ["policy.action_rate_hz", "22", "30.0"]),
        ("policy.replan_after:=8", ["policy.replan_after", "7 or 14", "8"]),
        ("policy.mode:=fast", ["policy.mode", "synchronous", "fast"]),
        ("policy.task:=12", ["policy.task", "string", "12"]),
        ("policy.action_rate_hz:=.nan", ["policy.action_rate_hz", "nan"]),
    ],
)
def test_a_wrong_override_is_one_line_with_parameter_value_and_fix(make_node, override, words):
    with pytest.raises(ConfigError) as error:
        declare(make_node(override), PolicyClient(), "policy")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_descriptors_carry_sentence_range_and_choices(make_node):
    node = make_node()
    declare(node, PolicyClient(), "policy", writable=["task"])
    rate = node.describe_parameter("policy.action_rate_hz")
    assert rate.description == "executed actions per second; > 0, <= 22"
    assert rate.floating_point_range[0].to_value == 22.0 and rate.read_only
    assert "one of 7, 14" in node.describe_parameter("policy.replan_after").description
    assert "empty: null" in node.describe_parameter("policy.jpeg_quality").description
    assert not node.describe_parameter("policy.task").read_only


def test_writable_parameters_are_checked_again_by_revise(make_node):
    node = make_node()
    model = declare(node, PolicyClient(), "policy", writable=["task"])
    changed = revise(
        model, "policy", [Parameter("policy.task", value="fold the cloth"), Parameter("other", value=1)]
    )
    assert changed.task == "fold the cloth"
    with pytest.raises(ConfigError, match=r"policy.task.*512"):
        revise(model, "policy", [Parameter("policy.task", value="x" * 513)])


def test_arms_become_dotted_names_and_tuples_arrays(make_node):
    node = make_node(
        "arms.left.hostname:=172.16.0.2", "arms.right.home_rad:=[0.0, 0.0, 0.0, -1.5, 0.0, 1.5, 0.0]"
    )
    robot = declare_robot(node, ["arms", "control", "simulation"])
    assert robot.arms["left"].hostname == "172.16.0.2"
    assert robot.arms["right"].home_rad == (0.0, 0.0, 0.0, -1.5, 0.0, 1.5, 0.0)
    assert robot.arms["right"].hostname == load(Robot, "sim_bimanual").arms["right"].hostname
    assert node.get_parameter("arms.left.home_rad").type_ == Parameter.Type.DOUBLE_ARRAY
    assert not node.has_parameter("camera.source")


def test_arrays_of_the_wrong_length_are_refused(make_node):
    with pytest.raises(ConfigError, match=r"arms.left.home_rad"):
        declare_robot(make_node("arms.left.home_rad:=[0.0, 1.0]"), ["arms"])


def test_rules_between_fields_and_sections_hold_after_overrides(make_node):
    with pytest.raises(ConfigError, match=r"deadman_timeout_s must be at least twice"):
        declare_robot(make_node("control.deadman_timeout_s:=0.05"), ["control"])


def test_an_unknown_robot_lists_the_known_ones(make_node):
    with pytest.raises(ConfigError, match=r"known robots:.*sim_bimanual"):
        declare_robot(make_node("robot:=nonesuch"), ["camera"])


def test_run_dir_is_made_and_empty_means_none(make_node, tmp_path):
    assert declare_run_dir(make_node()) is None
    folder = tmp_path / "a" / "b"
    assert declare_run_dir(make_node(f"run_dir:={folder}")) == folder
    assert folder.is_dir()
