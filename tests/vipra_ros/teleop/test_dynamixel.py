"""ROBOTIS's own SDK against servos of our own on a pseudo-terminal: read, wrapped, damaged, unplugged."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.loading import ConfigError, load, parse
from config.teleop import Dynamixel, Teleop
from tests.vipra_ros.teleop.dynamixel_emulator import Bus, crc16
from vipra_ros.process import wait_for
from vipra_ros.teleop import calibrate, cli
from vipra_ros.teleop.dynamixel import LeaderError, Reader, Servos, median_counts
from vipra_ros.teleop.servos import POSE_RAD, TURN, CalibrationError, Unwrapped, offsets_in_pose

pytestmark = pytest.mark.live

IDS = tuple(range(1, 9))
SIGNS = np.array((1, -1, 1, -1, 1, 1, 1))
OFFSETS = np.array((0.0, math.pi / 2, math.pi, math.pi, math.pi, 3 * math.pi / 2, 0.0))
OPEN, CLOSED = 3.22, 2.0


def counts_of(joints, opening=1.0, turns=0) -> dict[int, int]:
    """What a GELLO's servos count at `joints` [7] rad, `turns` whole turns further."""
    angles = [*(SIGNS * np.asarray(joints) + OFFSETS), CLOSED + opening * (OPEN - CLOSED)]
    return {n + 1: round(a * TURN / (2 * math.pi)) + turns * TURN for n, a in enumerate(angles)}


def dynamixel(port="/dev/null", **changes) -> Dynamixel:
    values = {
        "port": str(port),
        "offsets_rad": OFFSETS.tolist(),
        "signs": SIGNS.tolist(),
        "gripper_open_rad": OPEN,
        "gripper_closed_rad": CLOSED,
    }
    return parse(Dynamixel, {**values, **changes}, "test")


@pytest.fixture
def bus(tmp_path):
    with Bus(tmp_path / "gello", counts_of(POSE_RAD)) as bus:
        yield bus


@pytest.fixture
def servos(bus):
    with Servos(str(bus.path), 57600, IDS) as servos:
        yield servos


# --- the emulator is held to published numbers first


def test_the_emulators_checksum_is_the_protocols():
    """The examples of ROBOTIS's e-Manual, protocol 2.0: ping of servo 1, and its answer."""
    assert crc16(bytes.fromhex("FFFFFD00010300 01")) == 0x4E19
    assert crc16(bytes.fromhex("FFFFFD000107005500060426")) == 0x5D65


# --- the bus


def test_all_servos_are_found_and_read_in_order(bus, servos):
    assert servos.missing() == []
    bus.counts = {n: 100 * n for n in IDS}
    assert servos.read().tolist() == [100 * n for n in IDS]


def test_negative_counts_counts_beyond_a_turn_and_header_bytes_in_the_data_are_read(bus, servos):
    bus.counts |= {1: -5, 2: 5 * TURN + 3, 3: 0x00FDFFFF, 4: -(2**31)}
    assert servos.read()[:4].tolist() == [-5, 5 * TURN + 3, 0x00FDFFFF, -(2**31)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p[:-1],
        lambda p: p[3:],
        lambda p: b"",
        lambda p: p[:-3] + bytes([p[-3] ^ 1]) + p[-2:],
        lambda p: b"\xff\xff" + p[:6],
    ],
    ids=["last byte lost", "header lost", "nothing", "a bit flipped", "cut short"],
)
def test_a_damaged_answer_is_no_answer_and_the_next_one_is_read(bus, servos, spoil):
    bus.spoil = spoil
    assert servos.read() is None
    bus.spoil = None
    assert wait_for(lambda: servos.read() is not None, 5, "a whole answer", poll_s=0.0)
    assert servos.read()[0] == bus.counts[1]


def test_a_silent_servo_is_named(bus, servos):
    bus.silent = {3, 8}
    assert servos.read() is None and servos.missing() == [3, 8]
    with pytest.raises(LeaderError, match="servo 3, 8 does not answer"):
        median_counts(servos)


def test_ports_that_cannot_be_used_say_what_to_do(tmp_path, bus):
    with pytest.raises(LeaderError, match="no such device: is the GELLO plugged in"):
        Servos(str(tmp_path / "none"), 57600, IDS)
    with pytest.raises(LeaderError, match="1234 is no baud rate"):
        Servos(str(bus.path), 1234, IDS)


def test_without_the_sdk_the_error_says_how_to_get_it(monkeypatch, bus):
    monkeypatch.setitem(__import__("sys").modules, "dynamixel_sdk", None)
    with pytest.raises(LeaderError, match=r"pip install 'vipra_ros\[robot\]'"):
        Servos(str(bus.path), 57600, IDS)


def test_unplugging_is_a_lost_connection_not_a_hang(bus, servos):
    assert servos.read() is not None
    bus.unplug()
    with pytest.raises(LeaderError, match="connection lost: the device is gone"):
        servos.read()


