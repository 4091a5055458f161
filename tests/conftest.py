"""Every test session has a ROS domain of its own and never talks beyond this machine.

Tests of live processes run again, a few times, when the machine itself stalled (see tests/machine.py).
"""

import os
import time

import pytest
from _pytest.runner import runtestprotocol

from tests.machine import StallMeter
from vipra_ros.process import Slot, reserve_slot

LIVE = ("tests/policy_server/", "tests/simulation/", "tests/vipra_ros/")
ATTEMPTS = 4
CALM_S, PATIENCE_S = 3.0, 60.0  # calm before another attempt, and how long that is waited for

_session = reserve_slot()
os.environ.setdefault("ROS_DOMAIN_ID", str(_session.domain))
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ.setdefault("MUJOCO_GL", "egl")


@pytest.fixture
def slot() -> Slot:
    """A ROS domain, a name and loopback addresses nobody else on this machine uses."""
    slot = reserve_slot()
    yield slot
    slot.release()


@pytest.fixture(autouse=True)
def _ordinary_priority():
    """libfranka gives the thread that moves an arm real-time priority, which what a later test starts would
    inherit, and keep a core to itself.
    """
    yield
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def pytest_configure(config):
    config.stall_meter = StallMeter()
    config.add_cleanup(config.stall_meter.close)


def pytest_runtest_protocol(item, nextitem):
    if not item.nodeid.startswith(LIVE):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for attempt in range(1, ATTEMPTS + 1):
        began = time.monotonic()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        stall = item.config.stall_meter.worst_s(began)
        if attempt == ATTEMPTS or not stall or not any(report.failed for report in reports):
            break
        item.session._setupstate.teardown_exact(None)  # also what the stall may have left in a shared fixture
        item._initrequest()
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and item.config.stall_meter.worst_s(time.monotonic() - CALM_S):
            time.sleep(0.5)
        said = f"{item.nodeid} failed while the machine stalled for {1000 * stall:.0f} ms: once more"
        item.warn(pytest.PytestWarning(said))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
