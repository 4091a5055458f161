"""The ROS graph, described once: which processes make up a running robot, and how they are started.

`describe` turns arguments into a `Graph`. `launch/*.launch.py` render it for `ros2 launch`; `running` starts,
watches and stops the same processes where `launch` is not installed. Imports neither ROS nor `launch`.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from config.embodiment import Embodiment
from config.loading import ConfigError, Strict, load, parse
from config.recording import FIRST_SEED, Recording
from config.robot import PRESETS, Robot, safety_of
from config.teleop import Teleop
from config.workcell import Workcell
from vipra_ros.process import Child, stop_all, wait_for

Kind = Literal["bimanual", "single", "teleop", "policy_server"]
SOURCE = Path(__file__).resolve().parent.parent  # where our packages lie


class Arguments(Strict):
    """What can be said at bring-up. Empty or absent: the robot's file decides."""

    robot: str | None = Field(None, description="file in config/robots, or a path to one")
    left_ip: str | None = Field(None, description="FCI address of the left arm")
    right_ip: str | None = Field(None, description="FCI address of the right arm")
    robot_ip: str | None = Field(None, description="FCI address of the arm")
    camera: Literal["zed", "sim", "file", "uvc"] | None = Field(
        None, description="source of the front camera"
    )
    camera_path: str | None = Field(None, description="video file of camera source 'file'")
    server: str | None = Field(
        None, description="ZeroMQ address of the policy server, e.g. tcp://192.168.1.5:5555"
    )
    server_public_key: str | None = Field(None, description="file with the server's CURVE public key")
    client_secret_key: str | None = Field(None, description="file with this client's CURVE secret key")
    policy: str | None = Field(
        None,
        description="also serve this policy here (file in config/policies); empty: `server` runs already",
    )
    bind: str = Field("tcp://127.0.0.1:5555", description="ZeroMQ address to serve on")
    keys: str | None = Field(
        None, description="folder with CURVE keys (vipra keys); other machines need them"
    )
    teleop: str | None = Field(None, description="file in config/teleop, or a path to one")
    with_camera: Literal["yes", "no"] = Field("yes", description="no: only the arms and their leaders")
    task: str | None = Field(
        None, description="instruction for the policy; what is demonstrated, or a file in config/tasks"
    )
    dataset: str | None = Field(
        None, description="also record demonstrations to this folder; empty: no recorder"
    )
    first_seed: int | None = Field(
        None, description=f"the first episode's trial of a task file: {FIRST_SEED}"
    )
    target: int | None = Field(None, description="episodes the dataset shall have in the end")
    preset: Literal["3.5hz", "7hz", "22hz"] | None = Field(
        None,
        description="a protocol of the paper; rate, replan_after, mode and anchor override it",
    )
    rate: float | None = Field(None, description="executed actions per second, at most 22")
    replan_after: Literal[7, 14] | None = Field(None, description="actions of each chunk that run: 7 or 14")
    mode: Literal["asynchronous", "synchronous"] | None = Field(
        None, description="asynchronous or synchronous"
    )
    anchor: Literal["observation", "append"] | None = Field(
        None, description="asynchronous: where a chunk's time starts, observation or append"
    )
    inject_latency_ms: float | None = Field(None, description="added to every inference, for experiments")
    seed: int | None = Field(None, description="seed of the policy's noise and of the simulated scene")
    run_dir: str | None = Field(
        None,
        description="folder for the run's logs; unless given, runs/up/<time>, with ros2 launch none",
    )
    discovery: Literal["LOCALHOST", "SUBNET", "SYSTEM_DEFAULT", "OFF"] = Field(
        "LOCALHOST", description="how far ROS discovery reaches; SUBNET: other machines see the robot"
    )


