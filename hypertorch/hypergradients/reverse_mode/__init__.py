"""Reverse mode: one sweep back over segments of the inner loop, and the ways to differentiate a segment."""
