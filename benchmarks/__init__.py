"""Speed, measured side by side: `python -m benchmarks.run_all` runs, `python -m benchmarks.report` renders."""
