"""Teleoperation with GELLO: leaders' samples -> chunks for the arms, under the same lease as the policy.

`leader` and `follow` are pure: plain arrays, no ROS, no clock of their own. `servos` and `dynamixel` read a
GELLO on a serial port, `calibrate` and `cli` are `vipra gello`. May import config, vipra_ros.execution.chunk
and vipra_ros.safety.
"""
