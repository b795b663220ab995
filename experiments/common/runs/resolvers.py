"""The words that configs use in `${...}` beside Hydra's own; importing this module makes them known."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.common.commands.config_errors import CONFIGS
from experiments.common.runs.run_folder import choose_folder


def _is_null(value: Any) -> bool:
    return value is None


def _run_folder(*, _root_: DictConfig) -> str:
    return str(choose_folder(_root_))


def _configs_folder() -> str:
    return str(CONFIGS)


def _names_of(block: DictConfig) -> str:
    """Returns the names in a block, for a --help text, wrapped and indented by two."""
    return textwrap.fill(", ".join(str(name) for name in block), width=112, subsequent_indent="  ")


def _product(*factors: int) -> int:
    return math.prod(factors)


OmegaConf.register_new_resolver("configs_folder", _configs_folder, replace=True)
OmegaConf.register_new_resolver("is_null", _is_null, replace=True)
OmegaConf.register_new_resolver("names_of", _names_of, replace=True)
OmegaConf.register_new_resolver("product", _product, replace=True)
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
