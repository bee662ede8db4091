"""What all benchmarks share: rows with provenance, written to one tidy CSV."""
