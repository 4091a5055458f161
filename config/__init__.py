"""Every dimension, limit, rate and recipe, once: YAML files here, pydantic models that check them.

Imports nothing of ours; every other package may import this one. YAML is found beside this file in a
checkout and under `<prefix>/share/vipra_ros/config` when installed (`config.loading.find`).
"""
