"""Bilevel problems that the experiments share, on data that comes with the installation."""
