"""What a seed makes of a task: colours, places, instruction. The same seed is the same trial everywhere."""

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from config.loading import ConfigError, load
from config.task import Region, Task
from config.workcell import Prop, Workcell

_TRIES = 2000
_DRAWN = 2  # changes whenever the same seed is drawn as another trial


@dataclass(frozen=True)
class Trial:
    """One set-up. `workcell` holds the objects as props at their places, in the task's order."""

    task: Task
    seed: int
    split: str
    workcell: Workcell
    yaws_rad: tuple[float, ...]  # of the props about z
    instruction: str


def make_trial(task: Task, seed: int, split: str = "seen", template: int | None = 0) -> Trial:
    """The set-up of `seed`; `template` picks the instruction's wording, None draws one (for demonstrations).

    Raises ValueError for an unknown split, ConfigError for a region too small for the objects.
    """
    if split not in ("seen", "unseen"):
        raise ValueError(f"split {split!r} is not seen or unseen")
    choices = getattr(task, split)
    random = np.random.default_rng([seed, split == "unseen"])
    words, shades = [], []
    drawn = iter(random.permutation(len(choices.colours)))
    for thing in task.objects:
        colour = thing.colour or choices.colours[next(drawn)]
        words.append(colour.word)
        shades.append(colour.rgb)
    regions = [choices.regions.get(thing.name, choices.region) for thing in task.objects]
    seen = [task.seen.regions.get(thing.name, task.seen.region) for thing in task.objects]
    places = _places(random, task, regions, None if regions == seen else seen)
    looks = np.random.default_rng([seed, split == "unseen", 1])  # a stream of its own
    shapes = iter(looks.permutation(len(choices.shapes)))
    size_m = choices.cloth_sizes_m[looks.integers(len(choices.cloth_sizes_m))]
    props = tuple(
        Prop(
            name=thing.name,
            kind=thing.kind or choices.shapes[next(shapes)],
            xy=tuple(map(float, place)),
            rgb=rgb,
            pattern=choices.patterns[looks.integers(len(choices.patterns))],
            **({"size_m": size_m} if thing.kind == "cloth" else {}),
        )
        for thing, place, rgb in zip(task.objects, places, shades, strict=True)
    )
    names = {thing.role: word for thing, word in zip(task.objects, words, strict=True)}
    shape = next(prop.kind for prop in props if prop.name == task.named("target"))
    template = int(random.integers(len(task.instructions))) if template is None else template
    base = load(Workcell, task.workcell)
    return Trial(
        task=task,
        seed=seed,
        split=split,
        workcell=base.model_copy(update={"props": props, "props_jitter_xy": (0.0, 0.0)}),
        yaws_rad=tuple(random.uniform(-math.pi, math.pi, len(props)).tolist()),
        instruction=task.instructions[template].format(
            moved=names["moved"], target=names["target"], shape=shape
        ),
    )


def scene(task: Task) -> str:
    """Changes with what the task and its workcell say of objects, places, looks and words."""
    said = task.model_dump(mode="json", exclude={"protocol"}), load(Workcell, task.workcell).model_dump()
    return digest([_DRAWN, *said])


def digest(what: object) -> str:
    """12 characters that tell plain data from other plain data."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def _places(
    random: np.random.Generator, task: Task, regions: list[Region], seen: list[Region] | None
) -> np.ndarray:
    """Centres [n, 2] m, all `clearance_m` apart: whole sets are drawn anew, so that no object is favoured.

    seen: regions of which the moved object or the target shall be outside.
    """
    low, high = np.array([r.min_xy for r in regions]), np.array([r.max_xy for r in regions])
    n = len(regions)
    apart = ~np.eye(n, dtype=bool)
    for _ in range(_TRIES):
        xy = random.uniform(low, high, (n, 2))
        distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
        if n > 1 and distance[apart].min() < task.clearance_m:
            continue
        if seen is None or not all(
            region.holds(place)
            for thing, region, place in zip(task.objects, seen, xy, strict=True)
            if thing.role in ("moved", "target")
        ):
            return xy
    raise ConfigError(
        f"{task.name}: {n} objects clearance_m {task.clearance_m} apart do not fit their regions: lower it, "
        "or enlarge `region`"
    )


def placing(trial: Trial) -> list[str]:
    """Where each object goes: its looks and kind, and its place on the table in `world`."""
    words = {colour.rgb: colour.word for colour in getattr(trial.task, trial.split).colours}
    words |= {thing.colour.rgb: thing.colour.word for thing in trial.task.objects if thing.colour}
    lines = []
    for prop, yaw in zip(trial.workcell.props, trial.yaws_rad, strict=True):
        looks = [prop.pattern] if prop.pattern != "plain" else []
        looks += [word] if (word := words.get(prop.rgb)) else []
        size = f" of {100 * prop.size_m:.0f} cm" if prop.kind == "cloth" else ""
        turned = f", turned by {math.degrees(yaw):.0f}°" if prop.kind in ("box", "cloth") else ""  # not round
        place = f"x {100 * prop.xy[0]:.0f} cm, y {100 * prop.xy[1]:.0f} cm{turned}"
        lines.append(f"{' '.join([*looks, prop.kind])}{size}: {place}")
    return lines
