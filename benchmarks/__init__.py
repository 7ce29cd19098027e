"""Side-by-side measurements: `python -m benchmarks` measures both sides in one run and prints a table of ratios."""
