"""Evaluating a policy: trials in lockstep simulation or by an operator at the robot, statistics, reports.

`statistics`, `ledger`, `smoothness`, `compare` and `operator` are pure; `lockstep` simulates, `served` starts
the policy server for it, `live` talks to ROS.
"""
