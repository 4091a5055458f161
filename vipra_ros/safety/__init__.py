"""What may be commanded: limits, envelope filter, collision distances, watchdogs and the gate over them.

Pure: no ROS, no clock, no threads. May import `config` and `vipra_ros.execution.chunk`. Software limits are
not a safety function in the sense of ISO 10218: the emergency stop is the hardware's.
"""
