"""Measurements, one command each: `python -m benchmarks.NAME --help`. Ratios from one run, never tests."""
