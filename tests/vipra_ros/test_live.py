"""What an operator reads in the table of `vipra up`."""

from types import SimpleNamespace

from vipra_ros.live import rows
from vipra_ros.monitor import Status


def table(**nodes):
    monitor = SimpleNamespace(status=nodes.get, frames_per_second=lambda: None)
    return rows(monitor)


def test_who_leads_is_told_how_far_the_leaders_are_from_the_arms():
    values = {
        "state": "OFF",
        "leaders": "right ok",
        "difference_rad": "0.412",
        "difference_joint": "right joint 3",
    }
    shown = table(teleop=Status(0, "not coupled", values))
    assert shown["teleop"] == "OFF not coupled" and shown["leaders"] == "right ok"
    assert shown["difference"] == "0.412 rad, right joint 3"
    unheard = table(
        teleop=Status(0, "not coupled", {**values, "difference_rad": "nan", "difference_joint": ""})
    )
    assert "difference" not in unheard
