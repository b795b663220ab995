"""Modules as functions: buffers, frozen, shared and parametrised weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from tests.helpers.problems import LambdaInner, LambdaOuter, normal
from tests.helpers.sized_problems import mlp, sized_problem


def test_returns_new_buffers_and_leaves_all_inputs_alone() -> None:
    module = nn.BatchNorm1d(3).double()
    net = ht.FunctionalModule(module)
    params = net.init_params()
    before = {name: value.clone() for name, value in params.items()}
    _, buffers = net.with_buffers(params, normal(5, 3, seed=0))
    assert set(buffers) == set(net.buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    assert not torch.equal(buffers["running_mean"], before["running_mean"])
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert torch.equal(module.running_mean, before["running_mean"])


def test_frozen_parameters_stay_in_the_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    net = ht.FunctionalModule(module)
    assert set(net.init_params()) == {"1.weight", "1.bias"}
    assert net(net.init_params(), torch.ones(1, 2)).shape == (1, 1)


def test_shared_parameters_have_one_entry() -> None:
    layer = nn.Linear(3, 3, bias=False)
    net = ht.FunctionalModule(nn.Sequential(layer, nn.Tanh(), layer))
    params = net.init_params()
    assert list(params) == ["0.weight"]
    doubled = {"0.weight": torch.eye(3) * 2.0}
    expected = 2.0 * torch.tanh(2.0 * torch.ones(1, 3))
    torch.testing.assert_close(net(doubled, torch.ones(1, 3)), expected)


def check(module: nn.Module, *inputs: torch.Tensor) -> ht.HypergradientCheck:
    """Trains the module from a learnt initialisation and checks the hypergradient."""
    net = ht.FunctionalModule(module.double())
    start = {name: value for name, value in net.init_params().items() if name in net.trained_names()}
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {name: h[name] for name in start}, lambda p, h, b: net(p, *inputs).square().mean()),
        LambdaOuter(start, lambda p, h, b: net(p, *inputs).sin().mean()),
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.5),
        num_steps=3,
    )
    return ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse(checkpoint_every=2))


def test_shared_weights_have_the_right_hypergradient() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    verdict = check(nn.Sequential(layer, nn.Tanh(), layer), normal(4, 3, seed=0))
    assert verdict.passed, str(verdict)


class PlainWeightNorm(nn.Module):
    """Weight normalisation written out of differentiable pieces."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.length = nn.Parameter(weight.detach().norm(dim=1, keepdim=True))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.length * weight / weight.norm(dim=1, keepdim=True)


def test_weight_norm_written_out_has_the_right_hypergradient() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", PlainWeightNorm(layer.weight))
    verdict = check(layer, normal(4, 3, seed=0))
    assert verdict.passed, str(verdict)


def test_fused_weight_norm_is_refused() -> None:
    module = nn.Sequential(nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(IncompatibleBackendError, match="at `1.parametrizations.weight.0`.*Remove it, or write"):
        ht.FunctionalModule(module)


def test_the_reason_for_refusing_it_is_still_there() -> None:
    """Documents why. A torch that mends the second derivative fails here: then stop refusing."""
    torch.manual_seed(0)
    v, g = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    arguments = (v.requires_grad_(), g.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, g: torch._weight_norm(v, g, 0), arguments)
    assert not torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), arguments, raise_exception=False)


def test_dropout_has_the_right_hypergradient() -> None:
    torch.manual_seed(0)
    verdict = check(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), normal(4, 3, seed=0))
    assert verdict.passed, str(verdict)


def test_needs_a_module() -> None:
    with pytest.raises(TypeError, match="`module` is a function, not a `torch.nn.Module`"):
        ht.FunctionalModule(lambda x: x)  # type: ignore[arg-type]


def test_a_sub_module_exchanged_after_wrapping_is_the_one_called() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())
    net = ht.FunctionalModule(module)
    weights = {"0.weight": torch.eye(2)}
    ones = torch.ones(1, 2)
    net(weights, ones)
    module[1] = nn.Sigmoid()
    torch.testing.assert_close(net(weights, ones), ones.sigmoid())
    module[0] = nn.Linear(2, 2, bias=False)
    torch.testing.assert_close(net(weights, ones), ones.sigmoid())


