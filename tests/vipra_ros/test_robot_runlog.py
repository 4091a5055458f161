"""The run log keeps what the report needs and does not grow without end."""

import numpy as np

from vipra_ros.report.logs import ArmsLog
from vipra_ros.robot import runlog
from vipra_ros.robot.executor import STATES
from vipra_ros.robot.runlog import RunLog


def fill(log, ticks, joints=14):
    for i in range(ticks):
        q = np.full(joints, float(i))
        log.add(
            0.005 * i, 0.001, q, q + 1, q + 2, q + 3, STATES.index("RUNNING"), i // 7, i % 14, False, 1e-5
        )


def test_what_is_logged_is_what_the_report_reads(tmp_path):
    log = RunLog(14)
    fill(log, 50)
    log.chunks.append((3, 1.0, 22.0, 0.9, 0.02, False))
    log.events.append((0.1, "fault", "left: reflex"))
    log.save(tmp_path / "arms.npz", STATES, [f"joint{j}" for j in range(14)])
    read = ArmsLog.read(tmp_path / "arms.npz")
    assert read.q_ref.shape == (50, 14) and (read.q_meas == read.q_ref + 2).all()
    assert set(read.state) == {"RUNNING"}
    assert read.chunk_seq.tolist() == [3] and read.chunk_join_rad.tolist() == [0.02]
    assert read.events == ((0.1, "fault", "left: reflex"),)


def test_an_empty_log_can_be_written_and_read(tmp_path):
    RunLog(7).save(tmp_path / "arms.npz", STATES, [])
    assert ArmsLog.read(tmp_path / "arms.npz").t.shape == (0,)


def test_only_the_last_minutes_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "_BLOCK", 100)
    log = RunLog(14, minutes=2)
    fill(log, 350)
    log.save(tmp_path / "arms.npz", STATES, [])
    t = ArmsLog.read(tmp_path / "arms.npz").t
    assert t[0] == 0.005 * 200 and t[-1] == 0.005 * 349
