"""A manipulation task: what is said, what lies where, what counts as done, how people run it for real."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from config.loading import Strict, Vector3
from config.workcell import Pattern, Shape

Kind = Literal["pick_place", "stack", "place_in_bowl", "cover"]
Role = Literal["moved", "target", "other"]


class Colour(Strict):
    word: str = Field(pattern=r"^[a-z]+$", description="as the instruction says it")
    rgb: Vector3 = Field(description="0..1")


class Region(Strict):
    """Rectangle on the table, m, `world`."""

    min_xy: tuple[float, float]
    max_xy: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self):
        if any(a >= b for a, b in zip(self.min_xy, self.max_xy, strict=True)):
            raise ValueError("max_xy must lie beyond min_xy")
        return self

    def holds(self, xy) -> bool:
        """Whether `xy` [2] lies in it."""
        return all(a <= x <= b for a, x, b in zip(self.min_xy, xy, self.max_xy, strict=True))


class TaskObject(Strict):
    """One object of the scene; its role decides what the instruction and the score say of it."""

    name: str
    kind: Shape | None = Field(description="null: drawn from the split's shapes, all different")
    role: Role = "other"
    colour: Colour | None = Field(None, description="null: drawn from the split's colours, all different")


class Split(Strict):
    """Where things may lie and what they look like. `seen` is trained on, `unseen` only evaluated."""

    region: Region
    regions: dict[str, Region] = Field({}, description="of single objects by name, instead of `region`")
    colours: tuple[Colour, ...] = Field(min_length=1)
    shapes: tuple[Shape, ...] = Field((), description="of objects without a kind of their own")
    patterns: tuple[Pattern, ...] = Field(("plain",), min_length=1, description="each object draws one")
    cloth_sizes_m: tuple[float, ...] = Field((0.28,), min_length=1, description="side of the cloth")


class Protocol(Strict):
    """For people at the robot."""

    set_up: str
    reset: str
    scoring: str


class Task(Strict):
    """One task of the evaluation (ViPRA appendix G.1)."""

    KIND: ClassVar[str] = "tasks"
    FILES: ClassVar[tuple[str, ...]] = ("workcell", "simulated_robot")

    name: str
    kind: Kind
    workcell: str = Field(description="file in config/workcells")
    simulated_robot: str | None = Field(
        None,
        description="file in config/robots that plays it in simulation; null: sim_ and the workcell's name",
    )
    arm: Literal["left", "right"] = Field(description="the arm that picks")
    holder: Literal["left", "right"] | None = Field(None, description="the arm that holds the target")
    instructions: tuple[str, ...] = Field(
        min_length=1,
        description="{moved} and {target} become the objects' colours, {shape} the target's kind; "
        "the first one is for evaluation",
    )
    objects: tuple[TaskObject, ...] = Field(min_length=1)
    expert_yaw_rad: float = Field(
        0.35,
        ge=0,
        le=1.2,
        description="the scripted expert turns its grasps by up to so much; 0 where the "
        "object is round and the camera too far to see the turn",
    )
    clearance_m: float = Field(0.12, gt=0, description="least distance between two objects' centres")
    seen: Split
    unseen: Split
    time_limit_s: float = Field(gt=0, le=600)
    protocol: Protocol

    @model_validator(mode="after")
    def _roles(self):
        roles = [o.role for o in self.objects]
        if roles.count("moved") != 1 or roles.count("target") != 1:
            raise ValueError("objects: exactly one has role moved and one role target")
        if len({o.name for o in self.objects}) != len(self.objects):
            raise ValueError("objects: names must be unique")
        drawn = sum(o.colour is None for o in self.objects)
        shaped = sum(o.kind is None for o in self.objects)
        for name in ("seen", "unseen"):
            if len({c.word for c in getattr(self, name).colours}) < drawn:
                raise ValueError(f"{name}.colours: {drawn} different colours are needed")
            if len(set(getattr(self, name).shapes)) < shaped:
                raise ValueError(f"{name}.shapes: {shaped} different shapes are needed")
            if strangers := set(getattr(self, name).regions) - {o.name for o in self.objects}:
                raise ValueError(f"{name}.regions: no object is called {min(strangers)}")
        for text in self.instructions:
            try:
                said = text.format(moved="", target="", shape="").strip()
            except (AttributeError, KeyError, IndexError, ValueError):
                said = ""
            if not said:
                raise ValueError(
                    f"instructions: {text!r}: say something, with no fields but "
                    "{moved}, {target} and {shape}"
                )
        moved = next(o for o in self.objects if o.role == "moved")
        if (moved.kind == "cloth") != (self.kind == "cover"):
            raise ValueError("objects: a cover task moves a cloth, other tasks move none")
        if (self.kind == "place_in_bowl") != (self.holder is not None):
            raise ValueError("holder: place_in_bowl needs one, other tasks have none")
        if self.holder == self.arm:
            raise ValueError("holder: must be the other arm")
        return self

    def named(self, role: Role) -> str:
        """Name of the object with this role (moved or target)."""
        return next(o.name for o in self.objects if o.role == role)
