"""A run's logs -> numbers, plots, a page. Pure functions over arrays and files; no ROS."""
