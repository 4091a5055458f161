"""Evaluating a policy: trials in lockstep simulation or by an operator at the robot, statistics, reports.

`statistics`, `ledger`, `motion`, `compare` and `operator` are pure; `lockstep` simulates, `served` plays
its trials with a policy `server`, `stack` plays them on the running nodes; `live` watches nodes that run.
"""
