"""Where the run of an outer loop begins: at first outer variables, or at a checkpoint, on every process alike."""

from __future__ import annotations

from collections.abc import Callable

from hypertorch.checks.values import check_hparams
from hypertorch.errors import CheckpointError
from hypertorch.inner.ranks import Ranks
from hypertorch.outer.fingerprint import VALIDATION_SETTINGS, changes
from hypertorch.outer.settings import OuterSettings
from hypertorch.outer.steps.state import OuterState
from hypertorch.outer.storage.checkpoints import Checkpoint, check_same_hparams, differences
from hypertorch.problem import ProblemSource
from hypertorch.types import TensorDict, TensorMapping


def first_hparams(source: ProblemSource, given: TensorMapping | None) -> TensorDict:
    """Returns the outer variables before the first step, in the order of the source."""
    own = source.init_hparams()
    if given is None:
        return own
    check_hparams(given)
    differing = differences(given, own, "in `start_from`")
    if differing:
        raise ValueError(
            f"`start_from` differs from the outer variables of the problem in {', '.join(differing)}: no step can "
            "start there. Pass outer variables of the same problem, such as `trained.best_hparams` or "
            "`ht.load_hparams(path)`."
        )
    # In the order of the source, on which the optimizer's state depends, and on its device.
    return {name: given[name].to(value.device) for name, value in own.items()}


def begin_run(
    loop: OuterSettings,
    state: OuterState,
    num_outer_steps: int,
    settings: Callable[..., dict[str, str]],
    *,
    resume: bool,
    override: bool,
) -> bool:
    """Brings state and loggers to where the run starts; returns whether that is a checkpoint."""
    newest = None if loop.checkpoints is None else loop.checkpoints.newest()
    if loop.checkpoints is not None:
        loop.checkpoints.remove_leftovers()
    if not resume:
        if newest is not None:
            raise CheckpointError(
                f"`checkpoints` holds `{newest}` of an earlier run, which `resume=False` would mix with this one. "
                "Pass `resume=True` to go on from it, choose another folder, or delete the earlier run's."
            )
        state.settings = settings(of_problem=True) if loop.checkpoints is not None else {}
        return False
    if loop.checkpoints is None:
        raise ValueError(
            "`resume` is True, but the loop has no `checkpoints`: there is nothing to go on from. Pass "
            "`checkpoints=Checkpoints(folder)`, to this run and to the one that it resumes."
        )
    if newest is None:
        state.settings = settings(of_problem=True)
    else:
        checkpoint = loop.checkpoints.load(newest)
        check_same_hparams(newest, checkpoint.hparams, state.hparams)
        # A run that is done asks for no problem.
        is_done = checkpoint.step >= num_outer_steps
        state.settings = settings(of_problem=not is_done)
        before = {name: text for name, text in checkpoint.settings.items() if not is_done or name in state.settings}
        changed = changes(before, state.settings)
        if checkpoint.best_value is None:
            changed = {name: text for name, text in changed.items() if name not in VALIDATION_SETTINGS}
        if changed and not override:
            raise CheckpointError(
                f"`{newest}` was made with other settings: {'; '.join(changed.values())}. It would not go on as the "
                "same run. Resume with the settings that it was started with, pass `override=True` to go on with the "
                "present ones, or choose another folder."
            )
        if checkpoint.step and not checkpoint.carry and state.settings.get("warm_start") == "True":
            raise CheckpointError(
                f"`{newest}` lacks the inner state after {checkpoint.step} outer steps, from which a warm-started run "
                "goes on: it was altered, or made without `warm_start`. Delete it to go on from an earlier checkpoint, "
                "or choose another folder."
            )
        state.settings = {**checkpoint.settings, **state.settings}
        state.restore(checkpoint, changed)
    for logger in loop.loggers:
        # Also where there is no checkpoint: a run that was killed before its first one has logged steps that come
        # again.
        logger.rewind(state.step)
    return newest is not None


def begin_alike(ranks: Ranks, begin: Callable[[], bool], state: OuterState) -> bool:
    """Brings the state of every process to where that of the first one starts; returns whether that is a checkpoint."""
    resumed, start = ranks.first(lambda: (begin(), vars(state.capture())))
    if not ranks.is_first:
        differing = differences(start["hparams"], state.hparams, "on the first process")
        if differing:
            raise ValueError(
                f"`source.init_hparams` of process {ranks.rank} differs from that of the first in "
                f"{', '.join(differing)}: they would not make one run. Start all processes with the same settings."
            )
        state.restore(Checkpoint(**start))
    return resumed
