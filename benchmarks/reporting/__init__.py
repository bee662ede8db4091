"""From `metrics.csv` to plots, tables and the numbers that documents quote; `benchmarks/report.py` runs it."""
