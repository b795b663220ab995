"""Searches that are compared, and what they are compared on."""
