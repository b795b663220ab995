"""From an expected failure to one message and exit code 1; a bug keeps its traceback."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import hypertorch
from experiments.common.commands.config_errors import explain_config_error, explain_flags, explain_group_value
from experiments.common.commands.processes import is_first_process, why_not_shared
from hypertorch.errors import HypertorchError
from hypertorch.search import FailedTrial

_SWEEPER = "hydra_plugins.hypertorch_search."
_FULL_ERROR = "HYDRA_FULL_ERROR"
_ROOT = Path(__file__).resolve().parents[3]
_OWN_CODE = (
    Path(hypertorch.__file__).resolve().parent,
    *(_ROOT / folder for folder in ("experiments", "benchmarks", "hydra_plugins")),
)


class ExpectedFailure(Exception):  # noqa: N818 (not a fault of the program)
    """A failure whose three-part message is all that its user needs."""


# What may be an expected failure of a job; `explain` decides.
_JOB_FAILURES = (
    ExpectedFailure,
    HypertorchError,
    HydraException,
    OmegaConfBaseException,
    torch.OutOfMemoryError,
    ImportError,
    OSError,
    TypeError,
    ValueError,
)


def explain(error: BaseException, main_config: Path) -> str | None:
    """Returns the message for a failure that a user can mend, None for a bug.

    A `ValueError`, `TypeError` or `ImportError` is the user's when this repository raised it about an argument, which
    its messages name in backticks; the others come out of code that met something it was not written for.

    Args:
        error: what was raised.
        main_config: the command's main file, for the names of its settings.
    """
    if isinstance(error, KeyboardInterrupt):
        return str(error) or (
            "interrupted. What was done so far is kept; the same command with resume=true goes on from there."
        )
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        ours = _own_cause(error)
        return explain_config_error(error, main_config) if ours is None else str(ours)
    if isinstance(error, (ExpectedFailure, HypertorchError)):
        return str(error)
    if isinstance(error, ValueError) and (message := explain_group_value(error) or explain_flags(error)) is not None:
        return message
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"`device` has too little memory ({str(error).splitlines()[0]}) This run does not fit. Lower "
            "`episodes.num_tasks`, or choose hypergradient=reverse_checkpointed."
        )
    if isinstance(error, OSError) and "`" in str(error.strerror) and _raised_by_own_code(error):
        return error.strerror
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"`{error.filename}` cannot be used: {error.strerror}. The run needs to read or write it. Check the path, "
            "its permissions and the free space; `paths.log_dir=...` moves what runs write."
        )
    if isinstance(error, (ImportError, TypeError, ValueError)) and "`" in str(error) and _raised_by_own_code(error):
        return str(error)
    return None


def _own_cause(error: BaseException) -> ExpectedFailure | None:
    """Returns the failure of our own that a library wrapped into this error; None if there is none."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ExpectedFailure):
            return inner
        inner = inner.__cause__ or inner.__context__
    return None


def _raised_by_own_code(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(folder) for folder in _OWN_CODE)


class Failures:
    """Runs a command, prints its expected failures and remembers them for the exit code.

    Hydra hands no result of a job on to the command, and stops a multirun at the first exception; so a job's failure is
    printed where it happens, and the other jobs still run. A job that a launcher runs in another process raises: these
    launchers run all jobs, and raise the first failure in the command. HYDRA_FULL_ERROR=1 in the environment keeps
    every traceback.

    Args:
        main_config: the command's main file.
        is_shared: whether several processes can share a run of the command.
    """

    def __init__(self, main_config: Path, *, is_shared: bool = False) -> None:
        self._main_config = main_config
        self._is_shared = is_shared
        self._messages: list[str] = []
        self._keep_tracebacks = False
        self._process: int | None = None

    def reported(self, job: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
        """Returns the job with its expected failures printed on stderr instead of raised.

        A trial of a search returns them: they are a finding of the search, which tells of them and goes on.
        """

        @functools.wraps(job)
        def reporting(config: DictConfig) -> Any:
            try:
                return job(config)
            except _JOB_FAILURES as error:
                if is_trial():
                    return self._failed_trial(error)
                if self._is_elsewhere:
                    self._raise_message(error)
                self._report(error, _job_name())
                return None

        return reporting

    def exit_code(self, main: Callable[[], None]) -> int:
        """Returns the exit code of a Hydra main function after running it: 1 if it failed in an expected way, else 0.

        Who reads the output may have enough of it, such as `head`: the command then ends without a word, with 1.

        Args:
            main: decorated with `hydra.main` around `reported`.
        """
        self._messages.clear()
        self._process = os.getpid()
        self._keep_tracebacks = os.environ.get(_FULL_ERROR) == "1"
        try:
            try:
                self._run(main)
            finally:  # Hydra exits after --help
                sys.stdout.flush()
        except BrokenPipeError:
            _write_nowhere()
            return 1
        return 1 if self._messages else 0

    def environment(self) -> dict[str, str]:
        """Returns the environment for a command that this one starts: with tracebacks only if the user wants them."""
        kept = dict(os.environ)
        if not self._keep_tracebacks:
            kept.pop(_FULL_ERROR, None)
        return kept

    def _run(self, main: Callable[[], None]) -> None:
        try:
            refusal = why_not_shared(is_shared=self._is_shared)
            if refusal is not None:
                raise ExpectedFailure(refusal)
            _refuse_pickle()
            with _hydra_raises():
                main()
        except (KeyboardInterrupt, *_JOB_FAILURES) as error:
            self._report(error, "")

    @property
    def _is_elsewhere(self) -> bool:
        """Whether a launcher runs the job in a process of its own, whose messages the command does not see."""
        return self._process != os.getpid()

    def _raise_message(self, error: Exception) -> None:
        message = explain(error, self._main_config)
        if message is None:
            raise error
        # Of one text: it travels to the command by pickle, which asks the constructor of an error for its arguments.
        raise ExpectedFailure(f"{_job_name()}{message}") from error

    def _failed_trial(self, error: Exception) -> FailedTrial:
        message = explain(error, self._main_config)
        if message is None:
            raise error
        if self._keep_tracebacks:
            traceback.print_exception(error)
        return FailedTrial(why=message)

    def _report(self, error: BaseException, prefix: str) -> None:
        message = None if self._keep_tracebacks else explain(error, self._main_config)
        if message is None:
            raise error
        self._messages.append(message)
        if not is_first_process():
            prefix = f"process {os.environ['RANK']}: {prefix}"
        sys.stdout.flush()
        sys.stderr.write(f"error: {prefix}{message}\n")


def is_trial() -> bool:
    """Returns whether the current Hydra job is a trial of a search."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    return str(HydraConfig.get().sweeper._target_).startswith(_SWEEPER)


def _refuse_pickle() -> None:
    """Refuses Hydra's flag that reads a pickle, which runs whatever code is in it."""
    file = get_args_parser().parse_known_args()[0].experimental_rerun
    if file is not None:
        raise ExpectedFailure(
            f"`--experimental-rerun` is {file!r}, a pickle: reading one runs any code that is in it. Repeat the "
            "command that is in results.json of the run, or go on with the run by resume=true."
        )


def _write_nowhere() -> None:
    """Sends what is still to be written to nowhere: Python flushes its streams once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Makes Hydra raise its errors, which it would print in a form of its own."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = before


def _job_name() -> str:
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    job = HydraConfig.get().job
    return f"job {job.num} ({job.override_dirname}): "
