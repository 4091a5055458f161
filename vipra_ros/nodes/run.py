"""Run a node until it is interrupted, and end it in order."""

import sys
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from vipra_ros.process import die_with_parent, signals_raise


def run(name: str, make: Callable[[], Node], refusals: tuple[type[Exception], ...]) -> int:
    """Exit status: 0 when interrupted; 2 when `make` raises one of `refusals`, whose message is printed.

    The node is destroyed with ROS still up, so that it can let the arms go or save what it holds.
    """
    die_with_parent()
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = None
    try:
        with signals_raise():
            try:
                node = make()
                rclpy.spin(node)
            finally:
                if node is not None:
                    node.destroy_node()
                rclpy.try_shutdown()
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    except refusals as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0
