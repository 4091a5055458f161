"""The front camera's picture from real EGL, in a process of its own: torch must not be near it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from config.loading import load
from config.workcell import Workcell
from tests.simulation.running import running
from vipra_ros.process import reserve_slot

PAINT = """
import json, sys
from pathlib import Path
import numpy as np
from config.loading import load
from config.workcell import Workcell
from simulation.render import Renderer
workcell, name, width, height, kind, out = sys.argv[1:7]
renderer = Renderer(load(Workcell, workcell), name, int(width), int(height), cache=Path(sys.argv[7]))
picture, stamp = renderer.still() if kind == "still" else renderer.render()
again, later = renderer.render()
np.save(out, picture)
print(json.dumps({
    "stamp": stamp, "later": later, "faces": int(renderer.model.nmeshface), "torch": "torch" in sys.modules,
    "time": renderer.state.time(),
}))
renderer.close()
"""


@pytest.fixture(scope="module")
def simulator():
    slot = reserve_slot()
    with running(slot) as it:
        yield it
    slot.release()


@pytest.fixture(scope="module")
def paint(simulator, tmp_path_factory):
    cache, out = tmp_path_factory.mktemp("meshes"), tmp_path_factory.mktemp("pictures") / "picture.npy"

    def run(width: int, height: int, kind: str = "live", workcell: str = "bimanual", check: bool = True):
        command = [
            sys.executable,
            "-c",
            PAINT,
            workcell,
            simulator.name,
            str(width),
            str(height),
            kind,
            str(out),
        ]
        done = subprocess.run([*command, str(cache)], capture_output=True, text=True, timeout=120)
        if not check:
            return done
        assert done.returncode == 0, done.stderr
        return np.load(out), json.loads(done.stdout)

    run.cache = cache
    return run


def _colour_at(picture: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    x, y = np.round(pixel).astype(int)
    return picture[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(axis=0)


def _project(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pinhole by hand, from the configuration alone."""
    view = load(Workcell, "bimanual").front_camera
    forward = np.subtract(view.look_at_xyz, view.position_xyz)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right = right / np.linalg.norm(right)
    down = np.cross(forward, right)
    focal = 0.5 * height / np.tan(np.radians(view.vertical_fov_deg) / 2)
    p = np.asarray(points) - view.position_xyz
    depth = p @ forward
    return np.stack(
        [width / 2 + focal * (p @ right) / depth, height / 2 + focal * (p @ down) / depth], axis=1
    )


@pytest.mark.parametrize(
    ("width", "height", "kind"), [(640, 360, "live"), (256, 256, "live"), (640, 360, "still")]
)
def test_each_cup_shows_its_colour_where_the_camera_model_puts_it(simulator, paint, width, height, kind):
    picture, said = paint(width, height, kind)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    objects = simulator.control.truth()["objects"]
    for name, channel in (("red_cup", 0), ("green_cup", 1), ("blue_cup", 2)):
        pixel = _project([np.add(objects[name]["position"], [0, 0, 0.04])], width, height)[0]
        colour = _colour_at(picture, pixel)
        assert colour.argmax() == channel and colour.max() > 1.6 * np.delete(colour, channel).max(), (
            name,
            colour,
        )
    bowl = _colour_at(
        picture, _project([np.add(objects["bowl"]["position"], [0, 0, 0.006])], width, height)[0]
    )
    assert bowl.min() > 150, bowl
    assert not said["torch"]


def test_the_picture_is_worth_looking_at(paint):
    picture, _ = paint(640, 360)
    assert 60 < picture.mean() < 200
    assert picture.std() > 25
    overexposed = (picture == 255).all(axis=2).mean()
    black = (picture < 5).all(axis=2).mean()
    assert overexposed < 0.03 and black < 0.03


def test_hands_are_in_view_at_home(simulator, paint):
    picture, _ = paint(640, 360)
    arms = simulator.control.truth()["arms"]
    pixels = _project([arm["tcp_position"] for arm in arms.values()], 640, 360)
    assert (pixels > 20).all() and (pixels < [620, 340]).all()
    link0 = _project(
        [[*base.xyz[:2], base.xyz[2] + 0.1] for base in load(Workcell, "bimanual").arms.values()], 640, 360
    )
    for pixel in link0:
        assert _colour_at(picture, pixel).std() < 30, "arms are white and black"


def test_stamps_are_simulated_time_and_run_on(simulator, paint):
    before = simulator.control.status()["time_s"]
    _, said = paint(64, 64)
    assert before < said["stamp"] <= said["later"] <= said["time"]


def test_live_meshes_are_small_and_made_once(paint):
    _, said = paint(64, 64)
    assert said["faces"] < 20_000
    made = {path.name: path.stat().st_mtime_ns for path in paint.cache.iterdir()}
    assert len(made) > 30
    paint(64, 64)
    assert {path.name: path.stat().st_mtime_ns for path in paint.cache.iterdir()} == made


def test_another_workcell_is_refused(paint):
    done = paint(64, 64, workcell="single", check=False)
    assert done.returncode != 0
    assert "another workcell" in done.stderr