# --- a reader


@pytest.fixture
def reader(bus):
    reader = Reader(dynamixel(bus.path), 100.0, time.monotonic)
    reader.start()
    yield reader
    reader.close()


def newest(reader):
    return wait_for(reader.take, 10, "a sample", poll_s=0.005)[-1]


def test_a_reader_gives_stamped_joints_and_opening(bus, reader):
    t, joints, opening = newest(reader)
    assert abs(time.monotonic() - t) < 5.0
    np.testing.assert_allclose(joints, POSE_RAD, atol=2e-3)
    assert opening == pytest.approx(1.0, abs=2e-3)
    assert reader.problem == ""
    bus.counts = counts_of(POSE_RAD + 0.1, 0.25)
    wait_for(lambda: newest(reader)[2] < 0.3, 5, "the trigger")
    np.testing.assert_allclose(newest(reader)[1], POSE_RAD + 0.1, atol=2e-3)


def test_a_reader_opens_the_port_again_after_it_was_unplugged(bus, reader):
    newest(reader)
    bus.unplug()
    wait_for(lambda: "connection lost" in reader.problem or "no such device" in reader.problem, 5, "the loss")
    reader.take()
    bus.counts = counts_of(POSE_RAD + 0.05, turns=2)  # power was gone: the servos count from elsewhere
    bus.plug()
    np.testing.assert_allclose(newest(reader)[1], POSE_RAD + 0.05, atol=2e-3)
    assert reader.problem == ""


def test_a_reader_goes_on_over_lost_answers_and_counts_them(bus, reader):
    newest(reader)
    drop = iter([True, False] * 1000)
    bus.spoil = lambda packet: packet[:-1] if packet[4] == 8 and next(drop) else packet
    wait_for(lambda: reader.lost >= 3, 10, "lost answers")
    assert newest(reader)[1] == pytest.approx(POSE_RAD, abs=2e-3)


def test_a_reader_opens_the_port_again_after_garbage_that_the_sdk_trips_over(bus, reader):
    newest(reader)
    bus.empty = True
    wait_for(lambda: "garbage: IndexError" in reader.problem, 10, "the problem")
    bus.empty = False
    reader.take()
    np.testing.assert_allclose(newest(reader)[1], POSE_RAD, atol=2e-3)
    assert reader.problem == ""


def test_a_reader_names_the_servo_that_fell_silent(bus, reader):
    newest(reader)
    bus.silent = {5}
    wait_for(lambda: "servo 5 does not answer" in reader.problem, 10, "its name")


# --- counts and joints


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-0.4, 0.4), min_size=2, max_size=60),
    st.integers(-3, 3),
    st.integers(0, 6),
    st.sampled_from([0, TURN]),
)
def test_joints_go_on_smoothly_wherever_the_counts_wrap(steps, turns, joint, modulus):
    """In either mode: counts that run on, and counts that start again at the end of a turn."""
    unwrapped, pose = Unwrapped(dynamixel()), POSE_RAD.copy()
    for step in [0.0, *steps]:
        pose[joint] += step
        counts = np.array(list(counts_of(pose, 0.3, turns).values()))
        joints, opening = unwrapped(counts % modulus if modulus else counts)
        np.testing.assert_allclose(joints, pose, atol=1e-3)
        assert opening == pytest.approx(0.3, abs=2e-3)


def test_a_joint_turned_once_round_while_uncoupled_is_where_it_looks_to_be():
    unwrapped = Unwrapped(dynamixel())

    def turned(by: float, anew: bool) -> float:
        counts = list(counts_of(POSE_RAD + by * np.eye(7)[6], 0.3, 0).values())
        return unwrapped(np.array(counts), anew)[0][6] - POSE_RAD[6]

    around = np.linspace(0.0, 2 * math.pi, 20)
    assert turned(0.0, True) == pytest.approx(0.0, abs=1e-3)
    assert [turned(by, False) for by in around] == pytest.approx(around, abs=2e-3)
    assert turned(2 * math.pi, True) == pytest.approx(0.0, abs=2e-3)
    assert [turned(by, True) for by in around[:9]] == pytest.approx(around[:9], abs=2e-3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=7, max_size=7),
    st.lists(st.sampled_from([-1, 1]), min_size=7, max_size=7),
    st.lists(st.floats(-0.3, 0.3), min_size=7, max_size=7),
    st.integers(-2, 2),
)
def test_offsets_are_found_in_the_pose_though_it_is_held_by_hand(quarters, signs, errors, turns):
    offsets = np.array(quarters) * math.pi / 2
    angles = np.array(signs) * POSE_RAD + offsets + np.array(errors)
    counts = np.round(angles * TURN / (2 * math.pi)).astype(int) + turns * TURN
    difference = np.abs(offsets_in_pose(counts, np.array(signs)) - offsets)
    np.testing.assert_allclose(np.minimum(difference, 2 * math.pi - difference), 0.0, atol=1e-9)


