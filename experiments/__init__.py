"""Hydra entry points: experiments as commands, and what they share."""
