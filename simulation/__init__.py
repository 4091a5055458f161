"""The simulated workcell that stands in for the hardware: arms, table, objects, front camera.

A process of its own (`simulation.server`); others read its state from shared memory (`simulation.state`),
steer it through a socket (`simulation.control`) and draw it (`simulation.render`). Imports `config` and
nothing else of ours, and never torch: MuJoCo's software renderer and triton crash each other in one process.
"""
