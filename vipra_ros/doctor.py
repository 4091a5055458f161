"""`vipra doctor`: is everything this machine needs there? Each thing ok, or the fix.

Imports of the things checked happen in processes of their own: a broken one cannot take the check down, and
MuJoCo's renderer and torch never meet.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from config.embodiment import Embodiment
from config.loading import ConfigError, find, load, root
from config.policy import Policy
from config.robot import Robot
from config.workcell import Workcell
from vipra_ros import bringup
from vipra_ros.process import ProcessError, port_is_free, reserve_slot

Role = Literal["robot", "server", "all"]
FCI_PORT = 1337
DESK_PORT = 443  # the robot's web page: reachable without taking the one FCI connection
OLDEST_PYTHON = (3, 11)
DISK_GB = 5.0
SHM_MB = 64


@dataclass(frozen=True)
class Check:
    """`ok`; `fix`: something needed is missing; `note`: worth knowing, nothing is broken."""

    name: str
    state: Literal["ok", "fix", "note"]
    found: str
    fix: str = ""


def run(robot: str = "sim_bimanual", server: str = "", role: Role = "all") -> int:
    """Print every check; 1 if one of them needs a fix."""
    console = Console(highlight=False)
    colours = {"ok": "green", "fix": "bold red", "note": "yellow"}
    broken = 0
    for check in checks(robot, server, role):
        broken += check.state == "fix"
        console.print(f"[{colours[check.state]}]{check.state:5}[/] {check.name:18} ", end="")
        console.print(check.found, markup=False, soft_wrap=True)
        if check.fix:
            console.print(f"{'':25}-> {check.fix}", markup=False, soft_wrap=True)
    console.print(f"\n{broken} to fix" if broken else "\neverything needed is there")
    return 1 if broken else 0


def checks(robot_name: str, server: str, role: Role) -> Iterator[Check]:
    """The checks for a machine of this role, as they are made."""
    yield python()
    robot, check = configuration(robot_name)
    yield check
    yield disk()
    if role in ("server", "all"):
        yield from serving()
    if robot is None or role == "server":
        return
    yield package("ROS 2", "ros-rclpy", "rclpy", "robot")
    yield dds()
    yield franky()
    yield package("collision checks", "coal", "coal", "robot")
    yield video()
    yield zed(robot)
    if robot.simulation:
        yield package("simulator", "franky-sim", "franky_sim", "sim")
        yield rendering(robot)
        yield shared_memory()
        yield fci_ports(robot)
    else:
        yield workcell(robot)
        yield realtime_kernel()
        yield realtime_priority()
        for name, arm in robot.arms.items():
            yield reachable(
                f"{name} arm",
                arm.hostname,
                DESK_PORT,
                "switch it on and check its cable and this PC's address",
            )
    yield policy_server(server or robot.policy.server, robot)


def python() -> Check:
    found = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Check("Python", "fix", found, "use Python 3.11 or 3.12: make PYTHON=python3.12 .venv")
    return Check("Python", "ok", found)


def configuration(name: str) -> tuple[Robot | None, Check]:
    """Robot, embodiment, workcell and limits can be read and belong together."""
    try:
        robot = load(Robot, name)
        bringup.check_files(robot, name)
    except ConfigError as error:
        return None, Check(
            "configuration", "fix", str(error), "correct the file, or name another with --robot"
        )
    return robot, Check("configuration", "ok", str(find(Robot.KIND, name)))


def workcell(robot: Robot) -> Check:
    """Which file says where the arms stand; the shipped one is nobody's."""
    path = find(Workcell.KIND, robot.workcell)
    if path.is_relative_to(root() / "config"):
        fix = f"measure yours: copy it beside the robot's file and name it there, workcell: {path.name}"
        return Check("workcell", "note", f"{path}, as shipped", fix)
    return Check("workcell", "ok", str(path))


def disk(folder: Path | None = None) -> Check:
    free = shutil.disk_usage(folder or Path.cwd()).free / 1e9
    if free < DISK_GB:
        return Check(
            "disk", "fix", f"{free:.1f} GB free here", f"free {DISK_GB:g} GB: runs and checkpoints need them"
        )
    return Check("disk", "ok", f"{free:.0f} GB free here")


def package(name: str, distribution: str, module: str, extra: str) -> Check:
    """The distribution is installed and its module imports."""
    code = f"import {module}"
    done = _python(code)
    install = f"pip install 'vipra_ros[{extra}]' (in the checkout: make .venv)"
    if done.returncode:
        return Check(name, "fix", f"{module} does not import: {_last(done.stderr)}", install)
    return Check(name, "ok", f"{distribution} {_version(distribution)}")