_TELEOP_ARGUMENTS = ("teleop", "with_camera", "dataset", "first_seed", "target")
_ROBOT_ARGUMENTS = tuple(
    name
    for name in Arguments.model_fields
    if name not in ("left_ip", "right_ip", "robot_ip", "bind", "keys", *_TELEOP_ARGUMENTS)
)
ARGUMENTS: Mapping[Kind, tuple[str, ...]] = {
    "bimanual": ("left_ip", "right_ip", *_ROBOT_ARGUMENTS),
    "single": ("robot_ip", *_ROBOT_ARGUMENTS),
    "teleop": (
        *("robot", "left_ip", "right_ip", *_TELEOP_ARGUMENTS, "camera", "camera_path"),
        *("task", "seed", "run_dir", "discovery"),
    ),
    "policy_server": ("policy", "bind", "keys"),
}
DEFAULTS: Mapping[Kind, Mapping[str, str]] = {
    "bimanual": {"robot": "franka_bimanual"},
    "single": {"robot": "franka_single"},
    "teleop": {"robot": "franka_bimanual", "teleop": "gello"},
    "policy_server": {"policy": "vipra_tiny_bimanual"},
}
# argument -> the robot's field it replaces
_FIELDS = {
    "left_ip": "arms.left.hostname",
    "right_ip": "arms.right.hostname",
    "camera": "camera.source",
    "camera_path": "camera.path",
    "server": "policy.server",
    "server_public_key": "policy.server_public_key",
    "client_secret_key": "policy.client_secret_key",
    "task": "policy.task",
    "rate": "policy.action_rate_hz",
    "replan_after": "policy.replan_after",
    "mode": "policy.mode",
    "anchor": "policy.anchor",
    "inject_latency_ms": "policy.inject_latency_ms",
    "seed": "policy.seed",
}


@dataclass(frozen=True)
class Process:
    """One process. `parameters` is None for those that are no ROS nodes."""

    name: str
    module: str  # python -m
    executable: str  # the same in lib/vipra_ros, for ros2 run and launch
    arguments: tuple[str, ...] = ()
    parameters: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str | None = None  # output line that says it is; None: it shows itself on its topics
    first: bool = False  # the processes after it need it to be ready
    ready_timeout_s: float = 120.0

    def argv(self) -> list[str]:
        """Command line with this interpreter."""
        # nodes see to their parent's end themselves; the others run through a module that does it for them
        through = ["vipra_ros.process"] if self.parameters is None else []
        command = [sys.executable, "-P", "-m", *through, self.module, *self.arguments]
        if self.parameters:
            command.append("--ros-args")
            for key, value in self.parameters.items():
                # rcl reads the value as YAML, and JSON is YAML that keeps every string a string
                command += ["-p", f"{key}:={json.dumps(value, ensure_ascii=False)}"]
        return command


