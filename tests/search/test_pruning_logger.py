"""`PruningLogger`: what Optuna is told of an outer loop, and when it ends one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import optuna
import pytest
import torch

import hypertorch as ht
from hypertorch.search import PruningLogger
from hypertorch.types import TensorDict

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Inner(ht.InnerProblem):
    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros((), dtype=torch.float64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: object) -> torch.Tensor:
        return 0.5 * (params["w"] - hparams["target"]).square()


class Outer(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"target": torch.zeros((), dtype=torch.float64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: object) -> torch.Tensor:
        return (params["w"] - 1.0).square()


def loop(lr: float, loggers: list[ht.Logger], folder: Path | None = None) -> ht.OuterLoop:
    problem = ht.BilevelProblem(Inner(), Outer(), dynamics=ht.dynamics.SGD(lr=0.5), num_steps=4)
    return ht.OuterLoop(
        problem,
        optimizer=lambda hparams: torch.optim.SGD(hparams, lr=lr),
        backend=ht.hypergradients.Reverse(),
        validation=ht.Validation(source=problem, every=2, num_episodes=1, metric="outer_loss", mode="min"),
        loggers=loggers,
        checkpoints=None if folder is None else ht.Checkpoints(folder, every=2),
    )


def study(direction: str = "minimize") -> optuna.Study:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=3)
    return optuna.create_study(direction=direction, pruner=pruner)


def run(trial: optuna.Trial, lr: float) -> tuple[float | None, ht.MemoryLogger]:
    memory = ht.MemoryLogger()
    trained = loop(lr, [memory, PruningLogger(trial, metric="outer_loss", mode="min")]).run(8)
    return trained.best_value, memory


def test_the_validations_are_reported_and_the_worse_trial_ends() -> None:
    one = study()
    first = one.ask()
    value, memory = run(first, lr=0.3)
    assert value is not None
    one.tell(first, value)
    reported = one.trials[0].intermediate_values
    steps, values = memory.series("validation/outer_loss")
    assert reported == dict(zip(map(int, steps), values, strict=True)) and list(reported) == [2, 4, 6, 8]
    second = one.ask()
    with pytest.raises(optuna.TrialPruned, match=r"after 4 outer steps, with outer_loss 0\.\d"):
        run(second, lr=1e-3)
    one.tell(second, state=optuna.trial.TrialState.PRUNED)
    assert list(one.trials[1].intermediate_values) == [2, 4]


def test_study_optimize_takes_it_as_pruned() -> None:
    one = study()
    rates = iter([0.3, 1e-3, 0.3])
    one.optimize(lambda trial: run(trial, next(rates))[0], n_trials=3)
    assert [trial.state.name for trial in one.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]


def test_a_run_that_goes_on_reports_each_step_once(tmp_path: Path) -> None:
    trial = study().ask()
    logger = PruningLogger(trial, metric="outer_loss", mode="min")
    loop(0.3, [logger], tmp_path).run(4)
    loop(0.3, [logger], tmp_path).run(8, resume=True)
    assert list(trial.study.trials[0].intermediate_values) == [2, 4, 6, 8]
    logger.log(8, {"validation/outer_loss": 0.5})  # Optuna warns if a step is reported again


@pytest.mark.parametrize("mode", ["max", "mean"])
def test_another_direction_than_the_study_s_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"`mode` is '{mode}', but the study of `trial` is to minimize"):
        PruningLogger(study().ask(), metric="outer_loss", mode=mode)


def test_a_study_with_two_objectives_is_refused() -> None:
    trial = optuna.create_study(directions=["minimize", "maximize"]).ask()
    with pytest.raises(ValueError, match="to minimize and maximize"):
        PruningLogger(trial, metric="outer_loss", mode="min")


def test_a_metric_that_is_not_validated_is_refused() -> None:
    logger = PruningLogger(study().ask(), metric="accuracy", mode="min")
    with pytest.raises(ValueError, match=r"`metric` is 'accuracy', which.*It has \['outer_loss', "):
        loop(0.3, [logger]).run(2)


@pytest.mark.parametrize("trial", [3, None, optuna.trial.FixedTrial({})])
def test_what_is_no_trial_of_a_study_is_refused(trial: Any) -> None:
    with pytest.raises(TypeError, match=rf"`trial` is a `{type(trial).__name__}`, which no study prunes"):
        PruningLogger(trial, metric="outer_loss", mode="min")


def test_settings_that_are_no_text_are_refused() -> None:
    trial, no_text = study().ask(), cast("Any", ["outer_loss"])
    with pytest.raises(TypeError, match=r"`metric` is \['outer_loss'\], a `list`"):
        PruningLogger(trial, metric=no_text, mode="min")
    with pytest.raises(ValueError, match=r"`mode` is \['outer_loss'\], but the study"):
        PruningLogger(trial, metric="outer_loss", mode=no_text)
