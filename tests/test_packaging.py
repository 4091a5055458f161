"""Installed by pip or by colcon, the package brings its launch files, configuration and executables."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NODES = ("camera", "arms", "policy", "teleop", "recorder", "policy_server", "simulator")
PROGRAMS = {"vipra", *(f"vipra_{name}" for name in NODES)}
LAUNCH = {path.name for path in (ROOT / "launch").glob("*.launch.py")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git would give a newcomer: building writes into the source folder."""
    copy = tmp_path_factory.mktemp("checkout") / "vipra_ros"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def run(*argv, cwd, **environment):
    drop = ("PYTHONPATH", "AMENT_PREFIX_PATH", "COLCON_PREFIX_PATH")
    env = {k: v for k, v in os.environ.items() if k not in drop} | environment
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(map(str, argv))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_pip_install_finds_its_configuration_and_puts_commands_on_the_path(source, tmp_path):
    target = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
        source,
        cwd=tmp_path,
    )
    code = (
        "from config.loading import load, root; from config.robot import Robot; from pathlib import Path;"
        "robots = sorted((root() / 'config/robots').glob('*.yaml'));"
        "print(root()); print(*[load(Robot, path.stem).embodiment for path in robots])"
    )
    found, embodiments = run(
        sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(target)
    ).splitlines()
    share = target / "share" / "vipra_ros"
    assert Path(found) == share
    assert set(embodiments.split()) == {"franka_bimanual", "franka_single"}
    assert {p.name for p in (share / "launch").glob("*.py")} == LAUNCH
    assert {p.name for p in (target / "bin").iterdir()} >= PROGRAMS
    checkpoints = {p.relative_to(ROOT) for p in (ROOT / "checkpoints").rglob("*") if p.is_file()}
    assert all((share / p).is_file() for p in checkpoints)


def test_every_folder_of_ours_is_a_package_that_gets_installed():
    for package in ("config", "models", "policy_server", "simulation", "training", "vipra_ros"):
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py: not installed"


@pytest.mark.parametrize("symlink", [False, True], ids=["copied", "symlinked"])
def test_colcon_build_puts_files_where_ros2_looks(source, tmp_path, symlink):
    pytest.importorskip("colcon_core", reason="colcon is not installed: pip install colcon-common-extensions")
    colcon = Path(sys.executable).with_name("colcon")
    flags = ["--symlink-install"] if symlink else []
    path = f"{colcon.parent}{os.pathsep}{os.environ['PATH']}"
    build = [colcon, "--log-base", tmp_path / "log", "build", "--base-paths", source, *flags]
    build += ["--build-base", tmp_path / "build", "--install-base", tmp_path / "install"]
    run(*build, cwd=tmp_path, PATH=path)
    prefix = tmp_path / "install" / "vipra_ros"
    assert {p.name for p in (prefix / "share/vipra_ros/launch").glob("*.py")} == LAUNCH
    assert (prefix / "share/vipra_ros/config/robots/sim_bimanual.yaml").is_file()
    assert (prefix / "share/vipra_ros/package.xml").is_file()
    assert (prefix / "share/ament_index/resource_index/packages/vipra_ros").is_file()
    for name in PROGRAMS:
        executable = prefix / "lib/vipra_ros" / name
        assert executable.is_file() and os.access(executable, os.X_OK), name
    shebang = (prefix / "lib/vipra_ros/vipra_arms").read_text().splitlines()[0]
    assert Path(shebang[2:].split()[0]).resolve() == Path(sys.executable).resolve()
    sourced = f". {tmp_path}/install/setup.sh && cd / && {prefix}/lib/vipra_ros/vipra up single --list"
    assert "robot:=franka_single" in run("sh", "-c", sourced, cwd=tmp_path, PATH=path)
