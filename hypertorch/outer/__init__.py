"""The outer loop and what surrounds it: validation, evaluation, checkpoints, loggers, progress."""

from hypertorch.outer.checkpoints import Checkpoint, Checkpoints
from hypertorch.outer.evaluation import evaluate
from hypertorch.outer.hparams_file import HPARAMS_FILE, load_hparams, save_hparams
from hypertorch.outer.loggers import JsonLinesLogger, Logger, MemoryLogger
from hypertorch.outer.loop import OuterLoop
from hypertorch.outer.real_time import RealTime
from hypertorch.outer.report import Estimate, Report
from hypertorch.outer.snapshots import Snapshots
from hypertorch.outer.tensorboard_logger import TensorBoardLogger
from hypertorch.outer.trained import Trained
from hypertorch.outer.validation import Validation

__all__ = [
    "HPARAMS_FILE",
    "Checkpoint",
    "Checkpoints",
    "Estimate",
    "JsonLinesLogger",
    "Logger",
    "MemoryLogger",
    "OuterLoop",
    "RealTime",
    "Report",
    "Snapshots",
    "TensorBoardLogger",
    "Trained",
    "Validation",
    "evaluate",
    "load_hparams",
    "save_hparams",
]
