"""A report says what the logs say."""

import json

import av
import numpy as np
import pytest

from vipra_ros.report import page, plots, summary
from vipra_ros.report.logs import ArmsLog, LogError, read_requests
from vipra_ros.report.video import Video, jpeg
from vipra_ros.robot.executor import STATES
from vipra_ros.robot.runlog import RunLog

RATE = 200.0
KEYS = [
    *("control_ticks", "late_ticks", "starved_ticks", "chunk_latency_ms", "tracking_error_rad"),
    *("arm_skew_ms_p99", "interventions", "faults", "limit_violations_1khz", "real_time_factor"),
    *("frames_per_second", "versions"),
]


def write_log(path, seconds=10.0, late=(), skipped=(), starved=(), fault=None):
    """The arms node's own log of a sine on 14 joints, 0.01 rad behind, with the given tick indices marked."""
    log = RunLog(14)
    for i in range(int(seconds * RATE)):
        if i in skipped:
            continue
        t = 100 + i / RATE
        q = np.full(14, 0.3 * np.sin(t))
        lateness = 0.0061 if i in late else 0.0002
        state = STATES.index("RUNNING" if i > 20 else "ALIGNING")
        log.add(t + lateness, lateness, q, q, q - 0.01, q, state, i // 64, i % 14, i in starved, 0.0004)
    for seq in range(int(seconds / 0.32)):
        log.chunks.append((seq, 100 + 0.32 * seq, 22.0, 100.02 + 0.32 * seq, 0.02, seq == 0))
    log.events.append((100.0, "state", "RUNNING: running"))
    if fault:
        log.events.append((105.0, "fault", fault))
    names = [f"{arm}_fr3_joint{j}" for arm in ("left", "right") for j in range(1, 8)]
    log.save(path, STATES, names)


def requests(count=30):
    return [
        {"seq": i, "sent": 100 + i, "received": 100.1 + i, "latency_ms": 50.0 + i, "outcome": "chunk"}
        for i in range(count)
    ]


def report_of(log, **more):
    given = {
        "interventions": {"velocity": 3},
        "violations": 0,
        "real_time_factor": 0.87,
        "frames_per_second": 29.8,
    }
    return summary.summarise(log, requests(), reference_rate_hz=RATE, **{**given, **more})


def test_report_has_the_promised_keys_and_counts(tmp_path):
    write_log(tmp_path / "arms.npz", late=(50, 60), skipped=(100, 101, 102), starved=(70,))
    log = ArmsLog.read(tmp_path / "arms.npz")
    report = report_of(log)
    assert list(report) == KEYS
    assert report["control_ticks"] == 1997
    assert report["late_ticks"] == 5  # two late, three that never ran
    assert report["starved_ticks"] == 1
    assert report["tracking_error_rad"] == {"rms": 0.01, "max": 0.01}
    assert report["arm_skew_ms_p99"] == 0.4
    assert report["chunk_latency_ms"]["p50"] == 64.5
    assert report["interventions"] == {"velocity": 3} and report["faults"] == []
    assert json.loads(json.dumps(report)) == report
    assert summary.failure(report, log, 10.0, RATE) is None


def test_only_the_time_in_command_counts(tmp_path):
    write_log(tmp_path / "arms.npz", late=(50, 1500), starved=(70, 1600))
    log = ArmsLog.read(tmp_path / "arms.npz").between(101.0, 105.0)
    report = report_of(log)
    assert report["control_ticks"] == 800 and report["late_ticks"] == 0 and report["starved_ticks"] == 0


@pytest.mark.parametrize(
    ("log", "more", "reason"),
    [
        ({"fault": "reflex: left: cartesian_reflex"}, {}, "cartesian_reflex"),
        ({"seconds": 5}, {}, "control ticks"),
        ({}, {"violations": 7}, "7 samples beyond a joint limit"),
        ({}, {"frames_per_second": 0.0}, "camera"),
    ],
    ids=["fault", "too short", "limits", "no camera"],
)
def test_a_run_that_did_not_work_says_why(tmp_path, log, more, reason):
    write_log(tmp_path / "arms.npz", **log)
    read = ArmsLog.read(tmp_path / "arms.npz")
    assert reason in summary.failure(report_of(read, **more), read, 10.0, RATE)


def test_arms_that_stand_still_are_no_success(tmp_path):
    write_log(tmp_path / "arms.npz")
    log = ArmsLog.read(tmp_path / "arms.npz")
    log.q_meas[:] = 0.1
    assert "stood still" in summary.failure(report_of(log), log, 10.0, RATE)


def test_page_shows_numbers_plots_and_pictures_by_itself(tmp_path):
    write_log(tmp_path / "arms.npz", late=(50,))
    log = ArmsLog.read(tmp_path / "arms.npz")
    plots.joints(log, tmp_path / "joints.png")
    plots.timing(log, requests(), tmp_path / "timing.png")
    still = jpeg(np.full((36, 64, 3), (200, 30, 30), np.uint8))
    target = tmp_path / "report.html"
    page.render(
        target,
        "A <demo>",
        "today",
        None,
        report_of(log),
        {"rate_hz": 22},
        ["a note"],
        [("Joints", tmp_path / "joints.png")],
        [still],
        "front_camera.mp4",
    )
    text = target.read_text()
    assert "A &lt;demo&gt;" in text and "a note" in text and "front_camera.mp4" in text
    assert text.count("data:image/png;base64,") == 1 and text.count("data:image/jpeg;base64,") == 1
    assert "://" not in text  # nothing is fetched from anywhere
    assert (tmp_path / "joints.png").stat().st_size > 20_000


def test_missing_or_broken_logs_are_named(tmp_path):
    with pytest.raises(LogError, match=r"arms\.npz is missing"):
        ArmsLog.read(tmp_path / "arms.npz")
    (tmp_path / "arms.npz").write_bytes(b"PK nonsense")
    with pytest.raises(LogError, match="not a log"):
        ArmsLog.read(tmp_path / "arms.npz")
    with pytest.raises(LogError, match=r"policy\.jsonl"):
        read_requests(tmp_path / "policy.jsonl")
    (tmp_path / "policy.jsonl").write_text('{"seq": 1}\n{"seq": 2, "lat')  # killed while writing
    assert read_requests(tmp_path / "policy.jsonl") == [{"seq": 1}]
    (tmp_path / "policy.jsonl").write_text('{"seq": \n{"seq": 2}\n')
    with pytest.raises(LogError, match=r"policy\.jsonl:1"):
        read_requests(tmp_path / "policy.jsonl")


def test_video_keeps_the_capture_times(tmp_path):
    path = tmp_path / "camera.mp4"
    video = Video(path)
    stamps = [10.0, 10.033, 10.033, 10.1, 15.2]  # one repeated, gaps
    for i, stamp in enumerate(stamps):
        video.add(np.full((36, 64, 3), 40 * i, np.uint8), stamp)
    video.close()
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in file.decode(stream)]
    assert stream.codec_context.name == "h264"
    assert np.allclose(times, [0, 0.033, 0.1, 5.2], atol=1e-3)
    assert video.frames == 4 and len(video.stills) == 2
    assert video.duration_s == pytest.approx(5.2)
