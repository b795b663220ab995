"""The sampler in Optuna's studies: the same points as asking and telling, and trials of every state."""

from __future__ import annotations

import math
import warnings

import optuna
import pytest
import torch

import hypertorch as ht
from hypertorch.search import GradientBayes, GradientSampler

F64 = torch.float64


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def value(lr: float, shift: float) -> tuple[float, dict[str, float]]:
    wide = math.log(lr / 0.01)
    return wide**2 + (shift - 0.5) ** 2, {"lr": 2 * wide / lr, "shift": 2 * (shift - 0.5)}


def suggested(trial: optuna.Trial) -> tuple[float, float]:
    return trial.suggest_float("lr", 1e-4, 1.0, log=True), trial.suggest_float("shift", -1.0, 1.0)


def objective(trial: optuna.Trial) -> float:
    found, grads = value(*suggested(trial))
    GradientSampler.report(trial, grads)
    return found


def test_a_study_is_asking_and_telling() -> None:
    study = optuna.create_study(sampler=GradientSampler(num_initial=3, seed=4))
    study.optimize(objective, n_trials=9)
    assert study.best_value < 1e-4
    search = GradientBayes([(1e-4, 1.0), (-1.0, 1.0)], log=[True, False], num_initial=3, seed=4)
    for trial in study.trials[:8]:
        found, grads = value(**trial.params)
        search.tell(
            torch.tensor([list(trial.params.values())], dtype=F64),
            torch.tensor([found], dtype=F64),
            torch.tensor([list(grads.values())], dtype=F64),
        )
    assert search.ask()[0].tolist() == list(study.trials[8].params.values())


def test_maximising_is_minimising_the_negative() -> None:
    def negative(trial: optuna.Trial) -> float:
        found, grads = value(*suggested(trial))
        GradientSampler.report(trial, {name: -own for name, own in grads.items()})
        return -found

    low = optuna.create_study(sampler=GradientSampler(num_initial=2))
    high = optuna.create_study(direction="maximize", sampler=GradientSampler(num_initial=2))
    low.optimize(objective, n_trials=5)
    high.optimize(negative, n_trials=5)
    assert [trial.params for trial in low.trials] == [trial.params for trial in high.trials]


def test_trials_without_a_report_are_values_alone() -> None:
    def silent(trial: optuna.Trial) -> float:
        found, grads = value(*suggested(trial))
        if trial.number % 2:
            GradientSampler.report(trial, {"lr": grads["lr"]})
        return found

    study = optuna.create_study(sampler=GradientSampler(num_initial=2))
    study.optimize(silent, n_trials=5)
    search = GradientBayes([(1e-4, 1.0), (-1.0, 1.0)], log=[True, False], num_initial=2)
    for trial in study.trials[:4]:
        search.tell(
            torch.tensor([list(trial.params.values())], dtype=F64), torch.tensor([value(**trial.params)[0]], dtype=F64)
        )
    assert search.ask()[0].tolist() == list(study.trials[4].params.values())


def test_failed_pruned_and_running_trials_count() -> None:
    def troubled(trial: optuna.Trial) -> float:
        found = objective(trial)
        if trial.number == 1:
            raise ArithmeticError
        if trial.number == 2:
            trial.report(found, 0)
            raise optuna.TrialPruned
        return math.nan if trial.number == 3 else found

    study = optuna.create_study(sampler=GradientSampler(num_initial=2))
    study.optimize(troubled, n_trials=7, catch=(ArithmeticError,))
    running = study.ask()
    suggested(running)
    search = GradientBayes([(1e-4, 1.0), (-1.0, 1.0)], log=[True, False], num_initial=2)
    for trial in study.trials[:7]:
        point = torch.tensor([list(trial.params.values())], dtype=F64)
        if trial.number in (1, 2, 3):
            search.tell(point, torch.tensor([math.nan]))
        else:
            found, grads = value(**trial.params)
            search.tell(point, torch.tensor([found], dtype=F64), torch.tensor([list(grads.values())], dtype=F64))
    search.pend(torch.tensor([list(study.trials[7].params.values())], dtype=F64))
    beside = study.ask()
    assert list(suggested(beside)) == search.ask()[0].tolist()


def test_other_parameters_are_drawn_at_random() -> None:
    def mixed(trial: optuna.Trial) -> float:
        trial.suggest_categorical("rule", ["sgd", "adam"])
        trial.suggest_int("steps", 1, 9)
        trial.suggest_float("stepped", 0.0, 1.0, step=0.25)
        if trial.number % 2:
            trial.suggest_float("sometimes", 0.0, 1.0)
        return objective(trial)

    study = optuna.create_study(sampler=GradientSampler(num_initial=2))
    study.optimize(mixed, n_trials=6)
    assert study.trials[-1].params.keys() == {"rule", "steps", "stepped", "sometimes", "lr", "shift"}
    space = study.sampler.infer_relative_search_space(study, study.trials[-1])
    assert space.keys() == {"lr", "shift"}
    nothing = optuna.create_study(sampler=GradientSampler())
    nothing.optimize(lambda trial: trial.suggest_int("steps", 1, 9), n_trials=3)
    assert len(nothing.trials) == 3


def test_studies_that_it_cannot_serve_are_refused() -> None:
    several = optuna.create_study(directions=["minimize", "maximize"], sampler=GradientSampler())
    several.add_trial(
        optuna.create_trial(
            values=[0.0, 1.0], params={"x": 0.5}, distributions={"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
        )
    )
    with pytest.raises(ValueError, match="the study has 2 objectives"):
        several.ask().suggest_float("x", 0.0, 1.0)
    wide = optuna.create_study(sampler=ht.search.GradientSampler())
    names = [f"x{number}" for number in range(21)]
    wide.add_trial(
        optuna.create_trial(
            value=0.0,
            params=dict.fromkeys(names, 0.5),
            distributions=dict.fromkeys(names, optuna.distributions.FloatDistribution(0.0, 1.0)),
        )
    )
    with pytest.raises(ValueError, match="the study has 21 floats"):
        wide.ask().suggest_float("x0", 0.0, 1.0)


def test_a_report_names_what_was_suggested() -> None:
    trial = optuna.create_study(sampler=GradientSampler()).ask()
    trial.suggest_float("lr", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"`grads` names \['rate'\], which the trial has not suggested"):
        GradientSampler.report(trial, {"rate": 1.0})
    with pytest.raises(ValueError, match=r"`grads\['lr'\]` has shape \(2,\), but a parameter of a trial is one number"):
        GradientSampler.report(trial, {"lr": torch.ones(2)})  # type: ignore[dict-item]
    GradientSampler.report(trial, {"lr": torch.tensor(1.5)})  # type: ignore[dict-item]
    assert trial.user_attrs[GradientSampler.USER_ATTRIBUTE] == {"lr": 1.5}


def test_a_trial_that_was_enqueued_outside_is_left_out() -> None:
    study = optuna.create_study(sampler=GradientSampler(num_initial=2))
    study.enqueue_trial({"lr": 0.5, "shift": 5.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.optimize(lambda trial: value(*suggested(trial))[0], n_trials=4)
    assert len(study.trials) == 4
