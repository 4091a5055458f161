"""Training: demonstrations from simulation, stage 0 (frame tokenizer, vocabulary) and stage 3 (flow
matching).

Imports `models`; only `training.simulated`, a process of its own, touches the simulator, because MuJoCo's
renderer and torch do not share a process.
"""
