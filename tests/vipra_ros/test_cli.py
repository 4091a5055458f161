"""The command answers quickly, on any machine, in one line when something is wrong."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERBS = ("serve", "up", "demo", "doctor", "keys", "init-checkpoint", "start", "stop", "recover", "home")


def vipra(*arguments, blocked=()):
    """Run the command as if the modules in `blocked` were not installed."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from vipra_ros.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


HELP = """
import contextlib, io, json, sys
from vipra_ros.cli import main
said = {}
for verb in ("", *sys.argv[1:]):
    sys.argv, out = ["vipra", *([verb] if verb else []), "--help"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main()
        except SystemExit as left:
            said[verb] = (left.code, out.getvalue())
print(json.dumps(said))
"""


def test_every_verb_is_listed_and_explains_itself():
    done = subprocess.run(
        [sys.executable, "-c", HELP, *VERBS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [verb for verb in VERBS if verb not in said[""][1]] == []
    assert [verb for verb in VERBS if said[verb][0] or "usage" not in said[verb][1].lower()] == []


@pytest.mark.parametrize(
    ("verb", "blocked", "extra"),
    [
        (["start"], ("rclpy",), "vipra_ros[robot]"),
        (["demo", "--duration", "2"], ("rclpy",), "vipra_ros[robot]"),
    ],
)
def test_missing_software_names_the_extra_that_brings_it(verb, blocked, extra):
    status, _, err = vipra(*verb, blocked=blocked)
    assert status == 1
    assert extra in err and len(err.strip().splitlines()) == 1


def test_serving_needs_no_ros():
    status, out, err = vipra("serve", "--help", blocked=("rclpy", "franky", "mujoco"))
    assert status == 0, err
    assert "--bind" in out


def test_bring_up_settings_are_listed():
    status, out, _ = vipra("up", "bimanual", "--list")
    assert status == 0
    for name in (
        "left_ip:=",
        "right_ip:=",
        "camera:=",
        "server:=",
        "policy:=",
        "rate:=",
        "discovery:=LOCALHOST",
    ):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["up", "bimanual", "speed:=3"], "unknown argument 'speed'"),
        (["up", "bimanual", "rate:=50"], "action_rate_hz"),
        (["up", "bimanual", "robot:=nobody"], "known robots"),
        (["up", "single", "robot:=sim_bimanual"], "vipra up bimanual"),
        (["up", "bimanual", "rate"], "NAME:=VALUE"),
    ],
)
def test_wrong_settings_end_in_one_line_before_anything_starts(arguments, says):
    status, _, err = vipra(*arguments)
    assert status != 0
    assert says in err and "Traceback" not in err


def test_random_checkpoint_can_be_loaded_and_is_not_called_anything_else(tmp_path):
    status, out, err = vipra(
        "init-checkpoint", "vipra_tiny", tmp_path / "random", "--embodiment", "franka_single"
    )
    assert status == 0, err
    assert "random weights of vipra_tiny for franka_single" in out
    from models.checkpoint import load

    assert load(tmp_path / "random").config.action_dim == 8
    status, _, err = vipra("init-checkpoint", "vipra_9b", tmp_path / "other")
    assert status == 1 and "known sizes are vipra_tiny, " in err


def test_keys_are_private_and_never_overwritten(tmp_path):
    status, out, err = vipra("keys", "server", "--out", tmp_path)
    assert status == 0, err
    secret = tmp_path / "server.key_secret"
    assert str(secret) in out and stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = secret.read_text()
    status, _, err = vipra("keys", "server", "--out", tmp_path)
    assert status == 1 and "exists" in err and secret.read_text() == before
