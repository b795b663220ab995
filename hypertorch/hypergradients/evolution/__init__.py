"""Perturbed inner runs."""
