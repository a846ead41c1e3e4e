"""``python -m benchmarks.report FILES... --out DIR``: result files become one HTML page and its plots."""
