"""Recording demonstrations: live streams to frames (`synchronizer`), frames to episodes (`session`,
`worker`), and back to the arms (`replay`). No ROS except where a file says so.
"""
