"""The front camera's picture of a running simulator, drawn in a process of its own from the shared state.

On a machine without a GPU the cost is vertices and shadows, not pixels (MuJoCo on Mesa's software
rasteriser). So the live pictures use decimated arm meshes, made once and cached, and soft dark discs under
things instead of cast shadows; `still` draws full meshes with shadows and many samples. Never in a process
that imports torch or triton: the two crash each other.
"""

import hashlib
import itertools
import math
import os
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

# Both are read once, when GL comes up: no display needed, and one thread, for the cores belong to the control
# loop.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")

import mujoco
import numpy as np

from config.workcell import Prop, Workcell
from simulation import cloth
from simulation import workcell as cell
from simulation.state import SharedState, StateError

CAMERA = "front_camera"
_DECIMATION = 4  # version of `decimate`; part of the cache's key
_NEAR, _FAR = 0.02, 12.0  # m, clipping planes
_STILL_SAMPLES, _STILL_SHADOWS = 16, 8192


class Renderer:
    """Draws simulator `state_name`. `render` for every frame, `still` for pictures to keep.

    width, height: px. cache: folder for decimated meshes, default ~/.cache/vipra_ros.
    Raises StateError if no such simulator comes up within `timeout_s`, or if it simulates another scene.
    """

    def __init__(
        self,
        workcell: Workcell,
        state_name: str,
        width: int,
        height: int,
        cache: Path | None = None,
        timeout_s: float = 10.0,
    ):
        self._workcell, self._size = workcell, (width, height)
        self._cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vipra_ros"
        self._state = SharedState.attach(state_name, timeout_s)
        self._painter = Painter(workcell, width, height, live_meshes(self._cache))
        if cell.signature(self._painter.model) != self._state.facts.signature:
            self.close()
            raise StateError(f"simulator {state_name!r} runs another workcell than the one to be drawn")

    @property
    def model(self) -> mujoco.MjModel:
        return self._painter.model

    @property
    def state(self) -> SharedState:
        return self._state

    def render(self) -> tuple[np.ndarray, float]:
        """(rgb uint8 [height, width, 3], simulated time of the picture in s)."""
        snapshot = self._state.snapshot()
        return self._painter.paint(snapshot.qpos), snapshot.time_s

    def still(self, width: int | None = None, height: int | None = None) -> tuple[np.ndarray, float]:
        """As `render` with full meshes, shadows and many samples. Takes seconds; other sizes are allowed."""
        snapshot = self._state.snapshot()
        painter = Painter(self._workcell, width or self._size[0], height or self._size[1], None)
        try:
            return painter.paint(snapshot.qpos), snapshot.time_s
        finally:
            painter.close()

    def close(self) -> None:
        self._painter.close()
        self._state.close()


def intrinsics(workcell: Workcell, width: int, height: int) -> np.ndarray:
    """Camera matrix [3, 3], px, of the drawn front camera: a pinhole with square pixels and no distortion."""
    focal = 0.5 * height / math.tan(math.radians(workcell.front_camera.vertical_fov_deg) / 2)
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def project(workcell: Workcell, points: np.ndarray, width: int, height: int) -> np.ndarray:
    """World points [n, 3] m to pixels [n, 2] (x right, y down) of the front camera."""
    right, down, forward = _camera_axes(workcell)
    relative = np.asarray(points, float) - workcell.front_camera.position_xyz
    in_camera = relative @ np.stack([right, down, forward], axis=1)
    pixels = in_camera @ intrinsics(workcell, width, height).T
    return pixels[:, :2] / pixels[:, 2:]


