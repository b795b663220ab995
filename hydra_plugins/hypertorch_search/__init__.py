"""The sweeper `hydra/sweeper=search`: hyperparameter search through Hydra's `--multirun`.

Hydra imports the modules whose names have no underscore in front at each start of every command: those are light.
"""
