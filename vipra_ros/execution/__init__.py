"""Chunks of actions -> a smooth reference for every arm. Pure: no ROS, no clock, no threads, no robot.

May import `config` and `vipra_ros.safety.limits`. Every time is a number of seconds on the executor clock.
"""
