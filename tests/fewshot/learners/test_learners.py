"""Learners: their hypergradients, what they adapt to, and that a new one is a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot.backbones import MLP, Conv4
from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples
from hypertorch.fewshot.learners import MAML, HyperRepresentation, Learner, Regression
from hypertorch.types import TensorDict
from tests.helpers.problems import normal

Reverse = ht.hypergradients.Reverse
SGD = ht.dynamics.SGD


@dataclass(frozen=True)
class Blobs(EpisodeSource):
    """Classes that are noisy copies of a random image, in float64."""

    num_tasks: int = 3
    way: int = 3
    shot: int = 2
    num_queries: int = 4
    item: tuple[int, ...] = (1, 4, 4)
    noise: float = 0.3

    def at(self, step: int) -> Episode:
        centres = normal(self.num_tasks, self.way, 1, *self.item, seed=100 + step)
        count = self.shot + self.num_queries
        images = centres + self.noise * normal(self.num_tasks, self.way, count, *self.item, seed=200 + step)
        labels = torch.arange(self.way).repeat_interleave(count).reshape(self.way, count)

        def examples(chosen: slice) -> Examples:
            picked = images[:, :, chosen].flatten(1, 2)
            return Examples(picked, labels[:, chosen].flatten().expand(self.num_tasks, -1))

        return Episode(examples(slice(None, self.shot)), examples(slice(self.shot, None)))


def small_conv(way: int | None, statistics: str) -> nn.Module:
    torch.manual_seed(0)
    return Conv4(way=way, hidden=3, downsample="stride", image_size=4, statistics=statistics).double()  # type: ignore[arg-type]


def with_smooth_activations(module: nn.Module) -> nn.Module:
    """Replaces ReLU by a smooth function: central differences across a kink are wrong."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus())
        else:
            with_smooth_activations(child)
    return module


def learner(kind: str, statistics: str = "episode", learn_lr: str | None = "step") -> Learner:
    if kind == "maml":
        network = with_smooth_activations(small_conv(3, statistics))
        return MAML(network, dynamics=SGD(lr=0.2), num_steps=3, learn_lr=learn_lr)  # type: ignore[arg-type]
    backbone = with_smooth_activations(small_conv(None, statistics))
    return HyperRepresentation(backbone, way=3, dynamics=SGD(lr=0.8), num_steps=3, learn_lr=learn_lr)  # type: ignore[arg-type]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
@pytest.mark.parametrize("statistics", ["episode", "running"])
@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_hypergradients_equal_central_differences(kind: str, statistics: str, route: str) -> None:
    source = learner(kind, statistics).on(Blobs())
    check = ht.check_hypergradient(
        source.at(0),
        source.init_hparams(),
        Reverse(),
        num_directions=1,
        step_size=1e-5,
        execution=ht.Execution(tasks=route),  # type: ignore[arg-type]
    )
    assert check.passed, str(check)


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_checkpoints_and_routes_agree(kind: str, statistics: str) -> None:
    source = learner(kind, statistics).on(Blobs())
    hparams = source.init_hparams()
    reference = ht.hypergradient(source.at(1), hparams, backend=Reverse(), execution=ht.Execution(tasks="vmap")).grads
    for route in ("vmap", "loop"):
        execution = ht.Execution(tasks=route)
        backend = Reverse(checkpoint_every=1)
        grads = ht.hypergradient(source.at(1), hparams, backend=backend, execution=execution).grads
        for name in hparams:
            torch.testing.assert_close(grads[name], reference[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("learn_lr", ["one", "step", "parameter", "step,parameter"])
def test_maml_learns_step_sizes_of_every_kind(learn_lr: str) -> None:
    source = learner("maml", learn_lr=learn_lr).on(Blobs())
    hparams = source.init_hparams()
    sizes = {name: value for name, value in hparams.items() if name.startswith("log_lr")}
    assert all(torch.allclose(value.exp(), torch.tensor(0.2, dtype=torch.float64)) for value in sizes.values())
    grads = ht.hypergradient(source.at(0), hparams, backend=Reverse()).grads
    assert all(grads[name].abs().max() > 0 for name in sizes)


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
def test_a_learnt_step_size_starts_as_the_given_one(kind: str) -> None:
    plain, learnt = learner(kind, learn_lr=None).on(Blobs()), learner(kind, learn_lr="one").on(Blobs())
    a = ht.hypergradient(plain.at(0), plain.init_hparams(), backend=Reverse())
    b = ht.hypergradient(learnt.at(0), learnt.init_hparams(), backend=Reverse())
    torch.testing.assert_close(a.outer_loss, b.outer_loss, rtol=1e-14, atol=0)


def test_the_representation_is_computed_once_per_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = Conv4.forward
    monkeypatch.setattr(Conv4, "forward", lambda self, images: (calls.append(len(images)), forward(self, images))[1])
    source = learner("hyper_representation").on(Blobs(num_tasks=2))
    problem = source.at(0)
    # The first of a kind of problem is computed twice, to be checked.
    ht.hypergradient(problem, source.init_hparams(), backend=Reverse(), execution=ht.Execution(tasks="loop"))
    calls.clear()
    ht.hypergradient(problem, source.init_hparams(), backend=Reverse(), execution=ht.Execution(tasks="loop"))
    assert calls == [18, 18]  # support and query of each episode together, whatever the number of inner steps


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_adapt_classifies_as_the_episode_does(kind: str, statistics: str) -> None:
    made = learner(kind, statistics)
    hparams = made.init_hparams()
    episode = Blobs(num_tasks=1).at(3)
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in episode)
    logits = made.adapt(hparams, support)(query.inputs)
    assert logits.shape == (12, 3) and not logits.requires_grad
    accuracy = (logits.argmax(-1) == query.targets).double().mean()
    torch.testing.assert_close(ht.unroll(made.problem(episode, 1), hparams).metrics["accuracy"][0], accuracy)


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
def test_running_statistics_make_a_query_independent_of_its_companions(kind: str) -> None:
    made = learner(kind, "running")
    episode = Blobs(num_tasks=1).at(3)
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in episode)
    classify = made.adapt(made.init_hparams(), support)
    torch.testing.assert_close(classify(query.inputs)[:2], classify(query.inputs[:2]), rtol=1e-10, atol=1e-12)
    transductive = learner(kind, "episode").adapt(made.init_hparams(), support)
    assert not torch.allclose(transductive(query.inputs)[:2], transductive(query.inputs[:2]))


