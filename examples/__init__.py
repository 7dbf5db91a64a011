"""Examples; `python -m examples.serve` starts the one that serves."""