def serving() -> Iterator[Check]:
    """What a policy server needs."""
    if _version("torch") is None:
        yield Check("torch", "fix", "not installed", "pip install 'vipra_ros[server]'")
    else:
        yield Check("torch", "ok", _version("torch"))
    yield gpu()
    for path in sorted((root() / "config" / "policies").glob("*.yaml")):
        try:
            folder = Path(load(Policy, path.stem).checkpoint).expanduser()
        except ConfigError as error:
            yield Check("policy", "fix", str(error), "correct the file")
            continue
        folder = folder if folder.is_absolute() else root() / folder
        if (folder / "config.json").is_file():
            yield Check("policy", "ok", f"{path.stem}: {folder}")
        else:
            fix = "bring the checkpoint there, or make one of random weights: vipra init-checkpoint --help"
            yield Check("policy", "note", f"{path.stem}: no checkpoint at {folder}", fix)


def gpu() -> Check:
    """A GPU that torch can use. None is fine for the small policies."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return Check("GPU", "note", "none: small policies run on the CPU, 7B needs one", "")
    if listed.returncode:
        return Check(
            "GPU", "fix", _last(listed.stdout + listed.stderr), "install the NVIDIA driver and reboot"
        )
    found = "; ".join(listed.stdout.strip().splitlines())
    done = _python("import torch; print(torch.cuda.is_available(), torch.version.cuda)")
    if done.stdout.split()[:1] != ["True"]:
        return Check(
            "GPU",
            "fix",
            f"{found}, but torch cannot use it",
            "update the driver, or install torch for its CUDA version",
        )
    return Check("GPU", "ok", f"{found}, CUDA {done.stdout.split()[1]}")


def dds() -> Check:
    """A message goes from one participant to another on this machine."""
    try:
        slot = reserve_slot()
    except ProcessError as error:
        return Check("DDS", "fix", str(error), "stop other ROS runs")
    try:
        done = _python(_DDS, ROS_DOMAIN_ID=str(slot.domain), ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
    finally:
        slot.release()
    if done.returncode:
        fix = "check firewall rules for UDP on lo and multicast, and RMW_IMPLEMENTATION (rmw_fastrtps_cpp)"
        return Check("DDS", "fix", f"no message came through: {_last(done.stderr)}", fix)
    reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "not set: vipra uses LOCALHOST")
    domain = os.environ.get("ROS_DOMAIN_ID", "0")
    return Check("DDS", "ok", f"{done.stdout.strip()}; domain {domain}, discovery range {reach}")


_DDS = """
import time, rclpy
from std_msgs.msg import String
rclpy.init()
node, got = rclpy.create_node("vipra_doctor"), []
publisher = node.create_publisher(String, "doctor", 1)
node.create_subscription(String, "doctor", got.append, 1)
end = time.monotonic() + 10
while not got and time.monotonic() < end:
    publisher.publish(String(data="x"))
    rclpy.spin_once(node, timeout_sec=0.1)
if not got:
    raise SystemExit("nothing received in 10 s")
print(rclpy.get_rmw_implementation_identifier())
"""


def franky() -> Check:
    """franky and the libfranka inside its wheel: the latter decides which robots it can talk to."""
    check = package("franky", "franky-control", "franky", "robot")
    if check.state != "ok":
        return check
    site = importlib.metadata.distribution("franky-control").locate_file("franky_control.libs")
    libraries = sorted(Path(site).glob("libfranka*.so.*"))
    version = libraries[0].name.partition(".so.")[2] if libraries else "of the system"
    return Check(
        "franky",
        "ok",
        f"{check.found}, libfranka {version} (FR3; Panda needs franky's wheel for its version)",
    )


def video() -> Check:
    """The demo's film needs an H.264 encoder."""
    done = _python("import av; av.Codec('libx264', 'w')")
    if done.returncode:
        return Check(
            "video", "fix", f"no H.264 encoder: {_last(done.stderr)}", "pip install --force-reinstall av"
        )
    return Check("video", "ok", f"av {_version('av')}, libx264")


def zed(robot: Robot) -> Check:
    """The ZED SDK and a camera, if this robot has one."""
    needed = robot.camera.source == "zed"
    done = _python(
        "import pyzed.sl as sl; d = sl.Camera.get_device_list();"
        "print(sl.Camera.get_sdk_version(), 'serial numbers', *[c.serial_number for c in d] or ['none'])"
    )
    if done.returncode:
        if not needed:
            return Check(
                "ZED SDK", "note", f"not installed; camera source {robot.camera.source} does without"
            )
        fix = "install the ZED SDK from stereolabs.com, then run its get_python_api.py in this environment"
        return Check("ZED SDK", "fix", _last(done.stderr), fix)
    if needed and "none" in done.stdout.split():
        return Check(
            "ZED SDK", "fix", f"{done.stdout.strip()}", "no camera found: use a USB 3 port, try ZED_Explorer"
        )
    return Check("ZED SDK", "ok", done.stdout.strip())


def rendering(robot: Robot) -> Check:
    """MuJoCo can render without a screen."""
    if robot.camera.source != "sim":
        return Check("rendering", "note", f"not needed: camera source {robot.camera.source}")
    done = _python(_RENDER, MUJOCO_GL="egl")
    if done.returncode:
        fix = "apt install libegl1 libgl1 libgl1-mesa-dri (make .venv does so as root)"
        return Check("rendering", "fix", f"EGL: {_last(done.stderr)}", fix)
    return Check("rendering", "ok", f"mujoco {_version('mujoco')}, EGL, {done.stdout.strip()}")


