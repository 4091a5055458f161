"""Every test session has a ROS domain of its own and never talks beyond this machine."""

import os

import pytest

from vipra_ros.process import Slot, reserve_slot

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
