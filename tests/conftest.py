"""Every test session has a ROS domain of its own and never talks beyond this machine.

Tests marked `live` (`pytestmark = pytest.mark.live`) are of processes in real time: `make test` runs them one
at a time. They run again, a few times, when the machine itself stalled (see tests/machine.py), and once when
it did not: a rare race must not block, and must be seen, so the summary tells of it.
"""

import os
import signal
import time

import pytest
from _pytest.runner import runtestprotocol

from tests.machine import StallMeter
from vipra_ros.process import Slot, reserve_slot

CALM_S, PATIENCE_S = 3.0, 30.0  # calm before another attempt, and how long that is waited for

_session = reserve_slot()
os.environ.setdefault("ROS_DOMAIN_ID", str(_session.domain))
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ.setdefault("MUJOCO_GL", "egl")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&` started us; tests interrupt processes
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # as many tests at once as there are cores: a thread for each
    os.environ["OMP_NUM_THREADS"] = "1"


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


def pytest_addoption(parser):
    told = "how often a test of live processes may run; more than twice only while the machine stalls"
    parser.addoption("--attempts", type=int, default=4, help=told)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "live: runs with nothing beside it, and again when the machine stalled"
    )
    config.failed_once = []  # (test, how it failed) of those that passed when run again, without a stall
    config.stall_meter = StallMeter()
    config.add_cleanup(config.stall_meter.close)


def pytest_runtest_protocol(item, nextitem):
    if item.get_closest_marker("live") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    limit_s, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest-timeout's: for each attempt, not for all
    calm_failures = []
    for attempt in range(1, item.config.option.attempts + 1):
        began = time.monotonic()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        signal.setitimer(signal.ITIMER_REAL, 0)
        stall = item.config.stall_meter.worst_s(began)
        failures = [report.longreprtext for report in reports if report.failed]
        if failures and not stall:
            calm_failures += failures[:1]
        if not failures or attempt == item.config.option.attempts or len(calm_failures) > 1:
            break
        item.session._setupstate.teardown_exact(None)  # also what it may have left in a shared fixture
        item._initrequest()
        if stall:
            _wait_for_calm(item.config.stall_meter)
            said = f"{item.nodeid} failed while the machine stalled for {1000 * stall:.0f} ms: once more"
            item.warn(pytest.PytestWarning(said))
        signal.setitimer(signal.ITIMER_REAL, limit_s)
    if calm_failures and not failures:
        item.config.failed_once.append((item.nodeid, calm_failures[0]))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _wait_for_calm(meter: StallMeter) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and meter.worst_s(time.monotonic() - CALM_S):
        time.sleep(0.5)


def pytest_terminal_summary(terminalreporter, config):
    for test, text in config.failed_once:
        terminalreporter.section(f"failed once without a stall: {test}", red=True, bold=True)
        terminalreporter.write_line(text)
