"""Franka arms and hands through franky, and the executor that streams one reference to all of them.

May import config, vipra_ros.clock, vipra_ros.execution and vipra_ros.safety; nothing of ROS.
"""
