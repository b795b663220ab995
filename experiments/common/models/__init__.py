"""Nets and learners that several experiments train."""
