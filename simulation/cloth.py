"""A square cloth as MuJoCo simulates it, and how much of an object it covers.

A grid of point masses joined by a flex of triangles: edges keep their lengths by constraints, bending
resists by the flex's elasticity. Points carry spheres that touch only the table and the triangles touch
only objects, which takes a fifth of the contacts of a flex that lies on a table itself; neither touches
the hand or itself. Two rigid fingers cannot pinch a grid this coarse, so a wooden knob on a stiff patch
(five points) is sewn to its middle, which they hold by friction alone.
"""

import xml.etree.ElementTree as ET

import mujoco
import numpy as np

GRID = 9  # points a side, odd: the knob is the middle one
RADIUS = 0.003  # m, half the thickness
AREA_MASS = 0.4  # kg/m2, a tea towel
YOUNG, DAMPING = 30e3, 0.01  # Pa, s: bends like thin felt, 5e-4 N m; three times that rings at 1 ms steps
KNOB_RADIUS, KNOB_HEIGHT, KNOB_MASS = 0.009, 0.034, 0.012  # m, m, kg
OBJECTS_BIT, TABLE_BIT = 2, 4  # collision groups beside MuJoCo's default 1
SAG_M = 0.025  # below the object's top, where the cloth still counts as over it
_MIDDLE = GRID * GRID // 2
_SEWN = (_MIDDLE, _MIDDLE - 1, _MIDDLE + 1, _MIDDLE - GRID, _MIDDLE + GRID)  # points that move with the knob


def grid(size_m: float) -> np.ndarray:
    """Points [GRID * GRID, 3] m of the flat cloth, `size_m` a side, about its middle."""
    line = np.linspace(-size_m / 2, size_m / 2, GRID)
    x, y = np.meshgrid(line, line, indexing="ij")
    return np.stack([x, y, np.zeros_like(x)], axis=-1).reshape(-1, 3)


def triangles() -> np.ndarray:
    """Indices [2 * (GRID - 1)**2, 3] into the points; diagonals alternate: no direction is stiffer."""
    found = []
    for i in range(GRID - 1):
        for j in range(GRID - 1):
            a, b, c, d = i * GRID + j, (i + 1) * GRID + j, (i + 1) * GRID + j + 1, i * GRID + j + 1
            found += [(a, b, c), (a, c, d)] if (i + j) % 2 == 0 else [(a, b, d), (b, c, d)]
    return np.array(found)