def test_adapting_improves_on_the_support_set() -> None:
    made = MAML(MLP(in_features=16, hidden=(12,), out_features=3).double(), dynamics=SGD(lr=0.3), num_steps=20)
    result = ht.unroll(made.on(Blobs()).at(0), made.init_hparams())
    assert (result.inner_losses[:, -1] < 0.5 * result.inner_losses[:, 0]).all()
    assert (result.metrics["accuracy"] > 0.9).all()


def test_regression_reports_the_squared_error() -> None:
    made = MAML(MLP().double(), dynamics=SGD(lr=0.01), num_steps=1, objective=Regression())
    x = normal(2, 6, 1, seed=1)
    episode = Episode(Examples(x, x.sin()), Examples(x + 1, (x + 1).sin()))
    result = ht.unroll(made.problem(episode, 2), made.init_hparams())
    torch.testing.assert_close(result.metrics["mse"], result.outer_loss)


def test_the_users_module_is_not_touched() -> None:
    network = small_conv(3, "running")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made = MAML(network, dynamics=SGD(lr=0.2), num_steps=2)
    hparams = made.init_hparams()
    ht.hypergradient(made.on(Blobs()).at(0), hparams, backend=Reverse())
    hparams["classifier.bias"].add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.equal(made.init_hparams()["classifier.bias"], hparams["classifier.bias"])


