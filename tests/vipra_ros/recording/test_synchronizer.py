"""Frames are of one moment, whatever the streams do."""

import numpy as np
import pytest

from tests.vipra_ros.recording.streams import CAMERA_HZ, HANDS, Streams, capture_of, commanded, measured
from vipra_ros.recording.synchronizer import KEPT_S, Frame, Synchronizer, Track


def record(seconds: float = 4.0, **options) -> tuple[list[Frame], Streams, Synchronizer]:
    change = options.pop("change", {})
    synchronizer = Synchronizer(15.0, CAMERA_HZ, HANDS)
    streams = Streams(synchronizer, **options)
    for name, function in change.items():
        setattr(streams, name, function)
    frames: list[Frame] = []
    poll = lambda now: frames.extend(synchronizer.take(now))  # noqa: E731
    streams.run(0.5, poll)
    assert not frames
    synchronizer.begin()
    streams.run(seconds, poll)
    return frames, streams, synchronizer


@pytest.mark.parametrize(("jitter_s", "seed"), [(0.0, 0), (0.004, 1), (0.008, 2)])
def test_every_frame_holds_picture_state_and_action_of_one_moment(jitter_s, seed):
    frames, _, _ = record(jitter_s=jitter_s, seed=seed)
    assert 57 <= len(frames) <= 60
    assert not any(f.repeated for f in frames)
    for frame in frames:
        assert frame.time_s == frame.capture_s == pytest.approx(capture_of(frame.rgb), abs=6e-4)
        np.testing.assert_allclose(frame.state, measured(frame.time_s), atol=3e-4)
        np.testing.assert_allclose(frame.action[:7], commanded(frame.time_s)[:7], atol=3e-4)
        assert frame.sync_error_s <= 0.5 / 100 + jitter_s + 1e-6
    steps = np.diff([f.time_s for f in frames])
    assert np.abs(steps - 1 / 15).max() <= 2 * jitter_s + 1e-5  # never another picture than the one due


def test_a_hand_command_is_held_until_the_next_one():
    frames, _, _ = record()
    assert {f.action[7] for f in frames} == {0.0, 1.0}


def test_lost_pictures_show_as_repeated_frames_with_their_true_error():
    lost = lambda t: 102.0 <= t < 102.25  # noqa: E731
    frames, _, _ = record(change={"lose": lost})
    repeated = [f for f in frames if f.repeated]
    assert 3 <= len(repeated) <= 4
    for frame in repeated:
        assert frame.capture_s < 102.0 <= frame.time_s
        assert frame.sync_error_s == pytest.approx(frame.time_s - frame.capture_s)
        np.testing.assert_allclose(frame.state, measured(frame.time_s), atol=3e-4)
    assert np.abs(np.diff([f.time_s for f in frames]) - 1 / 15).max() < 0.02  # the time line goes on


def test_a_stream_that_falls_silent_does_not_stop_the_others():
    frames, _, _ = record(change={"mute": lambda t: 102.0 <= t < 103.0})
    late = [f for f in frames if 102.2 < f.time_s < 102.8]
    assert late
    assert all(f.sync_error_s > 0.15 for f in late)
    assert 57 <= len(frames) <= 60


def test_pauses_restart_the_grid_and_leave_out_what_happened():
    frames, streams, synchronizer = record(2.0)
    poll = lambda now: frames.extend(synchronizer.take(now))  # noqa: E731
    before = len(frames)
    synchronizer.end()
    streams.run(1.0, poll)
    assert len(frames) == before
    synchronizer.begin()
    streams.run(1.0, poll)
    assert frames[before].time_s - frames[before - 1].time_s > 0.9
    assert not frames[before].repeated


def test_older_samples_are_dropped():
    track = Track()
    for t in (1.0, 1.1, 1.05, 1.2):
        track.add(t, np.full(2, t))
    np.testing.assert_allclose(track.at(1.15)[0], 1.15)
    assert track.at(1.15)[1] == pytest.approx(0.05)
    assert track.at(1.5)[1] == pytest.approx(0.3)
    assert track.at(0.5)[0].tolist() == [1.0, 1.0]


def test_a_picture_that_comes_late_is_dropped():
    _, streams, synchronizer = record(1.0)
    newest = synchronizer.newest_s()
    synchronizer.add_picture(np.zeros((48, 64, 3), np.uint8), streams.now - 0.2)
    assert synchronizer.newest_s() == newest
    assert not synchronizer.jumped


def test_pictures_that_no_frame_can_use_do_not_pile_up():
    """Stamped by another clock, they all lie ahead of what is due."""
    synchronizer = Synchronizer(15.0, 30.0, {"right": True})
    synchronizer.begin()
    for i in range(300):
        synchronizer.add_picture(np.zeros((4, 4, 3), np.uint8), 1.7e9 + i / 30)
        synchronizer.take(100.0 + i / 30)
    assert len(synchronizer._pictures) <= 30 * KEPT_S + 2


def test_a_clock_that_begins_anew_ends_the_recording():
    _, streams, synchronizer = record(1.0)
    synchronizer.add_state("right", 3.0, measured(3.0))
    assert synchronizer.jumped
    assert synchronizer.take(streams.now + 10) == []
