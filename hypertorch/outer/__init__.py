"""The outer loop and what surrounds it: validation, evaluation, checkpoints, loggers, progress."""

from hypertorch.outer.evaluation.evaluate import evaluate
from hypertorch.outer.evaluation.report import Estimate, Report
from hypertorch.outer.evaluation.validation import Validation
from hypertorch.outer.loop import OuterLoop
from hypertorch.outer.real_time import RealTime
from hypertorch.outer.reporting.loggers import JsonLinesLogger, Logger, MemoryLogger
from hypertorch.outer.reporting.snapshots import Snapshots
from hypertorch.outer.reporting.tensorboard_logger import TensorBoardLogger
from hypertorch.outer.storage.checkpoints import Checkpoint, Checkpoints
from hypertorch.outer.storage.hparams_file import HPARAMS_FILE, load_hparams, save_hparams
from hypertorch.outer.trained import Trained

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
