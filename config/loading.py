"""YAML -> pydantic -> the object: the one way in for configuration.

`load(Model, "name-or-path")` reads a file and checks it; an error names file, key and fix in one line.
"""

import sys
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Vector3 = tuple[float, float, float]
Joints = Annotated[tuple[float, ...], Field(min_length=7, max_length=7)]


class ConfigError(ValueError):
    """A configuration file is missing, unreadable or wrong; the message names file, key and fix."""


class Strict(BaseModel):
    """Frozen, and any unknown key, NaN or infinity is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Strict)


def root() -> Path:
    """Folder of `config/`, `launch/` and `checkpoints/`: the checkout, else `<prefix>/share/vipra_ros`.

    Raises ConfigError when neither is there.
    """
    here = Path(__file__).resolve()
    candidates = [here.parent.parent]
    candidates += [p / "share" / "vipra_ros" for p in here.parents]
    candidates.append(Path(sys.prefix) / "share" / "vipra_ros")
    for candidate in candidates:
        if (candidate / "config" / "robots").is_dir():
            return candidate
    raise ConfigError(
        f"no vipra_ros configuration beside {here} or under {sys.prefix}/share: reinstall vipra_ros"
    )


def find(kind: str, name: str) -> Path:
    """The file for `name`: a path to a YAML file, or the stem of one in `config/<kind>/`.

    Raises ConfigError that lists what exists.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        for candidate in (path, root() / path):
            if candidate.is_file():
                return candidate
        raise ConfigError(f"{name}: no such file")
    folder = root() / "config" / kind
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    if len(path.parts) > 1:
        raise ConfigError(f"{name}: no such file or folder")
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
    raise ConfigError(f"config/{kind}/{name}.yaml does not exist; known {kind}: {known}")


def load(model: type[Model], name: str, kind: str | None = None) -> Model:
    """Read `name` (see `find`; `kind` defaults to the model's `KIND`) as `model`.

    Other files that it names (the model's `FILES`) are looked for beside it first.

    Raises ConfigError with one line per wrong key.
    """
    path = find(kind or model.KIND, name)
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    for key in getattr(model, "FILES", ()) if isinstance(data, dict) else ():
        if str(data.get(key)).endswith((".yaml", ".yml")) and (beside := path.parent / data[key]).is_file():
            data[key] = str(beside.resolve())
    return parse(model, data, str(path))


def parse(model: type[Model], data: object, source: str) -> Model:
    """Check plain data against `model`; errors name `source`. Raises ConfigError."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(file)"
            fix = item["msg"]
            if item["type"] == "extra_forbidden":
                fix = "unknown key: remove it or check its spelling"
            elif item["type"] == "missing":
                fix = "missing: add it"
            elif item["loc"]:
                fix = f"{fix} (got {str(item.get('input'))[:60]!r})"
            lines.append(f"{source}: {key}: {fix}")
        raise ConfigError("\n".join(lines)) from error
