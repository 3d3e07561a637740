"""Speed, measured side by side. `python -m benchmarks.run_all` runs everything, `python -m benchmarks.report` renders it."""