class Painter:
    """One MuJoCo scene and its GL context. meshes: name -> decimated file, or None for full quality.

    part: rows and columns of the picture, which alone are drawn; the same pixels as cut out of all of it.
    """

    def __init__(
        self,
        workcell: Workcell,
        width: int,
        height: int,
        meshes: dict[str, Path] | None,
        part: tuple[slice, slice] | None = None,
    ):
        self.live = meshes is not None
        rows, columns = part or (slice(0, height), slice(0, width))
        # in half heights of the picture, as frusta are given: top, bottom, centre from left to right
        self._frustum = (
            1 - 2 * rows.start / height,
            1 - 2 * rows.stop / height,
            (columns.start + columns.stop - width) / height,
        )
        self.workcell = workcell
        scene, assets = scenery(workcell, width, height, meshes)
        self.model = mujoco.MjModel.from_xml_string(ET.tostring(scene, encoding="unicode"), assets)
        self.data = mujoco.MjData(self.model)
        self.renderer = mujoco.Renderer(self.model, rows.stop - rows.start, columns.stop - columns.start)
        self._props = [
            (self.model.body(p.name).id, _disc_radius(p)) for p in workcell.props if p.kind != "cloth"
        ]
        self._options = mujoco.MjvOption()
        self._options.flags[int(mujoco.mjtVisFlag.mjVIS_FLEXEDGE)] = False

    def paint(self, qpos: np.ndarray) -> np.ndarray:
        model, data, renderer = self.model, self.data, self.renderer
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)  # places lights and cameras need
        mujoco.mj_camlight(model, data)
        mujoco.mj_flex(model, data)
        renderer.update_scene(data, CAMERA, self._options)
        scene = renderer.scene
        for camera in scene.camera:
            top = camera.frustum_top
            top, camera.frustum_bottom, camera.frustum_center = (top * x for x in self._frustum)
            camera.frustum_top = top
        scene.flags[int(mujoco.mjtRndFlag.mjRND_SHADOW)] = not self.live
        scene.flags[int(mujoco.mjtRndFlag.mjRND_REFLECTION)] = False
        if self.live:
            self._add_discs(scene, data)
        return renderer.render()

    def _add_discs(self, scene, data) -> None:
        """Contact shadows: translucent discs on the table that fade as the object rises."""
        top = self.workcell.table.centre_xyz[2]
        for body, radius in self._props:
            x, y, z = data.xpos[body]
            fade = max(0.0, 1.0 - (z - top) / 0.25)
            for layer, share in enumerate((1.45, 1.25, 1.08)):
                if fade <= 0.0 or scene.ngeom == scene.maxgeom:
                    break
                geom = scene.geoms[scene.ngeom]
                size = np.array([radius * share, 0.0004, 0.0])
                place = np.array([x + 0.006, y - 0.006, top + 0.0005 + 0.0002 * layer])
                colour = np.array([0.05, 0.03, 0.02, 0.22 * fade], np.float32)
                mujoco.mjv_initGeom(
                    geom, mujoco.mjtGeom.mjGEOM_CYLINDER, size, place, np.eye(3).ravel(), colour
                )
                geom.specular = geom.shininess = 0.0
                scene.ngeom += 1

    def close(self) -> None:
        self.renderer.close()


# --- the scene as a picture ---------------------------------------------------------------------------------


def scenery(
    workcell: Workcell, width: int, height: int, meshes: dict[str, Path] | None
) -> tuple[ET.Element, dict[str, bytes]]:
    """MJCF of the workcell to look at, and its texture files. Joints are those of the physics scene."""
    live = meshes is not None
    scene = cell.build(workcell).scene
    world, asset = scene.find("worldbody"), scene.find("asset")
    for parent in world.iter():  # nothing collides in a picture
        for geom in list(parent.findall("geom")):
            if geom.get("class") != "visual":
                parent.remove(geom)
    for light in world.findall("light"):
        world.remove(light)
    for mesh in list(asset.findall("mesh")):
        if mesh.get("file").endswith("_coll.stl"):
            asset.remove(mesh)
        elif live:
            mesh.set("file", str(meshes[mesh.get("file")]))
    for section in ("contact", "actuator", "tendon", "equality"):
        scene.remove(scene.find(section))
    _set_quality(scene, width, height, live)
    _set_materials(asset)
    files = {"wood.png": png(wood()), "wall.png": png(plaster()), "floor.png": png(floorboards())}
    files |= {
        f"{prop.name}.png": png(pattern(prop.pattern)) for prop in workcell.props if prop.pattern != "plain"
    }
    _add_room(asset, world)
    _add_table(world, workcell)
    for prop in workcell.props:
        _add_prop(asset, world, prop, segments=28 if live else 96)
    for flex in scene.iter("flex"):
        _dress(flex)
    _add_lights(world, live)
    right, down, _ = _camera_axes(workcell)
    view = workcell.front_camera
    ET.SubElement(
        world,
        "camera",
        name=CAMERA,
        pos=_text(view.position_xyz),
        xyaxes=_text([*right, *-down]),
        fovy=str(view.vertical_fov_deg),
    )
    return scene, files


