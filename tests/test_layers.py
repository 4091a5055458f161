"""Imports go one way, and a machine needs only what its role needs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_imports_go_one_way():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


HEAVY = ("torch", "rclpy", "mujoco", "franky", "pinocchio", "coal", "cv2", "av", "matplotlib", "zmq", "numpy")


@pytest.mark.parametrize(
    ("module", "light"),
    [
        ("vipra_ros.cli", HEAVY),
        ("vipra_ros.bringup", HEAVY),
        ("vipra_ros.process", HEAVY),
        ("policy_server.client", ("torch", "rclpy", "mujoco", "franky")),
        ("policy_server.server", ("rclpy", "mujoco", "franky")),
        ("simulation.server", ("torch", "rclpy")),
        ("vipra_ros.nodes.camera", ("torch", "triton", "diffusers")),
        ("vipra_ros.nodes.arms", ("torch", "triton", "diffusers", "mujoco")),
        ("vipra_ros.nodes.policy", ("torch", "triton", "diffusers", "mujoco")),
        ("vipra_ros.nodes.teleop", ("torch", "triton", "diffusers", "mujoco")),
        ("vipra_ros.nodes.recorder", ("torch", "triton", "diffusers", "mujoco")),
    ],
)
def test_module_pulls_in_nothing_its_machine_lacks(module, light):
    code = f"import sys, {module}; print(*[m for m in {light!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