def test_weights_tied_and_untied_after_wrapping_are_seen() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net = ht.FunctionalModule(module)
    ones = torch.ones(1, 2)
    own = module[1].weight
    torch.testing.assert_close(net({"0.weight": 2.0 * torch.eye(2), "1.weight": torch.eye(2)}, ones), 2.0 * ones)
    module[1].weight = module[0].weight
    torch.testing.assert_close(net({"0.weight": 2.0 * torch.eye(2)}, ones), 4.0 * ones)
    module[1].weight = own
    torch.testing.assert_close(net({"0.weight": 2.0 * torch.eye(2), "1.weight": torch.eye(2)}, ones), 2.0 * ones)


def test_copies_call_their_own_module() -> None:
    net = ht.FunctionalModule(nn.Linear(2, 1))
    net(net.init_params(), torch.ones(1, 2))
    for other in (copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net))):
        other.module = nn.Linear(2, 1, bias=False)
        weights = {"weight": torch.ones(1, 2)}
        assert other(weights, torch.ones(1, 2)).item() == 2.0
    assert net({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, torch.ones(1, 2)).item() == 3.0


def test_a_module_that_raises_keeps_its_weights() -> None:
    module = nn.Linear(2, 1)
    before = module.weight
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ht.FunctionalModule(module)({"weight": torch.zeros(1, 2)}, torch.ones(1, 3))
    assert module.weight is before


def test_an_unknown_name_is_pytorchs_to_judge() -> None:
    layer = nn.Linear(2, 2, bias=False)
    net = ht.FunctionalModule(nn.Sequential(layer, layer))
    # The second name of a shared weight.
    torch.testing.assert_close(net({"1.weight": 2.0 * torch.eye(2)}, torch.ones(1, 2)), 4.0 * torch.ones(1, 2))
    with pytest.raises(AttributeError):
        net({"2.weight": torch.eye(2)}, torch.ones(1, 2))


def test_a_buffer_that_is_replaced_is_returned_like_one_that_is_written_to() -> None:
    class Replacing(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.in_place = in_place
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            new = 0.5 * self.mean + 0.5 * inputs.mean(0)
            if self.in_place:
                self.mean.copy_(new)
            else:
                self.mean = new
            return inputs - self.mean

    values = normal(4, 3, seed=0).float()
    for start in ({}, {"mean": torch.ones(3)}):
        module = Replacing(in_place=False)
        own = module.mean
        outputs, buffers = ht.FunctionalModule(module).with_buffers(start, values)
        expected_outputs, expected = ht.FunctionalModule(Replacing(in_place=True)).with_buffers(start, values)
        torch.testing.assert_close((outputs, buffers), (expected_outputs, expected))
        assert module.mean is own
        assert not own.any()


class Bag(nn.Module):
    """The embedding bag that the advice speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens).mean(dim=1)


@pytest.mark.parametrize(
    ("refused", "advised", "advice"),
    [
        (
            nn.Embedding(5, 2, sparse=True),
            nn.Embedding(5, 2),
            "at `0` with `sparse=True`.*Build it with `sparse=False`",
        ),
        (
            nn.EmbeddingBag(5, 2, sparse=True),
            Bag(),
            r"`EmbeddingBag` at `0`.*`nn.Embedding\(\.\.\.\)\(tokens\).mean\(dim=1\)`",
        ),
    ],
    ids=["embedding", "bag"],
)
def test_embeddings_without_a_second_derivative_are_refused(
    refused: nn.Module, advised: nn.Module, advice: str
) -> None:
    with pytest.raises(IncompatibleBackendError, match=advice):
        ht.FunctionalModule(nn.Sequential(refused))
    ht.FunctionalModule(refused.requires_grad_(False))  # a constant has no gradient
    verdict = check(advised, torch.tensor([[0, 1], [4, 1]]))
    assert verdict.passed, str(verdict)


def test_an_embedding_bag_is_named_where_its_second_derivative_is_missing() -> None:
    with pytest.raises(IncompatibleBackendError, match="`_embedding_bag_backward`, which PyTorch cannot differentiate"):
        check(nn.EmbeddingBag(5, 2), torch.tensor([[0, 1], [4, 1]]))


def sparse_function(sparse: bool) -> ht.BilevelProblem:
    tokens = torch.tensor([0, 1, 4, 1])
    start = {"table": normal(5, 2, seed=0)}
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: dict(start),
            lambda p, h, b: (h["c"] * nn.functional.embedding(tokens, p["table"], sparse=sparse).tanh()).square().sum(),
        ),
        LambdaOuter({"c": normal(4, 2, seed=1)}, lambda p, h, b: p["table"].sin().sum()),
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.5),
        num_steps=2,
    )


@pytest.mark.parametrize(
    "backend", [ht.hypergradients.Reverse(checkpoint_every=1), ht.hypergradients.Forward()], ids=["segments", "forward"]
)
def test_sparse_gradients_of_a_function_are_named(backend: ht.Hypergradient) -> None:
    with pytest.raises(IncompatibleBackendError, match="sparse gradient.*`sparse=False`"):
        ht.hypergradient(sparse_function(True), sparse_function(True).init_hparams(), backend=backend)
    dense = sparse_function(False)
    verdict = ht.check_hypergradient(dense, dense.init_hparams(), backend)
    assert verdict.passed, str(verdict)


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile()
    return module


COMPILED = {
    "torch.compile": torch.compile,
    "compile": compiled_in_place,
    "a part": lambda module: nn.Sequential(torch.compile(module)),
    "a part, in place": lambda module: nn.Sequential(compiled_in_place(module)),
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, torch.ones(1, 2)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", COMPILED)
def test_a_module_that_is_compiled_already_is_not_trained(how: str) -> None:
    module = ht.FunctionalModule(COMPILED[how](nn.Linear(2, 2)))
    where = "at `0`" if how.startswith("a part") else "itself"
    message = rf"compiled already \({where}, by .*plain module.*`Reverse\(compile=True\)`"
    with pytest.raises(IncompatibleBackendError, match=message):
        module.init_params()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_function_that_is_compiled_already_is_named() -> None:
    """A module cannot be asked for it: what it calls may be compiled anywhere."""
    layer = nn.Linear(2, 2).double()
    called = torch.compile(lambda weight, inputs: (inputs @ weight).tanh(), backend="aot_eager")
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": layer.weight.detach()},
            lambda p, h, b: (h["c"] * called(p["w"], h["c"][None])).square().sum(),
        ),
        LambdaOuter({"c": normal(2, seed=0)}, lambda p, h, b: p["w"].sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
    )
    with pytest.raises(IncompatibleBackendError, match=r"compiled already.*plain one.*`Reverse\(compile=True\)`"):
        ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_outer_loss_may_call_a_compiled_function() -> None:
    """It is differentiated once; its params, after a step, are no leaves."""
    torch.compiler.reset()
    judged = torch.compile(lambda w: w.tanh().square().sum(), backend="aot_eager")

    def problem(judge: Callable[[Tensor], Tensor]) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(lambda h: {"w": 1.0 * h["c"]}, lambda p, h, b: (p["w"] - h["c"].sin()).square().sum()),
            LambdaOuter({"c": normal(2, seed=0)}, lambda p, h, b: judge(p["w"])),
            dynamics=ht.dynamics.SGD(lr=0.1),
            num_steps=2,
        )

    made, plain = problem(judged), problem(lambda w: w.tanh().square().sum())
    found = ht.hypergradient(made, made.init_hparams(), backend=ht.hypergradients.Reverse()).grads["c"]
    expected = ht.hypergradient(plain, plain.init_hparams(), backend=ht.hypergradients.Reverse()).grads["c"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_threads_that_share_a_module_do_not_mix() -> None:
    """Such as trials of a search that runs them in threads."""
    problem = sized_problem(mlp(20, 16, 5), 80, 20, num_steps=30, dynamics=ht.dynamics.SGD(lr=0.1))
    hparams = problem.init_hparams()
    backend = ht.hypergradients.Reverse()
    expected = ht.hypergradient(problem, hparams, backend=backend).grads
    with ThreadPoolExecutor(max_workers=3) as threads:
        asked = [threads.submit(ht.hypergradient, problem, hparams, backend=backend) for _ in range(9)]
    found = [one.result().grads for one in asked]
    # Also later: nothing of them stayed in the module.
    found.append(ht.hypergradient(problem, hparams, backend=backend).grads)
    assert all(torch.equal(grads[name], value) for grads in found for name, value in expected.items())
