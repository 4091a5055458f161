"""The workcell as MuJoCo sees it: franky-sim's FR3s on a table with cups and a bowl, from `config.workcell`.

One function builds the scene for the physics (collision shapes only) and for the pictures (visual shapes
too), with the same joints in the same order, so a state of one is a state of the other. World frame and units
as in `config.workcell`.
"""

import hashlib
import itertools
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import franky_sim.mujoco_simulator as franky_mujoco
import numpy as np

from config.workcell import Prop, Workcell
from simulation import cloth

# Gains of the arms' own position controller, Nm/rad and Nm s/rad: franky-sim's defaults make joint 7 chatter.
KP = (4500.0, 4500.0, 3500.0, 3500.0, 500.0, 500.0, 300.0)
KV = (450.0, 450.0, 350.0, 350.0, 30.0, 30.0, 10.0)
HOME = (0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398)  # Franka's ready pose, rad
HAND_WIDTH = 0.08  # m, open

TABLE_THICKNESS = 0.04
# Profiles are (height, outer radius, inner radius) in m. Cups taper so that they nest; 0.072 m fits the open
# hand.
CUP = ((0.0, 0.029, 0.0), (0.004, 0.0295, 0.0265), (0.09, 0.036, 0.033))
BOWL = ((0.0, 0.036, 0.0), (0.006, 0.042, 0.034), (0.022, 0.064, 0.058), (0.055, 0.080, 0.075))
CAN = ((0.0, 0.033, 0.0), (0.08, 0.033, 0.0))
JAR = ((0.0, 0.036, 0.0), (0.055, 0.036, 0.0), (0.067, 0.027, 0.0), (0.085, 0.027, 0.0))
PROFILES = {"cup": CUP, "bowl": BOWL, "can": CAN, "jar": JAR}
BOX = (0.03, 0.04, 0.035)  # m, half sizes
MASS = {"cup": 0.06, "bowl": 0.25, "can": 0.3, "jar": 0.35, "box": 0.25}  # kg
_WALL_BOXES = {"cup": 12, "bowl": 16}


def build(
    workcell: Workcell,
    homes: dict[str, tuple[float, ...]] | None = None,
    robot_class: type = franky_mujoco.FrankaMujocoRobot,
) -> franky_mujoco.MujocoSimulator:
    """An initialised, not yet started simulator whose scene is the workcell, arms in `workcell.arms` order.

    homes: initial joint positions by arm, rad; HOME where missing.
    """
    sim = franky_mujoco.MujocoSimulator()
    sim.init()
    stock = franky_mujoco.FrankaMujocoRobot
    franky_mujoco.FrankaMujocoRobot = robot_class  # add_robot has no other way in
    try:
        for name, base in workcell.arms.items():
            sim.add_robot(
                initial_q=(homes or {}).get(name, HOME),
                initial_hand_width=HAND_WIDTH,
                kp=KP,
                kv=KV,
                position=base.xyz,
            )
            body = sim.worldbody[-1]
            body.set("quat", f"{math.cos(base.yaw_rad / 2)} 0 0 {math.sin(base.yaw_rad / 2)}")
    finally:
        franky_mujoco.FrankaMujocoRobot = stock
    _add_table(sim, workcell)
    for prop in workcell.props:
        _add_prop(sim, prop, workcell)
    return sim


def strip_visuals(scene: ET.Element) -> None:
    """Remove the arms' visual shapes: the physics never draws them and loads in a tenth of the time."""
    used = set()
    for parent in scene.iter():
        for geom in list(parent.findall("geom")):
            if geom.get("class") == "visual":
                parent.remove(geom)
            elif geom.get("mesh"):
                used.add(geom.get("mesh"))
    asset = scene.find("asset")
    for mesh in asset.findall("mesh"):
        if mesh.get("name") not in used:
            asset.remove(mesh)


