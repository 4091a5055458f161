"""The place the robot works in: arm bases, table, camera. Read by the simulator and by the safety checks.

Frame: `world`, right-handed, metres, z up, origin on the floor (REP 103).
"""

from typing import ClassVar, Literal

from pydantic import Field

from config.loading import Strict, Vector3


class Base(Strict):
    """Where an arm's `fr3_link0` stands in `world`."""

    xyz: Vector3 = Field(description="m")
    yaw_rad: float = Field(ge=-3.1416, le=3.1416, description="rotation about z")


class Table(Strict):
    centre_xyz: Vector3 = Field(description="m, centre of the table's top surface")
    size_xy: tuple[float, float] = Field(description="m, full extent of the top")


class Box(Strict):
    """Axis-aligned box in `world`."""

    min_xyz: Vector3
    max_xyz: Vector3


class View(Strict):
    """Pose and lens of the front camera."""

    position_xyz: Vector3 = Field(description="m")
    look_at_xyz: Vector3 = Field(description="m")
    vertical_fov_deg: float = Field(gt=10, lt=120)


Shape = Literal["cup", "bowl", "box", "can", "jar", "cloth"]
Pattern = Literal["plain", "checked", "striped", "dotted"]


class Prop(Strict):
    """A movable object of the simulated scene."""

    name: str
    kind: Shape
    xy: tuple[float, float] = Field(description="m, nominal position on the table in `world`")
    rgb: Vector3 = Field(default=(1.0, 1.0, 1.0), description="0..1")
    pattern: Pattern = Field("plain", description="its texture, in lighter and darker tones of `rgb`")
    size_m: float = Field(0.28, ge=0.2, le=0.36, description="a cloth's side; other objects have one size")


class Workcell(Strict):
    """Geometry of one workcell."""

    KIND: ClassVar[str] = "workcells"

    arms: dict[str, Base] = Field(min_length=1, max_length=2)
    table: Table
    workspace: Box = Field(description="where the grippers' tool centre points may be")
    front_camera: View
    props: tuple[Prop, ...] = ()
    props_jitter_xy: tuple[float, float] = Field(
        (0.0, 0.0), description="m, +- randomisation of props at reset"
    )

    @property
    def shapes(self) -> tuple[tuple, ...]:
        """What of the props makes another model of the physics: all but their places and looks."""
        return tuple((prop.name, prop.kind, prop.size_m) for prop in self.props)
