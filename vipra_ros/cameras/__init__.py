"""Where pictures come from: a ZED camera, the simulator, a video file, any UVC camera. No ROS in here.

`source.py` holds what a source is; each other file is one source and imports its library only when opened.
"""