@dataclass(frozen=True)
class Graph:
    """Processes in order of start, and the environment they share."""

    processes: tuple[Process, ...]
    environment: Mapping[str, str]
    robot: Robot | None = None  # with every argument applied; None without one

    def environ(self, process: Process) -> dict[str, str]:
        """What `process` needs beside our own environment."""
        paths = [str(SOURCE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return {"PYTHONPATH": os.pathsep.join(paths), **self.environment, **process.environment}


def arguments(kind: Kind, given: Mapping[str, Any]) -> Arguments:
    """Check what was given at bring-up; empty strings count as absent. Raises ConfigError."""
    data = {key: value for key, value in given.items() if value not in ("", None)}
    for key in data:
        if key not in ARGUMENTS[kind]:
            raise ConfigError(f"{kind}: unknown argument {key!r}; known: {', '.join(ARGUMENTS[kind])}")
    data = {**DEFAULTS[kind], **data}
    for key in ("replan_after", "seed", "first_seed", "target"):  # launch gives text
        if isinstance(data.get(key), str) and data[key].isdigit():
            data[key] = int(data[key])
    return parse(Arguments, data, f"{kind} argument")


def describe(kind: Kind, given: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Graph:
    """The graph for `given` arguments; `overrides` are further robot fields, dotted (`simulation.name`).

    Raises ConfigError for anything a process would refuse, before one is started.
    """
    said = arguments(kind, given)
    if kind == "policy_server":
        return Graph((_policy_server(said.policy, said.bind, said.keys),), {})
    changes = _changes(kind, said, overrides or {})
    robot = _apply(load(Robot, said.robot), changes, said.robot)
    check_files(robot, said.robot)
    if kind == "teleop":
        _check_leaders(robot, said)
    elif len(robot.arms) != (2 if kind == "bimanual" else 1):
        raise ConfigError(
            f"{said.robot} has {len(robot.arms)} arm(s): use vipra up {_other(kind)}, or another robot"
        )

    processes = []
    if said.policy:
        if not robot.policy.server.startswith(("tcp://127.", "ipc://")):
            raise ConfigError(
                f"policy {said.policy} is to be served on this machine, but the server's address is "
                f"{robot.policy.server}: leave `policy` empty, or serve there with vipra serve"
            )
        processes.append(_policy_server(said.policy, robot.policy.server))
    if robot.simulation:
        processes.append(_simulator(robot))
    common = {"robot": said.robot, "run_dir": said.run_dir or "", **changes}
    quiet = {"OMP_NUM_THREADS": "1"}
    rendering = {"MUJOCO_GL": "egl", "LP_NUM_THREADS": "0"} if robot.camera.source == "sim" else {}
    for name in ("camera", "arms", "teleop" if kind == "teleop" else "policy"):
        if name == "camera" and said.with_camera == "no":
            continue
        extra = {**quiet, **(rendering if name == "camera" else {})}
        parameters = {**common, "teleop": said.teleop} if name == "teleop" else common
        processes.append(Process(name, f"vipra_ros.nodes.{name}", f"vipra_{name}", (), parameters, extra))
    if said.dataset:
        processes.append(_recorder(said, robot, common, quiet))
    return Graph(tuple(processes), {"ROS_AUTOMATIC_DISCOVERY_RANGE": said.discovery}, robot)


def check_files(robot: Robot, name: str) -> None:
    """Raises ConfigError unless the files that `robot` names can be read and belong together."""
    load(Embodiment, robot.embodiment)
    safety_of(robot)
    workcell = load(Workcell, robot.workcell)
    if set(workcell.arms) != set(robot.arms):
        raise ConfigError(
            f"{name} has arms {', '.join(sorted(robot.arms))}, its workcell {robot.workcell} "
            f"{', '.join(sorted(workcell.arms))}: name another in `workcell`, or correct `arms`"
        )


def _recorder(
    said: Arguments, robot: Robot, common: Mapping[str, Any], environment: Mapping[str, str]
) -> Process:
    if said.with_camera == "no":
        raise ConfigError("dataset: recording needs the camera: leave with_camera out")
    wanted = {name: getattr(said, name) for name in ("dataset", "task", "first_seed", "target")}
    given = {key: value for key, value in wanted.items() if value is not None}
    from vipra_ros.recording import setups  # numpy: not for every verb

    setups.read(parse(Recording, given, "recorder"), robot)
    parameters = {**common, **given}
    return Process("recorder", "vipra_ros.nodes.recorder", "vipra_recorder", (), parameters, environment)


def _check_leaders(robot: Robot, said: Arguments) -> None:
    leaders = load(Teleop, said.teleop).leaders
    if missing := [arm for arm in robot.arms if arm not in leaders]:
        raise ConfigError(f"{said.teleop} has no leader for the {' and the '.join(missing)} arm")


def _other(kind: Kind) -> str:
    return "single" if kind == "bimanual" else "bimanual"


def _changes(kind: Kind, said: Arguments, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted robot field -> new value."""
    preset = {f"policy.{field}": value for field, value in PRESETS.get(said.preset, {}).items()}
    changes = preset | {
        target: getattr(said, name) for name, target in _FIELDS.items() if getattr(said, name) is not None
    }
    if said.robot_ip:
        arm = next(iter(load(Robot, said.robot).arms))  # of one; robots with two are refused
        changes[f"arms.{arm}.hostname"] = said.robot_ip
    if said.seed is not None and load(Robot, said.robot).simulation:
        changes["simulation.seed"] = said.seed
    return {**changes, **overrides}


def _apply(robot: Robot, changes: Mapping[str, Any], source: str) -> Robot:
    data = robot.model_dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        target = data
        for part in path:
            target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise ConfigError(f"{source}: this robot has no {key}: leave it out, or use another robot")
        target[last] = value
    return parse(Robot, data, source)


def _simulator(robot: Robot) -> Process:
    simulation = robot.simulation
    hostnames = ",".join(f"{name}={arm.hostname}" for name, arm in robot.arms.items())
    command = ["--workcell", robot.workcell, "--name", simulation.name, "--hostnames", hostnames]
    command += ["--seed", str(simulation.seed)]
    if simulation.task:
        command += ["--task", simulation.task, "--split", simulation.split]
    for name, arm in robot.arms.items():
        command += ["--home", f"{name}={','.join(map(str, arm.home_rad))}"]
    if not simulation.watchdog:
        command.append("--no-watchdog")
    return Process(
        "simulator",
        "simulation.server",
        "vipra_simulator",
        tuple(command),
        environment={"OMP_NUM_THREADS": "1"},
        ready=r"^ready\b",
        first=True,
    )


def _policy_server(policy: str, bind: str, keys: str | None = None) -> Process:
    return Process(
        "policy_server",
        "policy_server.server",
        "vipra_policy_server",
        ("--policy", policy, "--bind", bind, *(("--keys", keys) if keys else ())),
        ready=r"^ready\b",
        ready_timeout_s=900.0,  # 7B weights from a cold disk
    )


@contextlib.contextmanager
def running(graph: Graph, logs: Path, environment: Mapping[str, str] | None = None) -> Iterator[list[Child]]:
    """Start the graph's processes in order; on leaving stop them, last started first.

    Output goes to `logs/<name>.log`. Raises ProcessError when one dies or is not ready in time.
    """
    children: list[Child] = []

    def wait(process: Process, child: Child) -> None:
        said = f"{process.name} ready"
        wait_for(lambda: child.find(process.ready), process.ready_timeout_s, said, children, blame=child)

    try:
        for process in graph.processes:
            env = {**graph.environ(process), **(environment or {})}
            children.append(Child(process.name, process.argv(), logs / f"{process.name}.log", env))
            if process.first:
                wait(process, children[-1])
        for process, child in zip(graph.processes, children, strict=True):
            if process.ready:
                wait(process, child)
        yield children
    finally:
        stop_all(children)


def launch_description(kind: Kind, **defaults: str):
    """The graph for `ros2 launch`: arguments declared, processes in order, all stopped when one ends.

    defaults: of arguments, instead of the kind's.
    """
    from launch import LaunchDescription
    from launch.actions import DeclareLaunchArgument, OpaqueFunction
    from launch.substitutions import LaunchConfiguration

    declared = [
        DeclareLaunchArgument(
            name, default_value=defaults.get(name, default), description=description, choices=choices
        )
        for name, default, description, choices in launch_arguments(kind)
    ]

    def render(context):
        given = {a.name: LaunchConfiguration(a.name).perform(context) for a in declared}
        return _launch_actions(describe(kind, given))

    return LaunchDescription([*declared, OpaqueFunction(function=render)])


def launch_arguments(kind: Kind) -> list[tuple[str, str, str, list[str] | None]]:
    """(name, default, description, choices) of each launch argument."""
    rows = []
    for name in ARGUMENTS[kind]:
        info = Arguments.model_fields[name]
        default = DEFAULTS[kind].get(name, info.default or "")
        literals = [a for a in (info.annotation, *get_args(info.annotation)) if "Literal" in str(type(a))]
        choices = [str(c) for c in get_args(literals[0])] if literals else None
        if choices and default == "":
            choices.append("")
        rows.append((name, str(default), info.description, choices))
    return rows


def _launch_actions(graph: Graph) -> list:
    from launch.actions import ExecuteProcess, RegisterEventHandler, SetEnvironmentVariable, Shutdown
    from launch.event_handlers import OnProcessIO
    from launch_ros.actions import Node
    from launch_ros.parameter_descriptions import ParameterValue

    def action(process: Process):
        how = {
            "output": "screen",
            "additional_env": {**process.environment, "PYTHONUNBUFFERED": "1"},
            "on_exit": Shutdown(reason=f"{process.name} ended"),
        }
        if process.parameters is None:
            return ExecuteProcess(cmd=process.argv(), name=process.name, **how)
        # launch would read the text "10" or "true" as a number or a truth value
        values = {k: ParameterValue(v, value_type=type(v)) for k, v in process.parameters.items()}
        return Node(package="vipra_ros", executable=process.executable, parameters=[values], **how)

    waiting = {p.name: action(p) for p in graph.processes if p.first}
    patterns = {p.name: p.ready for p in graph.processes if p.first}
    loose = [action(p) for p in graph.processes if p.ready and not p.first]
    later = [action(p) for p in graph.processes if not p.ready]
    first = [*loose, *waiting.values()]

    def seen(name: str, event):
        if name in waiting and re.search(patterns[name], event.text.decode(errors="replace"), re.MULTILINE):
            del waiting[name]
            return later if not waiting else None
        return None

    handlers = [
        RegisterEventHandler(
            OnProcessIO(
                target_action=target,
                on_stdout=lambda event, name=name: seen(name, event),
                on_stderr=lambda event, name=name: seen(name, event),
            )
        )
        for name, target in waiting.items()
    ]
    environment = [SetEnvironmentVariable(k, v) for k, v in graph.environment.items()]
    return [*environment, *handlers, *first, *([] if waiting else later)]
