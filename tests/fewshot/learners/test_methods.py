"""Every learner: its hypergradient by central differences, and its paper's formula computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.fewshot import (
    ANIL,
    IMAML,
    MAML,
    MLP,
    R2D2,
    ClosedFormHead,
    Episode,
    Examples,
    HyperRepresentation,
    Learner,
    MetaSGD,
    NetworkLearner,
    ProtoNet,
    Reptile,
)
from hypertorch.types import Batch, TensorDict
from tests.fewshot.learners.test_learners import Blobs, with_smooth_activations
from tests.helpers.leaves import learner_of, leaves
from tests.helpers.problems import normal

F64 = torch.float64
SGD = ht.dynamics.SGD
backends = ht.hypergradients
WAY = 3


def network(way: int | None = WAY) -> nn.Module:
    torch.manual_seed(0)
    return with_smooth_activations(MLP(in_features=16, hidden=(6,), out_features=way)).double()


LEARNERS: dict[str, Callable[[], Learner]] = {
    "MAML": lambda: MAML(network(), dynamics=SGD(lr=0.2), num_steps=3),
    "MetaSGD": lambda: MetaSGD(network(), dynamics=SGD(lr=0.2), num_steps=2),
    "IMAML": lambda: IMAML(network(), dynamics=SGD(lr=0.1), num_steps=3, proximity=0.7),
    "Reptile": lambda: Reptile(network(), dynamics=SGD(lr=0.2), num_steps=3),
    "HyperRepresentation": lambda: HyperRepresentation(network(None), way=WAY, dynamics=SGD(lr=0.8), num_steps=3),
    "ANIL": lambda: ANIL(network(None), way=WAY, dynamics=SGD(lr=0.2), num_steps=3, learn_lr="one"),
    "ProtoNet": lambda: ProtoNet(network(None), way=WAY),
    "R2D2": lambda: R2D2(network(None), way=WAY, ridge=0.5, scale=2.0),
}
# A new learner is made by the arguments that it takes.
LEARNERS |= {
    name: partial(learner_of, leaf, 16, WAY, SGD(lr=0.2), F64)
    for name, leaf in leaves(ht.fewshot, Learner).items()
    if name not in LEARNERS
}


def compute(learner: Learner, backend: ht.Hypergradient, route: str = "vmap") -> ht.HypergradientResult:
    source = learner.on(Blobs())
    execution = ht.Execution(tasks=route)  # type: ignore[arg-type]
    return ht.hypergradient(source.at(0), source.init_hparams(), backend=backend, execution=execution)


def test_every_learner_is_listed() -> None:
    assert set(leaves(ht.fewshot, Learner)) == set(LEARNERS)


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - {"Reptile"}))
def test_hypergradients_equal_central_differences(name: str) -> None:
    source = LEARNERS[name]().on(Blobs())
    check = ht.check_hypergradient(
        source.at(0), source.init_hparams(), backends.Reverse(), num_directions=1, step_size=1e-4
    )
    assert check.passed, str(check)


@pytest.mark.parametrize("name", LEARNERS)
def test_tasks_together_equal_tasks_one_by_one(name: str) -> None:
    together = compute(LEARNERS[name](), backends.Reverse(), "vmap").grads
    one_by_one = compute(LEARNERS[name](), backends.Reverse(), "loop").grads
    for key, value in together.items():
        torch.testing.assert_close(value, one_by_one[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LEARNERS)
def test_adapt_answers_as_the_episode_does(name: str) -> None:
    learner = LEARNERS[name]()
    hparams = learner.init_hparams()
    episode = Blobs(num_tasks=1).at(3)
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in episode)
    logits = learner.adapt(hparams, support)(query.inputs)
    assert logits.shape == (len(query.targets), WAY) and not logits.requires_grad
    accuracy = (logits.argmax(-1) == query.targets).double().mean()
    torch.testing.assert_close(ht.unroll(learner.problem(episode, 1), hparams).metrics["accuracy"][0], accuracy)


def by_hand(loss_of: Callable[[TensorDict, Examples, Examples], Tensor], hparams: TensorDict) -> TensorDict:
    """The gradient of the mean over tasks of a loss written without the library."""
    leaves = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    episode = Blobs().at(0)
    losses = []
    for task in range(len(episode.support.inputs)):
        support, query = (Examples(part.inputs[task], part.targets[task]) for part in episode)
        losses.append(loss_of(leaves, support, query))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def features(hparams: TensorDict, inputs: Tensor) -> Tensor:
    module = network(None)
    weights = {name: hparams[name] for name, _ in module.named_parameters()}
    return torch.func.functional_call(module, weights, (inputs,))


def assert_same(actual: TensorDict, expected: TensorDict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-13)


def test_proto_net_is_its_formula() -> None:
    def loss(hparams: TensorDict, support: Examples, query: Examples) -> Tensor:
        embedded = features(hparams, support.inputs)
        prototypes = torch.stack([embedded[support.targets == label].mean(0) for label in range(WAY)])
        return F.cross_entropy(-(torch.cdist(features(hparams, query.inputs), prototypes) ** 2), query.targets)

    learner = LEARNERS["ProtoNet"]()
    assert_same(compute(learner, backends.Reverse()).grads, by_hand(loss, learner.init_hparams()))


def test_r2d2_is_ridge_regression_of_the_labels() -> None:
    def loss(hparams: TensorDict, support: Examples, query: Examples) -> Tensor:
        x, z = (torch.cat([features(hparams, part), torch.ones(len(part), 1, dtype=F64)], 1) for part in
                (support.inputs, query.inputs))  # fmt: skip
        # The normal equations in the space of features, which Woodbury's identity avoids.
        matrix = x.T @ x + hparams["log_ridge"].exp() * torch.eye(x.shape[1], dtype=F64)
        weight = torch.linalg.inv(matrix) @ x.T @ F.one_hot(support.targets, WAY).double()
        return F.cross_entropy(hparams["log_scale"].exp() * z @ weight + hparams["shift"], query.targets)

    learner = LEARNERS["R2D2"]()
    hparams = {**learner.init_hparams()}
    result = compute(learner, backends.Reverse()).grads
    expected = by_hand(loss, hparams)
    assert abs(float(expected["shift"])) < 1e-12  # a common shift of logits does nothing to their cross-entropy
    assert_same(result, expected)


def test_meta_sgd_is_maml_with_a_step_size_for_every_weight() -> None:
    meta_sgd, maml = LEARNERS["MetaSGD"](), MAML(network(), dynamics=SGD(lr=0.2), num_steps=2)
    ours, plain = compute(meta_sgd, backends.Reverse()).grads, compute(maml, backends.Reverse()).grads
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)
        assert ours[f"log_lr.{name}"].shape == value.shape


def test_reptile_steps_towards_the_fitted_weights() -> None:
    learner = LEARNERS["Reptile"]()
    hparams = learner.init_hparams()
    fitted = ht.unroll(learner.on(Blobs()).at(0), hparams).params
    expected = {name: value - fitted[name].mean(0) for name, value in hparams.items()}
    for backend in (backends.Reverse(), backends.FirstOrder(), backends.Truncated(window=1)):
        assert_same(compute(learner, backend).grads, expected)


def test_imaml_by_implicit_differentiation_solves_its_equation() -> None:
    """At the inner minimum the hypergradient g solves (I + H / proximity) g = dE/dw."""
    proximity, steps = 2.0, 400
    learner = IMAML(network(), dynamics=SGD(lr=0.2), num_steps=steps, proximity=proximity)
    solver = ht.linear_solvers.ConjugateGradient(max_iterations=150, tolerance=1e-14)
    implicit = compute(learner, backends.Implicit(solver=solver)).grads
    unrolled = compute(learner, backends.Reverse(checkpoint_every="sqrt")).grads
    for name, value in unrolled.items():
        torch.testing.assert_close(implicit[name], value, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("proximity", [1.5, 3.0])
def test_imaml_is_the_papers_equation_by_dense_algebra(proximity: float) -> None:
    """Equations 3 and 6: `grad L(w) + proximity (w - theta) = 0`, and `(I + H / proximity) g = dE/dw` there.

    Solved here by Newton's method and by a matrix written out, without an inner loop.
    """
    learner = IMAML(network(), dynamics=SGD(lr=0.2), num_steps=200, proximity=proximity)
    solver = ht.linear_solvers.ConjugateGradient(max_iterations=200, tolerance=1e-14)
    result = compute(learner, backends.Implicit(solver=solver))
    module, theta = network(), learner.init_hparams()
    shapes = {name: value.shape for name, value in theta.items()}
    start = torch.cat([value.flatten() for value in theta.values()])

    def loss(flat: Tensor, part: Examples, task: int) -> Tensor:
        values = flat.split([shape.numel() for shape in shapes.values()])
        weights = {name: value.view(shape) for (name, shape), value in zip(shapes.items(), values, strict=True)}
        logits = torch.func.functional_call(module, weights, (part.inputs[task],))
        return F.cross_entropy(logits, part.targets[task])

    episode, identity = Blobs().at(0), torch.eye(len(start), dtype=F64)
    expected, minima = torch.zeros_like(start), []
    for task in range(3):
        at = torch.cat([result.params[name][task].flatten() for name in theta])
        for _ in range(3):
            slope = torch.func.grad(loss)(at, episode.support, task) + proximity * (at - start)
            curvature = torch.func.jacrev(torch.func.grad(loss))(at, episode.support, task)
            at = at - torch.linalg.solve(curvature + proximity * identity, slope)
        minima.append(at)
        curvature = torch.func.jacrev(torch.func.grad(loss))(at, episode.support, task)
        outer_slope = torch.func.grad(loss)(at, episode.query, task)
        expected += torch.linalg.solve(identity + curvature / proximity, outer_slope) / 3
    fitted = torch.stack([torch.cat([result.params[name][task].flatten() for name in theta]) for task in range(3)])
    torch.testing.assert_close(fitted, torch.stack(minima), rtol=1e-7, atol=1e-9)
    found = torch.cat([result.grads[name].flatten() for name in theta])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_first_order_maml_is_the_outer_gradient_at_the_fitted_weights() -> None:
    learner = LEARNERS["MAML"]()
    result = compute(learner, backends.FirstOrder(), "loop")
    fitted = result.params
    episode = Blobs().at(0)
    module = network()
    expected = {name: torch.zeros_like(value) for name, value in result.grads.items()}
    for task in range(3):
        weights = {name: value[task].clone().requires_grad_() for name, value in fitted.items()}
        logits = torch.func.functional_call(module, weights, (episode.query.inputs[task],))
        grads = torch.autograd.grad(F.cross_entropy(logits, episode.query.targets[task]), list(weights.values()))
        for name, grad in zip(weights, grads, strict=True):
            expected[name] += grad / 3
    assert_same(result.grads, expected)


def test_a_head_of_ones_own_is_a_few_lines() -> None:
    class Cosine(ClosedFormHead):
        def __init__(self, backbone: nn.Module, way: int) -> None:
            super().__init__(backbone, way=way, own_hparams={"scale": torch.tensor(5.0, dtype=F64)})

        def solve(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
            members = F.one_hot(targets, self.way).to(support)
            return {"mean": F.normalize(members.T @ support, dim=-1)}

        def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
            return hparams["scale"] * F.normalize(features, dim=-1) @ head["mean"].T

    source = Cosine(network(None), WAY).on(Blobs())
    check = ht.check_hypergradient(source.at(0), source.init_hparams(), backends.Reverse(), step_size=1e-4)
    assert check.passed, str(check)


def test_a_network_learner_of_ones_own_is_a_few_lines() -> None:
    class Penalised(ht.InnerProblem):
        def __init__(self, support: ht.InnerProblem) -> None:
            self.support = support

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return self.support.init_params(hparams)

        def batch(self, step: int) -> Batch:
            return self.support.batch(step)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
            loss, buffers = self.support.loss(params, hparams, batch)
            return loss + 0.1 * sum(value.square().sum() for value in params.values()), buffers

    class Regularised(NetworkLearner):
        def problem(self, episode: Episode, num_tasks: int | None) -> ht.BilevelProblem:
            inner = Penalised(self.support_problem(episode))
            return self.bilevel(inner, self.query_problem(episode), num_tasks)

    learner = Regularised(network(), dynamics=SGD(lr=0.1), num_steps=2, learn_lr="one")
    source = learner.on(Blobs())
    check = ht.check_hypergradient(source.at(0), source.init_hparams(), backends.Reverse(), step_size=1e-4)
    assert check.passed, str(check)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IMAML(network(), dynamics=SGD(lr=0.1), num_steps=1, proximity=0.0), "`proximity` is 0.0.*forgets"),
        (lambda: R2D2(network(None), ridge=-1.0), "`ridge` is -1.0: its logarithm is learnt"),
        (lambda: ProtoNet(network(None), way=0), "`way` is 0: the head needs"),
    ],
)
def test_wrong_settings_are_explained(make: Callable[[], Learner], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scores_are_centred_by_normalising() -> None:
    """ANIL with normalised features does not see a common shift of all features."""

    class Shifted(nn.Module):
        num_features = 16

        def __init__(self, shift: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=F64))
            self.shift = shift

        def forward(self, inputs: Tensor) -> Tensor:
            return self.scale * inputs.flatten(1) + self.shift

    support = Examples(normal(6, 1, 4, 4, seed=1), torch.arange(6) % WAY)
    logits = []
    for shift in (0.0, 3.0):
        torch.manual_seed(0)
        learner = ANIL(Shifted(shift), way=WAY, dynamics=SGD(lr=0.3), num_steps=2, normalise=True)
        logits.append(learner.adapt(learner.init_hparams(), support)(support.inputs))
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["MAML", "HyperRepresentation"])
def test_an_update_rule_is_learnt_with_the_learner(name: str) -> None:
    torch.manual_seed(0)
    rule = ht.dynamics.LearnedUpdate(ht.dynamics.CoordinatewiseLSTM(hidden=2).double())
    if name == "MAML":
        learner: Learner = MAML(network(), dynamics=rule, num_steps=2)
    else:
        learner = HyperRepresentation(network(None), way=WAY, dynamics=rule, num_steps=2)
    source = learner.on(Blobs())
    hparams = source.init_hparams()
    assert any(key.startswith("update_rule.") for key in hparams)
    check = ht.check_hypergradient(source.at(0), hparams, backends.Reverse(), num_directions=1, step_size=1e-5)
    assert check.passed, str(check)


def test_a_head_learner_normalises_as_its_class_says_unless_it_is_told() -> None:
    support = Examples(normal(6, 1, 4, 4, seed=1), torch.arange(6) % WAY)

    def logits(normalise: bool | None) -> Tensor:
        learner = HyperRepresentation(network(None), way=WAY, dynamics=SGD(lr=0.8), num_steps=2, normalise=normalise)
        return learner.adapt(learner.init_hparams(), support)(support.inputs)

    assert torch.equal(logits(None), logits(True))
    assert not torch.allclose(logits(None), logits(False), atol=1e-3)


@pytest.mark.parametrize("name", ["head.weight", "log_lr"])
def test_own_outer_variables_of_a_head_learner_cannot_be_called_as_the_learners(name: str) -> None:
    own = {name: torch.ones((), dtype=F64)}
    with pytest.raises(ValueError, match=rf"`own_hparams` has entries called \['{name}'\].*Call yours otherwise"):
        ANIL(network(None), way=WAY, dynamics=SGD(lr=0.2), num_steps=1, learn_lr="one", own_hparams=own)
    assert name in ANIL(network(None), way=WAY, dynamics=SGD(lr=0.2), num_steps=1, learn_lr="one").init_hparams()
