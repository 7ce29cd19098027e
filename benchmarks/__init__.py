"""Side-by-side measurements: `python -m benchmarks` prints a table of ratios, both sides in one run."""
