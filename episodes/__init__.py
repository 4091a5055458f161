"""Recorded episodes on disk, as LeRobotDataset v3.0: `writer.Writer` and `reader.Dataset`.

No torch, no ROS: the recorder, the simulator's generator and training share it. Imports only config.
"""