def add(scene: ET.Element, name: str, xyz: tuple[float, float, float], size_m: float, rgb) -> None:
    """The cloth flat with its middle at `xyz`, to an MJCF scene of the workcell.

    Body `name` with joint `name`_free is the knob, whose origin is the cloth's middle; each point that
    is not sewn to it is a body `name`_0, ... with three slides.
    """
    world = scene.find("worldbody")
    mass = AREA_MASS * size_m**2 / GRID**2
    flat = grid(size_m)
    sewn = np.isin(np.arange(len(flat)), _SEWN)
    knob = ET.SubElement(world, "body", name=name, pos=_text(xyz))
    ET.SubElement(knob, "freejoint", name=f"{name}_free")
    bodies = []
    for k, point in enumerate(flat):
        bodies.append(name if sewn[k] else f"{name}_{k}")
        body = knob
        if not sewn[k]:
            body = ET.SubElement(world, "body", name=bodies[-1], pos=_text(point + xyz))
            ET.SubElement(body, "inertial", pos="0 0 0", mass=f"{mass:.8f}", diaginertia="1e-8 1e-8 1e-8")
            for axis in ("1 0 0", "0 1 0", "0 0 1"):
                ET.SubElement(body, "joint", type="slide", axis=axis)
        ET.SubElement(
            body,
            "geom",
            type="sphere",
            size=str(RADIUS),
            pos=_text(point) if sewn[k] else "0 0 0",
            contype=str(TABLE_BIT),
            conaffinity=str(TABLE_BIT),
            friction="0.5 0.01 0.001",
            priority="1",
            group="3",
        )
    middle, half = KNOB_HEIGHT / 2 - RADIUS, KNOB_HEIGHT / 2
    across = KNOB_MASS * (3 * KNOB_RADIUS**2 + KNOB_HEIGHT**2) / 12
    patch = 2 * mass * (size_m / (GRID - 1)) ** 2  # kg m2, of the four points round the middle
    ET.SubElement(
        knob,
        "inertial",
        pos=f"0 0 {middle}",
        mass=str(KNOB_MASS + len(_SEWN) * mass),
        diaginertia=_text((across + patch, across + patch, KNOB_MASS * KNOB_RADIUS**2 / 2 + 2 * patch)),
    )
    ET.SubElement(
        knob,
        "geom",
        type="cylinder",
        size=f"{KNOB_RADIUS} {half}",
        pos=f"0 0 {middle}",
        friction="1.2 0.02 0.001",
        solref="0.004 1",
        solimp="0.95 0.99 0.001",
        priority="1",
        condim="4",
        group="3",
    )
    flex = ET.SubElement(
        ET.SubElement(scene, "deformable"),
        "flex",
        name=name,
        dim="2",
        radius=str(RADIUS),
        body=" ".join(bodies),
        vertex=_text((flat * sewn[:, None]).ravel()),
        element=" ".join(map(str, triangles().ravel())),
        rgba=f"{_text(rgb)} 1",
    )
    ET.SubElement(
        flex,
        "elasticity",
        young=str(YOUNG),
        poisson="0",
        thickness=str(2 * RADIUS),
        damping=str(DAMPING),
        elastic2d="bend",
    )
    ET.SubElement(
        flex,
        "contact",
        contype=str(OBJECTS_BIT),
        conaffinity=str(OBJECTS_BIT),
        selfcollide="none",
        friction="0.4 0.01 0.001",
        priority="1",
    )
    ET.SubElement(scene.find("equality"), "flex", flex=name)
    option = scene.find("option")
    option.set("integrator", "Euler")  # the arms' own cannot bend a flex
    # With hundreds of edges Newton takes longer a step; more iterations change nothing that is seen.
    option.set("solver", "CG")
    option.set("iterations", "20")


def place(model, data, name: str, size_m: float, xyz: np.ndarray, yaw: float) -> None:
    """Flat and at rest with its middle at `xyz` [3] m, `world`, turned by `yaw` rad."""
    c, s = np.cos(yaw), np.sin(yaw)
    points = np.asarray(xyz) + grid(size_m) @ np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    for k, point in enumerate(points):
        if k in _SEWN:
            continue
        body = model.body(f"{name}_{k}")
        joint = int(body.jntadr[0])
        qpos, qvel = int(model.jnt_qposadr[joint]), int(model.jnt_dofadr[joint])
        data.qpos[qpos : qpos + 3] = point - body.pos
        data.qvel[qvel : qvel + 3] = 0.0


def surface(model, data, name: str) -> np.ndarray:
    """Points [GRID * GRID, 3] m, `world`, as `mujoco.mj_flex` left them."""
    first = int(model.flex_vertadr[mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_FLEX, name)])
    return data.flexvert_xpos[first : first + GRID * GRID].copy()


def coverage(points: np.ndarray, top: np.ndarray) -> float:
    """Share of the points `top` [k, 3] of an object that lie under the cloth `points` [GRID * GRID, 3], m.

    Under it is a point inside a triangle as seen from above, where the triangle is at most `SAG_M` lower.
    """
    a, b, c = np.moveaxis(points[triangles()], 1, 0)  # each [t, 3]
    u, v, w = (b - a)[:, :2], (c - a)[:, :2], top[:, None, :2] - a[None, :, :2]
    area = u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
    upright = np.abs(area) < 1e-12  # seen from above a line: covers nothing
    area = np.where(upright, 1.0, area)
    s = (w[..., 0] * v[:, 1] - w[..., 1] * v[:, 0]) / area
    t = (u[:, 0] * w[..., 1] - u[:, 1] * w[..., 0]) / area
    height = a[:, 2] + s * (b - a)[:, 2] + t * (c - a)[:, 2]
    inside = (s >= 0) & (t >= 0) & (s + t <= 1) & ~upright
    return float((inside & (height > top[:, None, 2] - SAG_M)).any(axis=1).mean())


def _text(values) -> str:
    return " ".join(f"{v:.6g}" for v in values)
