"""Runs that are killed and resumed, that meet each other, and that are long: `python -m tests.faults`."""