_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom size='.5' rgba='1 0 0 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 48, 64) as renderer:
    renderer.update_scene(data)
    picture = renderer.render()
    from OpenGL import GL
    print(GL.glGetString(GL.GL_RENDERER).decode())
    assert picture[24, 32, 0] > 60 and picture[24, 32, 1] < 60, "the picture is not what was drawn"
"""


def shared_memory() -> Check:
    """The simulator's state and Fast DDS live in /dev/shm."""
    try:
        free = shutil.disk_usage("/dev/shm").free / 1e6
    except OSError as error:
        return Check("shared memory", "fix", f"/dev/shm: {error.strerror}", "mount a tmpfs at /dev/shm")
    if free < SHM_MB or not os.access("/dev/shm", os.W_OK):
        fix = "in a container: --shm-size=256m or --ipc=host"
        return Check("shared memory", "fix", f"/dev/shm has {free:.0f} MB free, {SHM_MB} needed", fix)
    return Check("shared memory", "ok", f"/dev/shm, {free:.0f} MB free")


def fci_ports(robot: Robot) -> Check:
    """The simulated arms' addresses are free."""
    taken = [arm.hostname for arm in robot.arms.values() if not port_is_free(arm.hostname, FCI_PORT)]
    if taken:
        what = f"port {FCI_PORT} is in use at {', '.join(taken)}: is a simulator running?"
        return Check("ports", "note", what, "stop it, or give other addresses: left_ip:=127.78.0.1 ...")
    return Check("ports", "ok", f"{FCI_PORT} is free at {', '.join(a.hostname for a in robot.arms.values())}")


def realtime_kernel() -> Check:
    """franky's 1 kHz loop needs PREEMPT_RT on hardware."""
    realtime = Path("/sys/kernel/realtime")
    if realtime.is_file() and realtime.read_text().strip() == "1":
        return Check("real-time kernel", "ok", platform.release())
    fix = "install a PREEMPT_RT kernel (Ubuntu: pro enable realtime-kernel) and boot it; see docs/hardware.md"
    return Check("real-time kernel", "fix", f"{platform.release()} is not PREEMPT_RT", fix)


def realtime_priority() -> Check:
    """This user may ask for real-time priority and lock memory."""
    priority, _ = resource.getrlimit(resource.RLIMIT_RTPRIO)
    memory, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    if os.geteuid() == 0 or ((priority == unlimited or priority >= 80) and memory == unlimited):
        return Check("real-time limits", "ok", f"rtprio {priority}, memlock {memory}")
    fix = (
        "join group realtime with rtprio 99 and memlock unlimited in /etc/security/limits.conf, log in again"
    )
    return Check("real-time limits", "fix", f"rtprio {priority}, memlock {memory}", fix)


def reachable(name: str, host: str, port: int, fix: str) -> Check:
    """A TCP connection to `host:port` opens."""
    began = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError as error:
        return Check(name, "fix", f"{host} does not answer: {error.strerror or error}", fix)
    return Check(name, "ok", f"{host} answers in {1000 * (time.monotonic() - began):.1f} ms")


def policy_server(address: str, robot: Robot) -> Check:
    """Who listens at the policy server's address, and does its policy fit this robot?"""
    name = "policy server"
    transport, _, where = address.partition("://")
    host, _, port = where.rpartition(":")
    if transport != "tcp" or not port.isdigit():
        return Check(name, "note", f"{address}: only tcp://HOST:PORT addresses are checked")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError as error:
        if host.startswith("127.") or host == "localhost":
            return Check(
                name, "note", f"nobody serves at {address} yet", "vipra serve, or policy:=... at vipra up"
            )
        fix = "start vipra serve there, check its --bind and the firewall"
        return Check(name, "fix", f"{address} does not answer: {error.strerror or error}", fix)
    from policy_server.client import Mismatch, PolicyClient, ServerUnavailable

    embodiment = load(Embodiment, robot.embodiment)
    try:
        with PolicyClient(
            address, robot.policy.server_public_key, robot.policy.client_secret_key, embodiment=embodiment
        ) as client:
            metadata = client.hello(timeout_s=5.0)
    except (ServerUnavailable, Mismatch, ValueError) as error:
        return Check(
            name, "fix", f"{address}: {error}", "serve a policy of this robot's embodiment, with its keys"
        )
    return Check(name, "ok", f"{address}: {metadata.model}, warm latency {metadata.warm_latency_ms:.0f} ms")


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` with this interpreter; a crash or hang is an ordinary failure."""
    env = {**os.environ, **environment}
    try:
        return subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, env=env
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", "no answer within 60 s")


def _last(text: str) -> str:
    """The line of an error output that says what happened."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "crashed without a word"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
