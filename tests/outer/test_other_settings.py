"""A run that goes on is the run that it was: other settings are named and refused, or taken where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, StepLR

import hypertorch as ht
from hypertorch import outer
from hypertorch.errors import CheckpointError
from hypertorch.outer.storage.checkpoints import Checkpoint, Checkpoints
from hypertorch.types import TensorDict
from tests.outer.problems import Quadratics
from tests.outer.runs import full_loop, make_loop


def grouped(variables: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [variable]} for variable in variables], lr=0.05)


VALIDATION = {"source": Quadratics(offset=500), "every": 6, "num_episodes": 10}
OTHER: list[tuple[Quadratics, dict[str, Any], str]] = [
    (Quadratics(), {"optimizer": partial(torch.optim.Adam, lr=0.1)}, "`optimizer.lr` is 0.1, and was 0.05"),
    (
        Quadratics(),
        {"optimizer": partial(torch.optim.Adam, lr=0.05, betas=(0.5, 0.9))},
        "`optimizer.betas` is (0.5, 0.9), and was (0.9, 0.999)",
    ),
    (
        Quadratics(),
        {"optimizer": partial(torch.optim.SGD, lr=0.05)},
        "`optimizer.class` is torch.optim.sgd.SGD, and was torch.optim.adam.Adam",
    ),
    (Quadratics(), {"optimizer": grouped}, "`optimizer.0` is builtins.dict, and was absent"),
    (
        Quadratics(),
        {"scheduler": partial(StepLR, step_size=3, gamma=0.7)},
        "`scheduler.step_size` is 3, and was 4",
    ),
    (Quadratics(), {"scheduler": None}, "`scheduler` is None, and was builtins.dict"),
    (
        Quadratics(),
        {"scheduler": partial(ExponentialLR, gamma=0.7)},
        "`scheduler.class` is torch.optim.lr_scheduler.ExponentialLR, and was torch.optim.lr_scheduler.StepLR",
    ),
    (Quadratics(), {"clip_norm": 2.0}, "`clip_norm` is 2.0, and was 1.0"),
    (Quadratics(), {"clip_norm": None}, "`clip_norm` is None, and was 1.0"),
    (
        Quadratics(),
        {"constraints": {"curvature": ht.constraints.Box(lower=0.5, upper=2.5)}},
        "`constraints.curvature.upper` is 2.5, and was 2.05",
    ),
    (Quadratics(), {"constraints": None}, "`constraints.curvature` is absent, and was hypertorch.constraints.Box"),
    (Quadratics(), {"learning_rates": {"start": 0.1}}, "`learning_rates.start` is 0.1, and was absent"),
    (
        Quadratics(),
        {"backend": ht.hypergradients.Reversible()},
        "`backend` is hypertorch.hypergradients.reversible.Reversible, and was hypertorch.hypergradients.reverse.Rev",
    ),
    (
        Quadratics(),
        {"backend": ht.hypergradients.Reverse(checkpoint_every=2)},
        "`backend.checkpoint_every` is 2, and was None",
    ),
    (Quadratics(lr=0.2), {}, "`dynamics.lr` is 0.2, and was 0.1"),
    (Quadratics(num_steps=4), {}, "`num_steps` is 4, and was 3"),
    (Quadratics(num_tasks=5), {}, "`num_tasks` is 5, and was 4"),
    (
        Quadratics(),
        {"execution": ht.Execution(tasks="vmap", inner_dtype=torch.bfloat16)},
        "`inner_dtype` is torch.bfloat16, and was None",
    ),
    (
        Quadratics(),
        {"validation": outer.Validation(**VALIDATION, metric="outer_loss")},
        "`validation.metric` is 'outer_loss', and was 'distance'",
    ),
    (
        Quadratics(),
        {"validation": outer.Validation(**VALIDATION, metric="distance", mode="min")},
        "`validation.mode` is 'min', and was 'max'",
    ),
]


@pytest.mark.parametrize(("source", "options", "message"), OTHER, ids=[message[:30] for *_, message in OTHER])
def test_each_other_setting_is_named_and_refused(
    source: Quadratics, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    full_loop(tmp_path).run(6)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"was made with other settings: .*\. It would not go on as the"
    ) as caught:
        full_loop(tmp_path, source, **options).run(8, resume=True)
    assert message in str(caught.value)
    # Nothing of the run was touched.
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints").paths()] == [
        "step_00000005.safetensors",
        "step_00000006.safetensors",
    ]


def test_where_kept_states_lie_may_change_but_not_whether_they_lie_there(tmp_path: Path) -> None:
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    for folder in (first, second):
        Path(folder).mkdir()
    spilling, elsewhere, in_memory = (
        ht.hypergradients.Reverse(checkpoint_every=1, spill_to=folder) for folder in (first, second, None)
    )
    full_loop(tmp_path, backend=spilling).run(6)
    full_loop(tmp_path, backend=elsewhere).run(8, resume=True)
    with pytest.raises(CheckpointError, match=r"`backend\.spill_to` is None, and was pathlib"):
        full_loop(tmp_path, backend=in_memory).run(10, resume=True)


def test_all_that_differ_are_listed_but_not_what_a_class_brings_with_it(tmp_path: Path) -> None:
    full_loop(tmp_path).run(5)
    with pytest.raises(CheckpointError) as caught:
        full_loop(tmp_path, Quadratics(lr=0.2), optimizer=partial(torch.optim.SGD, lr=0.1), clip_norm=3.0).run(
            6, resume=True
        )
    listed = str(caught.value).split("other settings: ")[1].split(". It would")[0].split("; ")
    assert [entry.split("`")[1] for entry in listed] == ["clip_norm", "optimizer.class", "dynamics.lr"]


def test_a_done_run_is_compared_but_for_its_problem(tmp_path: Path) -> None:
    full_loop(tmp_path).run(6)
    with pytest.raises(CheckpointError, match=r"`optimizer\.lr` is 0\.1"):
        full_loop(tmp_path, optimizer=partial(torch.optim.Adam, lr=0.1)).run(6, resume=True)
    assert full_loop(tmp_path, Quadratics(fail_at=0)).run(6, resume=True).num_outer_steps == 6


def test_a_done_run_of_one_problem_is_compared_with_that_too(tmp_path: Path) -> None:
    problem = replace(Quadratics(num_tasks=None).at(0), allow_unused=("start",))

    def real_time(every: int) -> outer.RealTime:
        return outer.RealTime(
            problem, optimizer=partial(torch.optim.SGD, lr=0.1), every=every, checkpoints=Checkpoints(tmp_path)
        )

    real_time(2).run(8)
    # As many updates as were made, of other steps.
    with pytest.raises(CheckpointError, match="`num_steps` is 3, and was 2"):
        real_time(3).run(12, resume=True)


def descent(steps: int, rate: float, hparams: TensorDict, first: int = 0) -> TensorDict:
    """Gradient descent by the formula."""
    for step in range(first, first + steps):
        _, grads = Quadratics().formula(hparams, step)
        hparams = {name: value - rate * grads[name] for name, value in hparams.items()}
    return hparams


def plain(folder: Path, rate: float, **options: Any) -> outer.OuterLoop:
    settings = {"optimizer": partial(torch.optim.SGD, lr=rate), "checkpoints": Checkpoints(folder), **options}
    return make_loop(**settings)


def assert_close(found: TensorDict, wanted: TensorDict) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_an_overridden_learning_rate_holds_from_there_on(tmp_path: Path) -> None:
    plain(tmp_path, 0.1).run(3)
    found = plain(tmp_path, 0.02).run(5, resume=True, override=True)
    middle = descent(3, 0.1, Quadratics().init_hparams())
    assert_close(found.hparams, descent(2, 0.02, middle, first=3))
    # They are the settings of the run now.
    assert plain(tmp_path, 0.02).run(6, resume=True).num_outer_steps == 6
    with pytest.raises(CheckpointError, match=r"`optimizer\.lr` is 0\.1, and was 0\.02"):
        plain(tmp_path, 0.1).run(7, resume=True)


def test_an_overridden_optimizer_starts_with_an_empty_state(tmp_path: Path) -> None:
    plain(tmp_path, 0.1).run(3)
    adam = partial(torch.optim.Adam, lr=0.01, eps=1e-12)
    found = plain(tmp_path, 0.1, optimizer=adam).run(4, resume=True, override=True)
    middle = descent(3, 0.1, Quadratics().init_hparams())
    _, grads = Quadratics().formula(middle, 3)
    # The first step of Adam is the sign of the gradient.
    assert_close(found.hparams, {name: value - 0.01 * grads[name].sign() for name, value in middle.items()})


def test_the_state_of_an_optimizer_with_another_setting_is_kept(tmp_path: Path) -> None:
    momentum = partial(torch.optim.SGD, momentum=0.5)
    plain(tmp_path, 0.0, optimizer=partial(momentum, lr=0.1)).run(2)
    found = plain(tmp_path, 0.0, optimizer=partial(momentum, lr=0.02)).run(3, resume=True, override=True)
    hparams, velocity = Quadratics().init_hparams(), {}
    for step, rate in enumerate((0.1, 0.1, 0.02)):
        _, grads = Quadratics().formula(hparams, step)
        velocity = {name: grad + 0.5 * velocity.get(name, 0.0) for name, grad in grads.items()}
        hparams = {name: value - rate * velocity[name] for name, value in hparams.items()}
    assert_close(found.hparams, hparams)


@pytest.mark.parametrize(
    ("scheduler", "rate", "expected"),
    [
        (partial(StepLR, step_size=2, gamma=0.5), 0.1, [0.025, 0.0125]),  # halved after 2, 4 and 6 steps
        (partial(StepLR, step_size=4, gamma=0.7), 0.2, [0.14, 0.14]),
        (None, 0.1, [0.1, 0.1]),
        (partial(ExponentialLR, gamma=0.5), 0.1, [0.1 * 0.5**5, 0.1 * 0.5**6]),
    ],
)
def test_an_overridden_schedule_is_where_it_would_be(
    scheduler: Any, rate: float, expected: list[float], tmp_path: Path
) -> None:
    plain(tmp_path, 0.1, scheduler=partial(StepLR, step_size=4, gamma=0.7)).run(5)
    memory = ht.MemoryLogger()
    plain(tmp_path, rate, scheduler=scheduler, loggers=[memory]).run(7, resume=True, override=True)
    assert [record["learning_rate"] for record in memory.records] == pytest.approx(expected)


def test_overridden_rates_of_single_variables_start_with_an_empty_state(tmp_path: Path) -> None:
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    before = plain(tmp_path, 0.0, optimizer=momentum, learning_rates={"start": 0.2}).run(3).hparams
    found = plain(tmp_path, 0.0, optimizer=momentum, learning_rates={"curvature": 0.2}).run(
        4, resume=True, override=True
    )
    _, grads = Quadratics().formula(before, 3)
    rates = {"start": 0.1, "curvature": 0.2}
    assert_close(found.hparams, {name: value - rates[name] * grads[name] for name, value in before.items()})


def test_a_new_run_has_nothing_to_override(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`override` is True, but `resume` is False"):
        full_loop(tmp_path).run(5, override=True)


def test_the_metric_may_change_while_there_is_no_best_figure(tmp_path: Path) -> None:
    full_loop(tmp_path, validation=None).run(5)
    assert full_loop(tmp_path).run(6, resume=True).best_step == 6


def test_tensors_functions_and_modules_of_a_dynamics_are_compared(tmp_path: Path) -> None:
    class Rates(Quadratics):
        def __init__(self, dynamics: ht.Dynamics) -> None:
            super().__init__()
            object.__setattr__(self, "dynamics", dynamics)

        def at(self, outer_step: int) -> ht.BilevelProblem:
            return replace(super().at(outer_step), dynamics=self.dynamics)

    def run(name: str, *dynamics: ht.Dynamics) -> None:
        full_loop(tmp_path / name, Rates(dynamics[0])).run(5)
        full_loop(tmp_path / name, Rates(dynamics[1])).run(6, resume=True)

    same = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    run("equal tensors", ht.dynamics.SGD(lr=[0.1, 0.2, 0.3]), ht.dynamics.SGD(lr=[0.1, 0.2, 0.3]))
    with pytest.raises(CheckpointError, match=r"`dynamics\.lr` is \[0\.1, 0\.2, 0\.4\], and was"):
        run("another list", ht.dynamics.SGD(lr=[0.1, 0.2, 0.3]), ht.dynamics.SGD(lr=[0.1, 0.2, 0.4]))
    run("equal", ht.dynamics.SGD(lr={"w": same}), ht.dynamics.SGD(lr={"w": same.clone()}))
    with pytest.raises(CheckpointError, match=r"`dynamics\.lr\.w` is float64 \(3,\) of checksum"):
        run("another", ht.dynamics.SGD(lr={"w": same}), ht.dynamics.SGD(lr={"w": same * 2}))


def altered(folder: Path, **changes: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder / "checkpoints")
    newest = checkpoints.newest()
    assert newest is not None
    checkpoint: Checkpoint = replace(checkpoints.load(newest), **changes)
    newest.unlink()
    checkpoints.save(checkpoint)
    return checkpoints


@pytest.mark.parametrize(
    "changes",
    [
        {"validated_step": -1},
        {"validated_step": 9},
        {"validated_step": True},
        {"validated_step": 2.0},
        {"best_step": 9},
        {"best_step": "2"},
        {"best_value": "large"},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"seconds": None},
        {"task_route": 3},
        {"optimizer": []},
        {"scheduler": 3},
        {"carry_on_host": ["w"]},
        {"carry_on_host": (1,)},
        {"settings": None},
        {"settings": {"num_steps": 3}},
        {"settings": {3: "num_steps"}},
    ],
    ids=str,
)
def test_entries_that_no_run_writes_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    full_loop(tmp_path).run(5)
    altered(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"has a header that no run writes \((Type|Value)Error: .*was altered"):
        full_loop(tmp_path).run(6, resume=True)


def test_lost_settings_are_other_settings(tmp_path: Path) -> None:
    full_loop(tmp_path).run(5)
    altered(tmp_path, settings={})
    with pytest.raises(CheckpointError, match=r"`num_steps` is 3, and was absent"):
        full_loop(tmp_path).run(6, resume=True)


class Warm(Quadratics):
    """Quadratics that go on from the last inner state."""

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return replace(super().at(outer_step), warm_start=True, allow_unused=("start",))


def test_a_warm_run_does_not_go_on_without_its_inner_state(tmp_path: Path) -> None:
    full_loop(tmp_path, Warm(), validation=None).run(5)
    altered(tmp_path, carry={}, carry_on_host=())
    with pytest.raises(CheckpointError, match=r"lacks the inner state after 5 outer steps.*Delete it"):
        full_loop(tmp_path, Warm(), validation=None).run(6, resume=True)
