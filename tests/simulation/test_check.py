"""The checker finds what a record violates, and nothing else."""

import numpy as np
import pytest

from simulation.check import FR3, acceleration, extremes, violations

HOME = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398])


def _record(joint: int = 0, amplitude: float = 0.0, frequency: float = 1.0, seconds: float = 2.0) -> dict:
    """Two arms at home; the left one's `joint` on a sine of `amplitude` rad at `frequency` Hz."""
    t = np.arange(0.001, seconds, 0.001)
    w = 2 * np.pi * frequency
    q, dq = np.tile(HOME, (len(t), 2, 1)), np.zeros((len(t), 2, 7))
    q[:, 0, joint] += amplitude * np.sin(w * t)
    dq[:, 0, joint] = amplitude * w * np.cos(w * t)
    return {
        "t": t,
        "q": q,
        "dq": dq,
        "tau_cmd": np.zeros_like(q),
        "torque_control": np.ones(q.shape[:2], bool),
        "arms": np.array(["left", "right"]),
    }


def test_a_clean_motion_has_no_violations():
    assert violations(_record(0, 0.2, 1.0)) == {}


def test_each_kind_is_found_at_its_joint_and_only_there():
    assert set(violations(_record(3, 2.3, 0.1, 10.0))) == {"position"}
    assert list(violations(_record(3, 2.3, 0.1, 10.0))["position"]) == ["left_joint4"]
    fast = violations(_record(0, 2.0, 0.25))  # 3.14 rad/s, 4.9 rad/s2
    assert set(fast) == {"velocity"} and list(fast["velocity"]) == ["left_joint1"]
    jerky = violations(_record(6, 0.02, 5.0))  # .63 rad/s, 19.7 rad/s2
    assert set(jerky) == {"acceleration"} and list(jerky["acceleration"]) == ["left_joint7"]


def test_counts_are_samples():
    record = _record()
    record["dq"][100:117, 1, 2] = FR3.dq[2] + 0.01
    assert violations(record)["velocity"] == {"right_joint3": 17}


def test_acceleration_is_that_of_a_ramp_and_ignores_one_noisy_millisecond():
    t = np.arange(1000) * 0.001
    dq = (3.0 * t)[:, None]
    np.testing.assert_allclose(acceleration(t, dq)[10:-10], 3.0, atol=1e-9)
    dq[500] += 0.01  # 10 rad/s2 over 1 ms, .01/.01 s = 1 rad/s2 over the window
    assert np.abs(acceleration(t, dq)[10:-10] - 3.0).max() < 1.01


def test_a_record_with_gaps_is_refused():
    record = _record()
    record["t"] = np.concatenate([record["t"][:500], record["t"][500:] + 0.5])
    with pytest.raises(ValueError, match="gaps"):
        violations(record)


def test_torque_steps_count_under_torque_control_only():
    record = _record()
    record["tau_cmd"][300:, 0, 1] = 5.0
    assert extremes(record)["torque_step_nm"] == 5.0
    record["torque_control"][300] = False
    assert extremes(record)["torque_step_nm"] == 0.0


def test_an_empty_record_is_clean():
    record = {k: v[:0] if k != "arms" else v for k, v in _record().items()}
    assert violations(record) == {}
    assert extremes(record)["velocity_rad_s"] == 0.0