def _camera_axes(workcell: Workcell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors right, down, forward of the front camera in world."""
    view = workcell.front_camera
    forward = np.subtract(view.look_at_xyz, view.position_xyz)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    return right, np.cross(forward, right), forward


def _set_quality(scene: ET.Element, width: int, height: int, live: bool) -> None:
    scene.remove(scene.find("visual"))
    visual = ET.SubElement(scene, "visual")
    ET.SubElement(visual, "global", offwidth=str(width), offheight=str(height))
    ET.SubElement(
        visual,
        "quality",
        offsamples="0" if live else str(_STILL_SAMPLES),
        shadowsize="0" if live else str(_STILL_SHADOWS),
    )
    ET.SubElement(
        visual, "headlight", ambient="0.34 0.34 0.35", diffuse="0.18 0.18 0.18", specular="0.05 0.05 0.05"
    )
    # MuJoCo multiplies these by the model's extent, which is set to 1 m below.
    ET.SubElement(visual, "map", znear=str(_NEAR), zfar=str(_FAR), shadowclip="2.5", shadowscale="0.8")
    ET.SubElement(scene, "statistic", extent="1", center="0.3 0 0.9")


def _set_materials(asset: ET.Element) -> None:
    """Franka's painted shells and dark plastics; franky-sim's are pure white and flat."""
    looks = {
        "white": ("0.88 0.89 0.90 1", "0.45", "0.55"),
        "off_white": ("0.84 0.86 0.87 1", "0.4", "0.5"),
        "black": ("0.10 0.10 0.11 1", "0.35", "0.4"),
        "gray": ("0.62 0.63 0.65 1", "0.4", "0.5"),
        "red": ("0.75 0.08 0.05 1", "0.3", "0.4"),
    }
    for material in asset.findall("material"):
        if material.get("name") in looks:
            colour, specular, shininess = looks[material.get("name")]
            material.set("rgba", colour)
            material.set("specular", specular)
            material.set("shininess", shininess)


def _add_room(asset: ET.Element, world: ET.Element) -> None:
    for kind in ("material", "texture"):
        asset.remove(asset.find(f"{kind}[@name='ground_checker']"))
    for name in ("wood", "wall", "floor"):
        ET.SubElement(asset, "texture", name=name, type="2d", file=f"{name}.png")
    ET.SubElement(
        asset,
        "texture",
        type="skybox",
        builtin="gradient",
        rgb1="0.80 0.82 0.84",
        rgb2="0.62 0.63 0.65",
        width="64",
        height="384",
    )
    ET.SubElement(
        asset,
        "material",
        name="wood",
        texture="wood",
        texrepeat="1 1",
        specular="0.18",
        shininess="0.3",
        reflectance="0",
    )
    ET.SubElement(
        asset, "material", name="wall", texture="wall", texuniform="true", texrepeat="0.5 0.5", specular="0"
    )
    ET.SubElement(
        asset,
        "material",
        name="floor",
        texture="floor",
        texuniform="true",
        texrepeat="0.7 0.7",
        specular="0.1",
        shininess="0.2",
    )
    ET.SubElement(asset, "material", name="steel", rgba="0.30 0.31 0.33 1", specular="0.4", shininess="0.5")
    ET.SubElement(world, "geom", type="plane", size="6 6 0.1", material="floor")
    ET.SubElement(world, "geom", type="plane", size="6 6 0.1", pos="-1.3 0 2", zaxis="1 0 0", material="wall")
    ET.SubElement(world, "geom", type="box", size="0.012 6 0.05", pos="-1.29 0 0.05", rgba="0.86 0.86 0.85 1")


def _add_table(world: ET.Element, workcell: Workcell) -> None:
    body = next(b for b in world.findall("body") if b.get("name") == "table")
    size_x, size_y = workcell.table.size_xy
    top = workcell.table.centre_xyz[2]
    half = cell.TABLE_THICKNESS / 2
    ET.SubElement(body, "geom", type="box", size=f"{size_x / 2} {size_y / 2} {half}", material="wood")
    height = (top - 2 * half) / 2
    for x in (-1, 1):
        for y in (-1, 1):
            ET.SubElement(
                body,
                "geom",
                type="box",
                size=f"0.03 0.03 {height}",
                pos=f"{x * (size_x / 2 - 0.06)} {y * (size_y / 2 - 0.06)} {-half - height}",
                material="steel",
            )
    for base in workcell.arms.values():  # a mounting plate under each arm
        x, y, _ = np.subtract(base.xyz, workcell.table.centre_xyz)
        ET.SubElement(
            body,
            "geom",
            type="box",
            size="0.13 0.12 0.004",
            pos=f"{x - 0.03 * math.cos(base.yaw_rad)} {y - 0.03 * math.sin(base.yaw_rad)} {half + 0.001}",
            quat=f"{math.cos(base.yaw_rad / 2)} 0 0 {math.sin(base.yaw_rad / 2)}",
            material="steel",
        )


def _add_prop(asset: ET.Element, world: ET.Element, prop: Prop, segments: int) -> None:
    body = next(b for b in world.findall("body") if b.get("name") == prop.name)
    material = ET.SubElement(
        asset,
        "material",
        name=prop.name,
        rgba=f"{_text(prop.rgb)} 1",
        specular="0" if prop.kind == "cloth" else "0.5",
        shininess="0.6",
        reflectance="0",
    )
    if prop.pattern != "plain":
        ET.SubElement(asset, "texture", name=prop.name, type="2d", file=f"{prop.name}.png")
        material.set("texture", prop.name)
    looks = dict(contype="0", conaffinity="0", mass="0", group="2")
    if prop.kind == "cloth":
        middle, half = cloth.KNOB_HEIGHT / 2 - cloth.RADIUS, cloth.KNOB_HEIGHT / 2
        ET.SubElement(
            body,
            "geom",
            type="cylinder",
            size=f"{cloth.KNOB_RADIUS} {half}",
            pos=f"0 0 {middle}",
            rgba="0.75 0.57 0.36 1",
            **looks,
        )
        return
    if prop.kind == "box":
        size, pos = _text(cell.BOX), f"0 0 {cell.BOX[2]}"
        ET.SubElement(body, "geom", type="box", size=size, pos=pos, material=prop.name, **looks)
        return
    vertices, faces = lathe(_outline(cell.PROFILES[prop.kind], fine=segments > 40), segments)
    ET.SubElement(
        asset,
        "mesh",
        name=prop.name,
        vertex=" ".join(f"{v:.5f}" for v in vertices.ravel()),
        face=" ".join(map(str, faces.ravel())),
        inertia="shell",
    )
    ET.SubElement(body, "geom", type="mesh", mesh=prop.name, material=prop.name, **looks)


def _dress(flex: ET.Element) -> None:
    """The cloth's look: the material of its name, with the texture spread over it once."""
    flex.set("material", flex.get("name"))
    flex.set("texcoord", _text((cloth.grid(1.0)[:, :2] + 0.5).ravel()))
    del flex.attrib["rgba"]


def _add_lights(world: ET.Element, live: bool) -> None:
    """A soft key from above and the camera's left, a cool fill from its right, a rim from behind."""
    for name, position, direction, diffuse, shadow in (
        ("key", "1.1 -0.9 2.9", "-0.32 0.30 -0.9", "0.46 0.45 0.43", True),
        ("fill", "0.9 1.6 2.3", "-0.3 -0.6 -0.75", "0.22 0.23 0.25", False),
        ("rim", "-1.0 0.2 2.6", "0.5 -0.1 -0.85", "0.16 0.16 0.17", False),
    ):
        ET.SubElement(
            world,
            "light",
            name=name,
            pos=position,
            dir=direction,
            type="directional",
            diffuse=diffuse,
            specular="0.20 0.20 0.19" if shadow else "0.05 0.05 0.05",
            castshadow="true" if shadow and not live else "false",
        )


def _disc_radius(prop: Prop) -> float:
    return cell.BOX[0] if prop.kind == "box" else cell.PROFILES[prop.kind][0][1]


def _text(values) -> str:
    return " ".join(f"{v:.6g}" for v in values)


# --- shapes -------------------------------------------------------------------------------------------------


def _outline(profile: tuple, fine: bool) -> np.ndarray:
    """Closed section (radius, height) [n, 2]: up the outside, over a rounded rim, down any inside."""
    outer = [(0.0, 0.0)] + [(o, h) for h, o, _ in profile]
    if not profile[-1][2]:
        return np.array([*outer, (0.0, profile[-1][0])])
    inner = [(i, h) for h, _, i in reversed(profile[1:])] + [(0.0, profile[1][0])]
    height, out, inn = profile[-1]
    count = 6 if fine else 3
    angles = np.linspace(0, math.pi, count + 1)[1:-1]
    middle, half = (out + inn) / 2, (out - inn) / 2
    rim = [(middle + half * math.cos(a), height + half * math.sin(a)) for a in angles]
    return np.array(outer + rim + inner)


def lathe(outline: np.ndarray, segments: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn a section (radius, height) [n, 2] m about z: vertices [m, 3], faces [k, 3], outward.

    Edges of the section stay sharp: each of its segments has rings of its own.
    """
    angles = np.linspace(0, 2 * math.pi, segments, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    vertices, faces = [], []
    for (r0, h0), (r1, h1) in itertools.pairwise(outline):
        start = sum(len(v) for v in vertices)
        for r, h in ((r0, h0), (r1, h1)):
            vertices.append(np.column_stack([circle * max(r, 1e-5), np.full(segments, h)]))
        for k in range(segments):
            a, b = start + k, start + (k + 1) % segments
            faces += [(a, b, b + segments), (a, b + segments, a + segments)]
    return np.concatenate(vertices), np.array(faces)


def live_meshes(cache: Path) -> dict[str, Path]:
    """File name -> decimated copy of each visual mesh; made on first use, kept by content hash."""
    cache.mkdir(parents=True, exist_ok=True)
    found = {}
    for source in cell.visual_meshes():
        key = hashlib.sha256(source.read_bytes() + bytes([_DECIMATION])).hexdigest()[:16]
        target = cache / f"{source.stem}-{key}.stl"
        if not target.is_file():
            part = target.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(stl(*decimate(*_load(source))))
            os.replace(part, target)  # another process may be making the same
        found[source.name] = target
    return found


def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [n, 3] and triangles [m, 3] of an OBJ file of triangles."""
    vertices, corners = [], []
    for line in path.read_text().splitlines():
        if line.startswith("v "):
            vertices.append(line[2:])
        elif line.startswith("f "):
            corners += [corner.split("/", 1)[0] for corner in line[2:].split()]
    points = np.array(" ".join(vertices).split(), float).reshape(-1, 3)
    return points, np.array(corners, int).reshape(-1, 3) - 1


def decimate(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Snap to a grid of up to 4 mm, weld, then simplify to what the part's size deserves.

    The simplifier alone stalls on these meshes: their vertices are split along every crease.
    """
    import fast_simplification

    extent = np.sort(np.ptp(vertices, axis=0))
    grid = float(np.clip(extent[1] / 28, 0.0008, 0.004))
    cells, inverse = np.unique(np.round(vertices / grid).astype(int), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    counts = np.bincount(inverse, minlength=len(cells))
    welded = np.stack([np.bincount(inverse, vertices[:, k], len(cells)) / counts for k in range(3)], axis=1)
    faces = inverse[faces]
    whole = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    faces = faces[whole]
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    faces = faces[np.sort(first)]
    goal = int(np.clip(2200 * np.linalg.norm(extent), 50, 600))
    if len(faces) > goal:
        welded, faces = fast_simplification.simplify(
            welded.astype(np.float32), faces.astype(np.int32), 1.0 - goal / len(faces)
        )
    return np.asarray(welded, np.float32), np.asarray(faces, np.int32)


def stl(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """Binary STL."""
    record = np.zeros(
        len(faces), np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("rest", "<u2")])
    )
    record["corners"] = vertices[faces]
    return bytes(80) + struct.pack("<I", len(faces)) + record.tobytes()


# --- textures -----------------------------------------------------------------------------------------------


def _noise(random, height: int, width: int, cells_y: int, cells_x: int) -> np.ndarray:
    """Smooth random field [height, width] in 0..1 that tiles."""
    coarse = random.random((cells_y, cells_x))
    y, x = np.arange(height) * cells_y / height, np.arange(width) * cells_x / width
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0)[:, None], (x - x0)[None, :]
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    y1, x1 = (y0 + 1) % cells_y, (x0 + 1) % cells_x
    top = coarse[np.ix_(y0, x0)] * (1 - fx) + coarse[np.ix_(y0, x1)] * fx
    bottom = coarse[np.ix_(y1, x0)] * (1 - fx) + coarse[np.ix_(y1, x1)] * fx
    return top * (1 - fy) + bottom * fy


def wood(size: int = 1024, planks: int = 5) -> np.ndarray:
    """A light oak top of glued planks, rgb uint8 [size, size, 3]."""
    random = np.random.default_rng(7)
    picture = np.zeros((size, size, 3))
    edges = np.linspace(0, size, planks + 1).astype(int)
    light, dark = np.array([0.80, 0.64, 0.45]), np.array([0.60, 0.43, 0.27])
    for top, bottom in itertools.pairwise(edges):
        rows = bottom - top
        wave = _noise(random, rows, size, 3, 4) * 2.2 + _noise(random, rows, size, 2, 2)
        across = np.linspace(0, 1, rows)[:, None]
        rings = 0.5 + 0.5 * np.sin(2 * math.pi * (across * random.uniform(2.5, 4.5) + wave * 0.55))
        fibre = _noise(random, rows, size, max(rows // 2, 2), 10)
        tone = np.clip(0.30 * rings**2 + 0.28 * fibre + random.uniform(-0.03, 0.22), 0, 1)[..., None]
        picture[top:bottom] = light * (1 - tone) + dark * tone
        picture[top : top + 2] *= 0.82
    return _bytes(picture)


def plaster(size: int = 256) -> np.ndarray:
    """A pale wall, rgb uint8."""
    random = np.random.default_rng(11)
    field = 0.5 * _noise(random, size, size, 6, 6) + 0.5 * _noise(random, size, size, 64, 64)
    return _bytes(np.array([0.90, 0.89, 0.86]) * (0.97 + 0.05 * field[..., None]))


def floorboards(size: int = 256) -> np.ndarray:
    """Grey lab floor with joints, rgb uint8."""
    random = np.random.default_rng(13)
    field = 0.6 * _noise(random, size, size, 8, 8) + 0.4 * _noise(random, size, size, 128, 128)
    picture = np.array([0.46, 0.47, 0.49]) * (0.9 + 0.2 * field[..., None])
    picture[:2] *= 0.8
    picture[:, :2] *= 0.8
    return _bytes(picture)


def pattern(name: str, size: int = 256, cells: int = 6) -> np.ndarray:
    """Rgb uint8 [size, size, 3] of a `config.workcell.Pattern`, light where the object's own colour shows."""
    v, u = np.mgrid[0:size, 0:size] * cells / size
    dark = {
        "plain": np.zeros_like(u, bool),
        "checked": (np.floor(u) + np.floor(v)) % 2 == 1,
        "striped": u % 1 < 0.5,
        "dotted": np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.25,
    }[name]
    return _bytes(np.repeat(np.where(dark, 0.45, 1.0)[..., None], 3, axis=2))


def _bytes(picture: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)


def png(picture: np.ndarray) -> bytes:
    """Encode rgb uint8 [h, w, 3]."""
    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes()))
        + chunk(b"IEND", b"")
    )