def signature(model) -> str:
    """Hash of the joint layout of a MuJoCo model: equal means qpos and qvel mean the same."""
    text = ";".join(
        f"{model.joint(j).name}:{int(model.jnt_type[j])}:{int(model.jnt_qposadr[j])}"
        for j in range(model.njnt)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def place_props(model, data, workcell: Workcell, seed: int) -> None:
    """Put every object at its place plus the seed's jitter and turn, at rest; repeatable to the bit."""
    random = np.random.default_rng(seed)
    for prop in workcell.props:
        offset = random.uniform(-1.0, 1.0, 2) * workcell.props_jitter_xy
        yaw = random.uniform(-math.pi, math.pi)
        place_prop(model, data, prop, np.add(prop.xy, offset), yaw, workcell.table.centre_xyz[2])


def place_prop(model, data, prop: Prop, xy: np.ndarray, yaw: float, table_z: float) -> None:
    """Put one object at `xy` [2] m, turned by `yaw` rad, at rest on a table of height `table_z` m."""
    joint = model.joint(f"{prop.name}_free")
    qpos, qvel = int(joint.qposadr[0]), int(joint.dofadr[0])
    xyz = np.array([*xy, table_z + 0.0005 + (cloth.RADIUS if prop.kind == "cloth" else 0.0)])
    data.qpos[qpos : qpos + 3] = xyz
    data.qpos[qpos + 3 : qpos + 7] = (math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))
    data.qvel[qvel : qvel + 6] = 0.0
    if prop.kind == "cloth":
        cloth.place(model, data, prop.name, prop.size_m, xyz, yaw)


def widest(kind: str) -> float:
    """Largest distance, m, of an object's surface from its axis; 0 for a cloth, which has none."""
    if kind == "cloth":
        return 0.0
    return math.hypot(*BOX[:2]) if kind == "box" else max(radius for _, radius, _ in PROFILES[kind])


