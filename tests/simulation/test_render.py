"""The front camera's picture from real EGL, in a process of its own: torch must not be near it."""

import json
import subprocess
import sys
from pathlib import Path

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
workcell, name, cache, out = sys.argv[1:5]
said = {"painted": []}
for width, height, kinds in json.loads(sys.argv[5]):
    renderer = Renderer(load(Workcell, workcell), name, width, height, cache=Path(cache))
    for kind in kinds:
        picture, stamp = renderer.still() if kind == "still" else renderer.render()
        np.save(f"{out}/{width}x{height}-{kind}.npy", picture)
        said["painted"].append(stamp)
    said |= {"faces": int(renderer.model.nmeshface), "time": renderer.state.time()}
    renderer.close()
print(json.dumps(said | {"torch": "torch" in sys.modules}))
"""
SIZE = (640, 360)


@pytest.fixture(scope="module")
def simulator():
    slot = reserve_slot()
    with running(slot) as it:
        yield it
    slot.release()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Of the meshes made and the pictures painted."""
    return tmp_path_factory.mktemp("meshes"), tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def paint(simulator, folders):
    """Run PAINT for (width, height, kinds) each; what it said, or the failed process."""

    def run(*jobs: tuple[int, int, list[str]], workcell: str = "bimanual"):
        command = [sys.executable, "-c", PAINT, workcell, simulator.name, *map(str, folders)]
        done = subprocess.run([*command, json.dumps(jobs)], capture_output=True, text=True, timeout=200)
        return json.loads(done.stdout) if done.returncode == 0 else done

    return run


@pytest.fixture(scope="module")
def pictures(paint, folders):
    """Path of each picture by (width, height, kind), painted in one process; and what that said."""
    said = paint((*SIZE, ["live", "still"]), (256, 256, ["live"]), (64, 64, ["live"]))
    assert isinstance(said, dict), said.stderr
    return lambda width, height, kind: np.load(folders[1] / f"{width}x{height}-{kind}.npy"), said


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
def test_each_cup_shows_its_colour_where_the_camera_model_puts_it(simulator, pictures, width, height, kind):
    picture = pictures[0](width, height, kind)
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
    assert not pictures[1]["torch"]


def test_the_picture_is_worth_looking_at(pictures):
    picture = pictures[0](*SIZE, "live")
    assert 60 < picture.mean() < 200
    assert picture.std() > 25
    overexposed = (picture == 255).all(axis=2).mean()
    black = (picture < 5).all(axis=2).mean()
    assert overexposed < 0.03 and black < 0.03


def test_hands_are_in_view_at_home(simulator, pictures):
    picture = pictures[0](*SIZE, "live")
    arms = simulator.control.truth()["arms"]
    pixels = _project([arm["tcp_position"] for arm in arms.values()], 640, 360)
    assert (pixels > 20).all() and (pixels < [620, 340]).all()
    link0 = _project(
        [[*base.xyz[:2], base.xyz[2] + 0.1] for base in load(Workcell, "bimanual").arms.values()], 640, 360
    )
    for pixel in link0:
        assert _colour_at(picture, pixel).std() < 30, "arms are white and black"


def test_stamps_are_simulated_time_and_run_on_and_live_meshes_are_small_and_made_once(
    simulator, pictures, paint, folders
):
    assert pictures[1]["faces"] < 20_000
    made = {path.name: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    assert len(made) > 30
    before = simulator.control.status()["time_s"]
    said = paint((64, 64, ["live", "live"]))
    first, second = said["painted"]
    assert before < first <= second <= said["time"]
    assert {path.name: path.stat().st_mtime_ns for path in folders[0].iterdir()} == made


def test_another_workcell_is_refused(paint):
    assert "another workcell" in paint((64, 64, ["live"]), workcell="single").stderr
