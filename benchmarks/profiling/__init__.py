"""Profiles of the named shapes with random weights, kept in `benchmarks/nsight_profiles/`; see `capture.py`."""