def top_points(kind: str) -> np.ndarray:
    """Points [64, 3] m spread evenly over the top of an object that stands upright, from its base."""
    k = np.arange(64)
    if kind == "box":
        x, y = BOX[0] * (k // 8 - 3.5) / 4, BOX[1] * (k % 8 - 3.5) / 4
        return np.stack([x, y, np.full(64, 2 * BOX[2])], axis=1)
    height, radius, _ = PROFILES[kind][-1]
    r, angle = radius * np.sqrt((k + 0.5) / 64), k * math.pi * (3 - math.sqrt(5))  # a sunflower's seeds
    return np.stack([r * np.cos(angle), r * np.sin(angle), np.full(64, height)], axis=1)


def _add_table(sim, workcell: Workcell) -> None:
    x, y, top = workcell.table.centre_xyz
    size_x, size_y = workcell.table.size_xy
    body = ET.SubElement(sim.worldbody, "body", name="table", pos=f"{x} {y} {top - TABLE_THICKNESS / 2}")
    ET.SubElement(
        body,
        "geom",
        name="table_top",
        type="box",
        size=f"{size_x / 2} {size_y / 2} {TABLE_THICKNESS / 2}",
        friction="0.8 0.01 0.001",
        contype=str(1 | cloth.TABLE_BIT),
        conaffinity=str(1 | cloth.TABLE_BIT),
        group="3",
        rgba="0.6 0.45 0.3 1",
    )


def _add_prop(sim, prop: Prop, workcell: Workcell) -> None:
    top = workcell.table.centre_xyz[2]
    if prop.kind == "cloth":
        # The same place whatever the trial, which moves it: its edges are rounded here.
        cloth.add(sim.scene, prop.name, (0.5, 0.0, top + cloth.RADIUS), prop.size_m, prop.rgb)
        return
    body = ET.SubElement(sim.worldbody, "body", name=prop.name, pos=f"{prop.xy[0]} {prop.xy[1]} {top}")
    ET.SubElement(body, "freejoint", name=f"{prop.name}_free")
    shapes, radius, height = _shapes(prop.kind)
    mass = MASS[prop.kind]
    across = mass * (6 * radius**2 + height**2) / 12  # thin-walled cylinder
    ET.SubElement(
        body,
        "inertial",
        pos=f"0 0 {height * 0.4}",
        mass=str(mass),
        diaginertia=f"{across} {across} {mass * radius**2}",
    )
    bits = str(1 | cloth.OBJECTS_BIT)
    common = dict(friction="1.2 0.02 0.001", condim="4", group="3", rgba=f"{' '.join(map(str, prop.rgb))} 1")
    for shape in shapes:
        ET.SubElement(body, "geom", **shape, **common, contype=bits, conaffinity=bits)


def _shapes(kind: str) -> tuple[list[dict[str, str]], float, float]:
    """What an object collides with, as MJCF geoms; its radius and height, m."""
    if kind == "box":
        x, y, z = BOX
        return [dict(type="box", size=f"{x} {y} {z}", pos=f"0 0 {z}")], math.hypot(x, y), 2 * z
    profile = PROFILES[kind]
    if kind not in _WALL_BOXES:  # solid: a cylinder for each part
        parts = [
            dict(
                type="cylinder",
                size=f"{(lower[1] + upper[1]) / 2} {(upper[0] - lower[0]) / 2}",
                pos=f"0 0 {(upper[0] + lower[0]) / 2}",
            )
            for lower, upper in itertools.pairwise(profile)
        ]
        return parts, profile[0][1], profile[-1][0]
    height, radius = profile[1][0], profile[1][2] + 0.002
    floor = dict(type="cylinder", size=f"{radius} {height / 2}", pos=f"0 0 {height / 2}")
    walls = [
        dict(type="box", **attributes)
        for lower, upper in itertools.pairwise(profile[1:])
        for attributes in _wall(lower, upper, _WALL_BOXES[kind])
    ]
    return [floor, *walls], profile[-1][1], profile[-1][0]


def _wall(lower: tuple, upper: tuple, count: int) -> list[dict[str, str]]:
    """`count` tilted boxes that close a conical wall between two (height, outer, inner) rings."""
    outer_low, outer_high = np.array([lower[1], lower[0]]), np.array([upper[1], upper[0]])
    inner_low, inner_high = np.array([lower[2], lower[0]]), np.array([upper[2], upper[0]])
    middle = (outer_low + outer_high + inner_low + inner_high) / 4
    along = (outer_high + inner_high) / 2 - (outer_low + inner_low) / 2
    tilt = math.atan2(along[0], along[1])  # outwards from vertical
    thickness = ((outer_low - inner_low)[0] + (outer_high - inner_high)[0]) / 4 * math.cos(tilt)
    half_width = max(upper[1], lower[1]) * math.tan(math.pi / count)
    boxes = []
    for k in range(count):
        angle = 2 * math.pi * k / count
        turn = np.array([math.cos(angle / 2), 0, 0, math.sin(angle / 2)])
        lean = np.array([math.cos(tilt / 2), 0, math.sin(tilt / 2), 0])
        quat = _product(turn, lean)
        position = (middle[0] * math.cos(angle), middle[0] * math.sin(angle), middle[1])
        boxes.append(
            dict(
                size=f"{thickness:.6f} {half_width:.6f} {np.linalg.norm(along) / 2:.6f}",
                pos=" ".join(f"{v:.6f}" for v in position),
                quat=" ".join(f"{v:.8f}" for v in quat),
            )
        )
    return boxes


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamilton product of two wxyz quaternions."""
    w, x, y, z = a
    return np.array(
        [
            w * b[0] - x * b[1] - y * b[2] - z * b[3],
            w * b[1] + x * b[0] + y * b[3] - z * b[2],
            w * b[2] - x * b[3] + y * b[0] + z * b[1],
            w * b[3] + x * b[2] - y * b[1] + z * b[0],
        ]
    )


def visual_meshes() -> list[Path]:
    """The FR3's visual meshes, OBJ, as franky-sim's scene names them."""
    meshes = ET.parse(franky_mujoco._XML_PATH).getroot().findall("asset/mesh")
    return [franky_mujoco._MESHES_DIR / m.get("file") for m in meshes if m.get("file").endswith("_vis.obj")]
