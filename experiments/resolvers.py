"""The words that configs use in `${...}` beside Hydra's own; importing this module makes them known."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.run_folder import choose_folder


def _is_null(value: Any) -> bool:
    return value is None


def _run_folder(*, _root_: DictConfig) -> str:
    return str(choose_folder(_root_))


OmegaConf.register_new_resolver("is_null", _is_null, replace=True)
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
