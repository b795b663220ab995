"""A run of an experiment: what it learns from, its seeds, its folder, its training, its cells of a table."""
