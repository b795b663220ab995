"""A widened net computes the same function, and its copies learn to differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.search import widen
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import normal

F64 = torch.float64


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def convolutions(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4),
    ).double()  # fmt: skip


def flattened(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16 * width, 4)).double()


NETS: dict[str, tuple[Callable[[int], nn.Sequential], tuple[int, ...], dict[str, Any]]] = {
    "mlp": (mlp, (7, 5), {"layer": "0", "following": "2"}),
    "convolutions": (convolutions, (7, 2, 6, 6), {"layer": "0", "following": ["4"], "beside": "1"}),
    "flattened": (flattened, (7, 2, 6, 6), {"layer": "0", "following": "3"}),
}


@pytest.mark.parametrize("num_units", [3, 4, 11])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_the_function_stays_the_same(name: str, num_units: int, training: bool) -> None:
    make, shape, where = NETS[name]
    torch.manual_seed(0)
    narrow, inputs = make(3), normal(*shape, seed=1)
    narrow(inputs)  # running statistics that are not those of a new net
    where = dict(where)
    wider = widen(narrow.state_dict(), where.pop("layer"), num_units=num_units, **where)
    net = make(num_units)
    assert {key: value.shape for key, value in wider.items()} == {k: v.shape for k, v in net.state_dict().items()}
    net.load_state_dict(wider)
    torch.testing.assert_close(net.train(training)(inputs), narrow.train(training)(inputs), rtol=0.0, atol=1e-12)


def test_units_are_copied_and_shared_out() -> None:
    params = dict(mlp(3).state_dict())
    wider = widen(params, "0", num_units=9, following="2", seed=4)
    assert list(wider) == list(params) and wider["4.weight"] is params["4.weight"]
    torch.testing.assert_close(wider["0.weight"][:3], params["0.weight"], rtol=0.0, atol=0.0)
    for unit in range(3):
        copies = (wider["0.weight"] == params["0.weight"][unit]).all(dim=1)
        assert (wider["0.bias"][copies] == params["0.bias"][unit]).all()
        shared = wider["2.weight"][:, copies]
        torch.testing.assert_close(shared.sum(dim=1), params["2.weight"][:, unit])
        # None has all, and none has the share of another.
        assert copies.sum() == 1 or len(shared[0].unique()) == copies.sum()
    same = widen(params, "0", num_units=3, following="2")
    assert all(torch.equal(same[name], value) for name, value in params.items())
    assert not torch.equal(widen(params, "0", num_units=9, following="2", seed=5)["2.weight"], wider["2.weight"])


def test_copies_have_gradients_of_their_own() -> None:
    params = widen(dict(mlp(3).state_dict()), "0", num_units=9, following="2")
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    outputs = functional_call(mlp(9), leaves, (normal(7, 5, seed=1),))
    gradient = torch.autograd.grad(outputs.square().sum(), leaves["0.weight"])[0]
    assert len(gradient.unique(dim=0)) == 9


class LearntStart(ht.InnerProblem):
    """A net of two layers whose first weights are the outer variables."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {name.removeprefix("start."): value for name, value in hparams.items()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return squared_error(params, 0)


