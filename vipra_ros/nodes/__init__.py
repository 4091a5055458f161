"""ROS 2 nodes: thin translations between topics, services, parameters and the objects that do the work."""