def test_a_joint_off_the_pose_is_named():
    counts = np.array(list(counts_of(POSE_RAD + np.array([0, 0, 0.6, 0, 0, 0, 0])).values()))
    with pytest.raises(CalibrationError, match=r"joint 3 is 0\.60 rad from the pose"):
        offsets_in_pose(counts, SIGNS)


# --- calibration


class Operator:
    """Does what the questions ask: poses, turns and the trigger of the GELLO on `bus`."""

    def __init__(self, bus, signs=SIGNS, fumble=0):
        self.bus, self.signs, self.fumble, self.said, self.asked = bus, signs, fumble, [], []

    def ask(self, text: str) -> str:
        self.asked.append(text)
        if text.startswith("Hold the GELLO"):
            self.joints, self.opening = POSE_RAD + 0.05, 1.0
            self.joints = self.joints + (0.6 if self.fumble > 0 else 0.0)
            self.fumble -= 1
        elif text.startswith("Joint"):
            self.joints = self.joints.copy()
            self.joints[int(text[6]) - 1] += 0.5
        self.opening = 0.0 if text.startswith("Squeeze") else 1.0
        angles = [*(self.signs * self.joints + OFFSETS), CLOSED + self.opening * (OPEN - CLOSED)]
        self.bus.counts = {n + 1: round(a * TURN / (2 * math.pi)) for n, a in enumerate(angles)}
        return ""


def test_calibration_finds_offsets_signs_and_trigger(bus, servos):
    operator = Operator(bus, fumble=1)
    found = calibrate.calibrate(servos, 57600, tuple(SIGNS), True, operator.ask, operator.said.append)
    np.testing.assert_allclose(found.offsets_rad, OFFSETS, atol=1e-3)
    assert found.signs == tuple(SIGNS) and found.gripper_id == 8
    assert (found.gripper_open_rad, found.gripper_closed_rad) == pytest.approx((OPEN, CLOSED), abs=2e-3)
    assert "from the pose" in operator.said[0] and len(operator.asked) == 2 + 7 + 2


def test_calibration_finds_a_servo_that_is_mounted_the_other_way_round(bus, servos):
    signs = SIGNS * np.array((1, 1, -1, 1, 1, 1, 1))
    operator = Operator(bus, signs)
    found = calibrate.calibrate(servos, 57600, tuple(SIGNS), True, operator.ask, operator.said.append)
    assert found.signs == tuple(signs) and any("signs are" in text for text in operator.said)
    np.testing.assert_allclose(found.offsets_rad, OFFSETS, atol=1e-3)


def test_the_verbs_write_a_file_that_reads_the_same_gello(bus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mine.yaml"
    operator = Operator(bus)
    monkeypatch.setattr("builtins.input", operator.ask)
    other = tmp_path / "another_name_of_it"
    other.symlink_to(bus.path)
    calibrate = ["calibrate", "--out", str(out), "--port"]
    assert cli.main([*calibrate, str(bus.path), "--arm", "left"]) == 0
    before = out.read_text()
    with pytest.raises(ConfigError, match="twice: one GELLO would lead both arms"):
        cli.main([*calibrate, str(bus.path), "--arm", "right"])
    assert out.read_text() == before
    assert cli.main([*calibrate, str(other), "--arm", "right"]) == 0
    config = load(Teleop, str(out))
    assert set(config.leaders) == {"left", "right"} and config.source == "dynamixel"
    bus.counts = counts_of(POSE_RAD + 0.2, 0.5)
    capsys.readouterr()
    assert cli.main(["read", "--arm", "left", "--teleop", str(out), "--seconds", "1"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "-1.371" in line and "trigger 0.50" in line and "lost" in line


@pytest.mark.parametrize(
    "text", ["leaders: {", "leaders:\n", "source: dynamixel\nleaders: {left: }\n", "[1]\n"]
)
def test_a_file_that_cannot_be_added_to_is_refused_before_the_first_pose(text, bus, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked for a pose"))
    out = tmp_path / "mine.yaml"
    out.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        cli.main(["calibrate", "--out", str(out), "--port", str(bus.path), "--arm", "left"])
    assert out.read_text() == text


def test_wrong_options_and_files_are_refused_with_the_fix(tmp_path):
    with pytest.raises(ConfigError, match="7 or 8 numbers"):
        cli.main(["calibrate", "--port", "none", "--arm", "left", "--ids", "1,2"])
    with pytest.raises(ConfigError, match="vipra gello calibrate --arm left"):
        cli.main(["read", "--arm", "left", "--teleop", "gello"])
    with pytest.raises(ConfigError, match=r"joint 2: offset 0\.3 is no multiple of pi/2"):
        dynamixel(offsets_rad=[0, 0.3, 0, 0, 0, 0, 0])
    with pytest.raises(ConfigError, match="each must be different"):
        dynamixel(ids=[1, 1, 3, 4, 5, 6, 7])
