"""Tangents of the inner state, and by which way they are carried."""