class HeldOut(ht.OuterProblem):
    def __init__(self, width: int) -> None:
        self.width = width

    def init_hparams(self) -> TensorDict:
        return {"start.in.weight": normal(self.width, 5, seed=2), "start.out.weight": normal(1, self.width, seed=3)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return squared_error(params, 1)


def squared_error(params: TensorDict, seed: int) -> Tensor:
    inputs = normal(20, 5, seed=seed)
    outputs = F.linear(F.linear(inputs, params["in.weight"]).tanh(), params["out.weight"])
    return (outputs[:, 0] - inputs.prod(dim=1).sin()).square().mean()


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_learnt_start_is_inherited_by_a_wider_net(num_steps: int) -> None:
    def loop(width: int) -> ht.OuterLoop:
        problem = ht.BilevelProblem(
            LearntStart(), HeldOut(width), dynamics=ht.dynamics.SGD(lr=0.05), num_steps=num_steps
        )
        return ht.OuterLoop(
            problem, optimizer=lambda hparams: torch.optim.SGD(hparams, lr=0.05), backend=ht.hypergradients.Reverse()
        )

    narrow = loop(3)
    found = narrow.run(20).hparams
    wider = widen(found, "start.in", num_units=8, following="start.out")
    wide = loop(8)
    before = ht.evaluate(narrow.source, found, num_episodes=1).metrics["outer_loss"].mean
    after = ht.evaluate(wide.source, wider, num_episodes=1).metrics["outer_loss"].mean
    # With inner steps the wider net, which starts as the same function, takes others.
    assert after == pytest.approx(before, rel=1e-12 if num_steps == 0 else 0.1)
    further = wide.run(20, start_from=wider).hparams
    assert ht.evaluate(wide.source, further, num_episodes=1).metrics["outer_loss"].mean < after


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"layer": "9"}, "`layer` names '9', but `9.weight` is missing"),
        ({"layer": "norm"}, r"`norm.weight` has shape \(3,\)"),
        ({"num_units": 2}, "`num_units` is 2, but `0` has 3 units"),
        ({"num_units": 4.0}, "`num_units` is 4.0"),
        ({"following": ()}, "`following` names no layer"),
        ({"following": "4"}, r"`4.weight` has shape \(3, 4\), whose second axis does not hold the 3 units"),
        ({"beside": "2"}, "`beside` names '2', whose tensors are"),
        ({"beside": "absent"}, "`beside` names 'absent', whose tensors are {}"),
        # Layers that read themselves: the second axis alone would be widened.
        ({"layer": "square", "following": "square"}, "`following` names 'square', and so does `layer`"),
        ({"layer": "square", "following": ("2", "square")}, "Name a layer in one role"),
        ({"following": "square", "beside": "square"}, "`following` names 'square', and so does `beside`"),
        ({"seed": 2**64}, "`seed` must be at least 0 and below 2 .. 64, got 18446744073709551616"),
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], message: str) -> None:
    square = {"square.weight": torch.ones(3, 3, dtype=F64), "square.bias": torch.ones(3, dtype=F64)}
    params = {**mlp(3).state_dict(), "norm.weight": torch.ones(3, dtype=F64), **square}
    where: dict[str, Any] = {"layer": "0", "num_units": 5, "following": "2", **how}
    with pytest.raises(ValueError, match=message):
        widen(params, where.pop("layer"), **where)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"params": mlp(3)}, r"`params` is a `Sequential`: .* `module.state_dict\(\)`"),
        ({"params": {"0.weight": [[1.0]]}}, r"`params\['0.weight'\]` is a `list`"),
        ({"layer": 0}, "`layer` is 0, a `int`: layers are called by text"),
        ({"layer": ["0"]}, r"`layer` is \['0'\], a `list`"),
        ({"following": 2}, "`following` is 2, a `int`"),
        ({"beside": (1,)}, r"`beside` is \(1,\), a `tuple`"),
        ({"seed": None}, "`seed` is None, a NoneType"),
        ({"seed": True}, "`seed` is True, a bool"),
        # Shares below 1 would be cut to 0.
        (
            {"params": {name: value.long() for name, value in mlp(3).state_dict().items()}},
            "`layer` names '0', but `0.weight` has dtype torch.int64",
        ),
        (
            {"params": {**mlp(3).state_dict(), "2.weight": torch.ones(4, 3, dtype=torch.int32)}},
            "`following` names '2', but `2.weight` has dtype torch.int32",
        ),
    ],
)
def test_another_kind_of_argument_is_refused(how: dict[str, Any], message: str) -> None:
    where: dict[str, Any] = {"params": mlp(3).state_dict(), "layer": "0", "num_units": 5, "following": "2", **how}
    with pytest.raises(TypeError, match=message):
        widen(where.pop("params"), where.pop("layer"), **where)
