"""Configuration sections as ROS parameters: pydantic models are declared field by field and checked again.

`-p policy.action_rate_hz:=10.0 -p arms.left.hostname:=172.16.0.2` on a node's command line overrides the
robot's YAML file. Nested sections and dictionaries become dotted names, tuples become arrays. A field that
may be null is null when the parameter is the empty string. Whole numbers are accepted for real ones.
"""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

from config.loading import ConfigError, Strict, load, parse
from config.robot import Robot

Section = TypeVar("Section", bound=Strict)
_INT64_MAX = 2**63 - 1


def declare(node: Node, model: Section, prefix: str = "", writable: Collection[str] = ()) -> Section:
    """Declare every field of `model` on `node` as `prefix.field`; return `model` with the overrides applied.

    Parameters are read-only except those whose dotted name below `prefix` is in `writable`; a node that has
    any checks changes with `revise`. Fields that are null sections are left alone: they cannot be overridden.
    Raises ConfigError with one line per wrong override, naming the parameter and what is allowed.
    """
    fields = _flatten(model, "")
    overrides = {key: _override(node, _join(prefix, key)) for key in fields}
    changes = {key: value for key, value in overrides.items() if value is not None}
    model = _apply(model, changes, prefix)
    for key, (info, value) in _flatten(model, "").items():
        descriptor = _descriptor(info, value)
        descriptor.read_only = key not in writable
        value = "" if value is None else list(value) if isinstance(value, tuple) else value
        node.declare_parameter(_join(prefix, key), value, descriptor, ignore_override=True)
    return model


def declare_robot(
    node: Node, sections: Sequence[str], writable: Collection[str] = (), default: str = "sim_bimanual"
) -> Robot:
    """Read the robot named by parameter `robot` and declare the `sections` the node uses (`camera`, `arms`).

    Returns the robot with overrides applied and the rules between sections checked again; `writable` holds
    full dotted names (`policy.task`). A section that this robot does not have is skipped. Raises ConfigError.
    """
    about = ParameterDescriptor(description="robot: file in config/robots, or a path to one", read_only=True)
    robot = load(Robot, node.declare_parameter("robot", default, about).value)
    data = robot.model_dump()
    for name in sections:
        section = getattr(robot, name)
        if isinstance(section, dict):
            for key, item in section.items():
                data[name][key] = declare(node, item, f"{name}.{key}").model_dump()
        elif section is not None:
            inside = [w.removeprefix(f"{name}.") for w in writable if w.startswith(f"{name}.")]
            data[name] = declare(node, section, name, inside).model_dump()
    return parse(Robot, data, f"{node.get_name()} parameters")


def declare_run_dir(node: Node) -> Path | None:
    """Declare `run_dir` and return it as a folder that exists; None when it is empty (no run log)."""
    about = ParameterDescriptor(
        description="folder for this run's log; empty: none is written", read_only=True
    )
    value = node.declare_parameter("run_dir", "", about).value
    if not value:
        return None
    path = Path(value).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def revise(model: Section, prefix: str, changes: Sequence[Parameter]) -> Section:
    """`model` with the changes that belong to `prefix`, for on-set callbacks. Raises ConfigError."""
    start = f"{prefix}." if prefix else ""
    return _apply(
        model,
        {p.name.removeprefix(start): _plain(p.value) for p in changes if p.name.startswith(start)},
        prefix,
    )


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _flatten(value: Any, key: str, info: FieldInfo | None = None) -> dict[str, tuple[FieldInfo, Any]]:
    """Dotted name below the section -> (field, value), down through sections and dictionaries of them."""
    leaves: dict[str, tuple[FieldInfo, Any]] = {}
    if isinstance(value, Strict):
        for name, field in type(value).model_fields.items():
            leaves |= _flatten(getattr(value, name), _join(key, name), field)
    elif isinstance(value, dict):
        for name, item in value.items():
            leaves |= _flatten(item, _join(key, name), info)
    elif isinstance(value, tuple) and any(isinstance(item, Strict) for item in value):
        raise TypeError(f"{key}: a list of sections has no form as ROS parameters")
    elif value is not None or not _is_section(info):
        leaves[key] = (info, value)
    return leaves


def _is_section(info: FieldInfo) -> bool:
    kinds = (info.annotation, *get_args(info.annotation))
    return any(isinstance(kind, type) and issubclass(kind, Strict) for kind in kinds)


def _plain(value: Any) -> Any:
    """A parameter's value as YAML would have given it: arrays as lists."""
    return value if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__") else list(value)


def _override(node: Node, name: str) -> Any | None:
    """What the command line or a parameter file says for `name`, of whatever type; None if nothing.

    Declared for a moment with dynamic type: a static one would answer `rate:=10` with a type error.
    """
    value = node.declare_parameter(name, descriptor=ParameterDescriptor(dynamic_typing=True)).value
    node.undeclare_parameter(name)
    return _plain(value)


def _apply(model: Section, changes: dict[str, Any], prefix: str) -> Section:
    """`model` with dotted `changes`, checked."""
    fields, data = _flatten(model, ""), model.model_dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        target = data
        for part in path:
            target = target[part]
        nullable = type(None) in get_args(fields[key][0].annotation)
        target[last] = None if nullable and value == "" else value
    try:
        return parse(type(model), data, "parameter")
    except ConfigError as error:
        raise ConfigError(
            str(error).replace("parameter: ", f"parameter {prefix}." if prefix else "parameter ")
        ) from error


def _descriptor(info: FieldInfo, value: Any) -> ParameterDescriptor:
    """Sentence, bounds and choices of a field. ROS ranges include their ends; the sentence has open ones."""
    low, high, notes = None, None, []
    for rule in info.metadata:
        match rule:
            case Ge():
                low, note = rule.ge, f">= {rule.ge:g}"
            case Gt():
                low, note = rule.gt + isinstance(value, int), f"> {rule.gt:g}"
            case Le():
                high, note = rule.le, f"<= {rule.le:g}"
            case Lt():
                high, note = rule.lt - isinstance(value, int), f"< {rule.lt:g}"
            case MaxLen():
                note = f"at most {rule.max_length} {'characters' if isinstance(value, str) else 'values'}"
            case MinLen():
                note = f"at least {rule.min_length} {'characters' if isinstance(value, str) else 'values'}"
            case _:
                continue
        notes.append(note)
    kinds = (info.annotation, *get_args(info.annotation))
    for kind in kinds:
        if get_origin(kind) is Literal:
            notes.append("one of " + ", ".join(str(choice) for choice in get_args(kind)))
    if type(None) in kinds:
        notes.append("empty: null")
    descriptor = ParameterDescriptor(
        description="; ".join(filter(None, [info.description, ", ".join(notes)]))
    )
    if (low is not None or high is not None) and isinstance(value, int):
        low, high = -_INT64_MAX if low is None else int(low), _INT64_MAX if high is None else int(high)
        descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
    elif (low is not None or high is not None) and isinstance(value, float):
        low, high = (
            -sys.float_info.max if low is None else float(low),
            sys.float_info.max if high is None else float(high),
        )
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
    return descriptor