def test_a_new_learner_is_a_few_lines() -> None:
    class NearestMean(Learner):
        """Classifies by distance to class means of learnt linear features; no inner step."""

        def init_hparams(self) -> TensorDict:
            return {"theta": 0.1 * normal(16, 8, seed=9)}

        def problem(self, episode: Episode, num_tasks: int | None) -> ht.BilevelProblem:
            return ht.BilevelProblem(Means(), Distance(episode), dynamics=SGD(lr=1.0), num_steps=0, num_tasks=num_tasks)

        def adapt(self, hparams: TensorDict, support: Examples) -> Callable[[Tensor], Tensor]:
            return lambda inputs: torch.zeros(len(inputs), 3)

    class Means(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"theta": hparams["theta"]}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: None) -> Tensor:
            raise AssertionError

    class Distance(ht.OuterProblem):
        def __init__(self, episode: Episode) -> None:
            self.episode = episode

        def init_hparams(self) -> TensorDict:
            return {"theta": torch.zeros(16, 8)}

        def batch(self, outer_step: int) -> Episode:
            return self.episode

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Episode) -> Tensor:
            support = batch.support.inputs.flatten(1) @ params["theta"]
            means = support.reshape(3, 2, -1).mean(1)
            query = batch.query.inputs.flatten(1) @ params["theta"]
            return nn.functional.cross_entropy(-(query[:, None] - means).square().sum(-1), batch.query.targets)

    source = NearestMean().on(Blobs())
    check = ht.check_hypergradient(source.at(0), source.init_hparams(), Reverse())
    assert check.passed, str(check)


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
def test_outer_variables_of_another_network_are_refused(kind: str) -> None:
    made = learner(kind)
    hparams = made.init_hparams()
    episode = Blobs(num_tasks=1).at(0)
    support = Examples(episode.support.inputs[0], episode.support.targets[0])
    name = next(iter(hparams))
    with pytest.raises(ValueError, match="`hparams` of .* lacks .*Pass all entries"):
        made.adapt({key: value for key, value in hparams.items() if key != name}, support)(support.inputs)
    with pytest.raises(ValueError, match=r"has shape \(2,\), but the model has .*trained with another network"):
        made.adapt({**hparams, name: torch.zeros(2, dtype=torch.float64)}, support)(support.inputs)


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
def test_episodes_that_do_not_fit_are_refused(kind: str) -> None:
    made = learner(kind)
    with pytest.raises(ValueError, match=r"`images` have shape \(\d+, 2, 4, 4\).*built for \(batch, 1, 4, 4\)"):
        made.on(Blobs(item=(2, 4, 4)))
    more, fewer = {
        "maml": (
            "labels up to 4, but the network has 3 outputs.*`way=5`",
            "`episodes` have 2 classes, but the learner has 3 outputs",
        ),
        "hyper_representation": ("or build the learner with `way=5`", r"no example of the classes \[2\], of 3"),
    }[kind]
    with pytest.raises(ValueError, match=more):
        made.on(Blobs(way=5))
    with pytest.raises(ValueError, match=fewer):
        made.on(Blobs(way=2))
    with pytest.raises(ValueError, match=r"`support` has inputs of shape .*Drop a tasks axis"):
        made.adapt(made.init_hparams(), Examples(torch.zeros(2, 6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)))


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
def test_norms_that_drop_a_derivative_are_refused(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    leaf = MAML if kind == "maml" else HyperRepresentation
    with pytest.raises(IncompatibleBackendError, match="`1` is a BatchNorm2d in training mode.*call `.eval"):
        leaf(network, dynamics=SGD(lr=0.1), num_steps=1)


@pytest.mark.parametrize("kind", ["maml", "hyper_representation"])
def test_recurrent_networks_run_by_themselves(kind: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0][:, -1]

    torch.manual_seed(0)
    network, dynamics = Recurrent().double(), SGD(lr=0.2)
    made = (
        MAML(network, dynamics=dynamics, num_steps=2)
        if kind == "maml"
        else HyperRepresentation(network, way=3, dynamics=dynamics, num_steps=2)
    )
    source = made.on(Blobs(item=(4, 4)))
    check = ht.check_hypergradient(source.at(0), source.init_hparams(), Reverse(), num_directions=1, step_size=1e-4)
    assert check.passed, str(check)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAML(nn.Flatten(), dynamics=SGD(lr=0.1), num_steps=1), "`network` has no trainable parameter"),
        (lambda: learner("maml", learn_lr="layer"), "`learn_lr` is 'layer'.*'one', 'step'"),
        (lambda: learner("hyper_representation", learn_lr="parameter"), "`learn_lr` is 'parameter', but the head"),
        (
            lambda: MAML(MLP(), dynamics=SGD(lr=ht.Hyper("eta")), num_steps=1, learn_lr="one"),
            "learning starts from a positive number",
        ),
        (lambda: HyperRepresentation(MLP(), way=0, dynamics=SGD(lr=0.1), num_steps=1), "`way` is 0"),
    ],
)
def test_wrong_arguments_are_explained(make: Callable[[], Learner], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_features_are_centred_and_scaled_by_the_support_set(statistics: str) -> None:
    made = learner("hyper_representation", statistics)
    support = Blobs(num_tasks=1).at(0).support
    problem = made.problem(Episode(support, support), 1)
    assert problem.context is not None
    context = problem.context(made.init_hparams(), Episode(support, support))
    features = context["support"][0]
    torch.testing.assert_close(features.mean(0), torch.zeros_like(features[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(features.square().sum(1).mean(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(context["query"], context["support"])
