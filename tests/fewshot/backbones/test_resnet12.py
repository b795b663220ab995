"""ResNet-12: its shapes and sizes, its blocks by hand, its rules of batch norm and its hypergradient."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.fewshot import ANIL, MAML, EpisodeSource, Examples, Learner, ProtoNet, ResNet12
from hypertorch.fewshot.backbones import BatchNorm
from tests.fewshot.learners.test_learners import Blobs
from tests.helpers.problems import normal

F64 = torch.float64
Rule = Literal["episode", "running"]
TINY = (2, 2, 2, 2)
WAY = 2


def tiny(way: int | None = None, statistics: Rule = "episode", in_channels: int = 1) -> ResNet12:
    """A network with scales and shifts away from 1 and 0, where a forgotten one would hide."""
    torch.manual_seed(0)
    network = ResNet12(way=way, channels=TINY, in_channels=in_channels, statistics=statistics).double()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, BatchNorm):
                module.weight.add_(0.3 * torch.randn(2, dtype=F64))
                module.bias.add_(0.3 * torch.randn(2, dtype=F64))
    return network


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (84, 84), (17, 40)])
def test_features_and_logits(height: int, width: int) -> None:
    images = torch.rand(3, 3, height, width)
    features = ResNet12(channels=(2, 3, 4, 5))
    assert features.num_features == 5
    assert features(images).shape == (3, 5)
    assert ResNet12(channels=(2, 3, 4, 5), way=7)(images).shape == (3, 7)


@pytest.mark.parametrize(
    ("channels", "in_channels", "way", "count"),
    [
        # Written out once: convolutions without bias, and scale and shift of the four norms of each block.
        (
            (64, 128, 256, 512),
            3,
            None,
            (9 * (3 * 64 + 2 * 64 * 64) + 3 * 64 + 8 * 64)
            + (9 * (64 * 128 + 2 * 128 * 128) + 64 * 128 + 8 * 128)
            + (9 * (128 * 256 + 2 * 256 * 256) + 128 * 256 + 8 * 256)
            + (9 * (256 * 512 + 2 * 512 * 512) + 256 * 512 + 8 * 512),
        ),
        ((64, 128, 256, 512), 3, None, 7_996_800),
        ((64, 160, 320, 640), 3, None, 12_424_320),
        ((64, 160, 320, 640), 3, 5, 12_424_320 + 5 * 640 + 5),
        ((64, 128, 256, 512), 1, 20, 7_996_800 - 10 * 2 * 64 + 20 * 512 + 20),
    ],
)
def test_the_usual_networks_have_the_number_of_weights_counted_by_hand(
    channels: tuple[int, ...], in_channels: int, way: int | None, count: int
) -> None:
    with torch.device("meta"):
        network = ResNet12(channels=channels, in_channels=in_channels, way=way)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.kernel_size == (3, 3) for module in convolutions) == 12  # hence the name
    assert sum(module.kernel_size == (1, 1) for module in convolutions) == 4
    assert all(module.bias is None for module in convolutions)


def by_hand(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The features by the formula in the docstring, with PyTorch's functions alone."""

    def norm(values: Tensor, name: str) -> Tensor:
        return F.batch_norm(values, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True)

    for number in range(4):
        block = f"blocks.{number}"
        values = images
        for position, last in ((0, False), (3, False), (6, True)):
            values = F.conv2d(values, weights[f"{block}.residual.{position}.weight"], padding=1)
            values = norm(values, f"{block}.residual.{position + 1}")
            values = values if last else F.leaky_relu(values, 0.1)
        skip = norm(F.conv2d(images, weights[f"{block}.skip.0.weight"]), f"{block}.skip.1")
        images = F.max_pool2d(F.leaky_relu(values + skip, 0.1), 2)
    return images.mean((2, 3))


def test_the_network_is_its_formula() -> None:
    network, images = tiny(), normal(5, 1, 18, 18, seed=1)
    weights = dict(network.named_parameters())
    torch.testing.assert_close(network(images), by_hand(weights, images), rtol=1e-10, atol=1e-12)


def with_torch_norms(network: nn.Module, statistics: Rule) -> nn.Module:
    """Replaces our norms by PyTorch's, with the same scales, shifts and rule."""
    for name, child in network.named_children():
        if isinstance(child, BatchNorm):
            theirs = nn.BatchNorm2d(2, momentum=child.momentum, track_running_stats=statistics == "running").double()
            theirs.load_state_dict({"weight": child.weight, "bias": child.bias}, strict=False)
            setattr(network, name, theirs)
        else:
            with_torch_norms(child, statistics)
    return network


@pytest.mark.parametrize("training", [True, False])
def test_episode_statistics_equal_pytorch_s_norm_without_tracking(training: bool) -> None:
    images = normal(6, 1, 16, 16, seed=2)
    ours, theirs = tiny().train(training), with_torch_norms(tiny(), "episode").train(training)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-12)
    assert not list(ours.buffers())
    assert not torch.allclose(ours(images)[:2], ours(images[:2]))  # images normalise each other: transductive


def test_running_statistics_equal_pytorch_s_norm() -> None:
    """In training mode as PyTorch's; in evaluation mode by stored statistics, whose variance is not corrected."""
    support, query = 2.0 * normal(6, 1, 16, 16, seed=3) + 1.0, normal(3, 1, 16, 16, seed=4)
    ours, theirs = tiny(statistics="running"), with_torch_norms(tiny(statistics="running"), "running")
    with torch.no_grad():
        torch.testing.assert_close(ours(support), theirs(support), rtol=1e-10, atol=1e-12)
        means = {name: value for name, value in ours.named_buffers() if name.endswith("mean")}
        stored = dict(theirs.named_buffers())
        assert len(means) == 16
        for name, value in means.items():
            torch.testing.assert_close(value, stored[name], rtol=1e-10, atol=1e-12)
        # PyTorch stores n / (n - 1) times the variance that it normalises by; then both are the same function.
        size = 16
        for number in range(4):
            count = 6 * size * size
            for name, value in theirs.named_buffers():
                if name.startswith(f"blocks.{number}.") and name.endswith("var"):
                    value.mul_((count - 1) / count)
            size //= 2
        ours.eval(), theirs.eval()
        together = ours(query)
        torch.testing.assert_close(together, theirs(query), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(together[:1], ours(query[:1]), rtol=1e-10, atol=1e-12)  # inductive


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"channels": (64, 128, 256)},
            r"`channels`, `in_channels` and `way` are \(64, 128, 256\), 3 and None: a ResNe",
        ),
        ({"channels": (64, 0, 256, 512)}, r"are \(64, 0, 256, 512\), .*at least one channel\. Use for instance"),
        ({"in_channels": 0}, r"are \(64, 128, 256, 512\), 0 and None"),
        ({"way": 0}, r"are \(64, 128, 256, 512\), 3 and 0"),
        ({"statistics": "batch"}, "`statistics` is 'batch', which names no rule for batch norm. Use 'episode'"),
    ],
)
def test_impossible_networks_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet12(**settings)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 15, 16), (2, 3, 16, 15), (3, 16, 16)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    network = ResNet12(channels=TINY)
    with pytest.raises(
        ValueError, match=r"`images` have shape \(.*built for \(batch, 3, height, width\) of at least 16"
    ):
        network(torch.zeros(shape))


LEARNERS: dict[str, type[Learner]] = {"MAML": MAML, "ANIL": ANIL, "ProtoNet": ProtoNet}


def learner(name: str, statistics: Rule) -> Learner:
    if name == "ProtoNet":
        return ProtoNet(tiny(None, statistics), way=WAY)
    dynamics = ht.dynamics.SGD(lr=0.1)
    if name == "ANIL":
        return ANIL(tiny(None, statistics), way=WAY, dynamics=dynamics, num_steps=2)
    return MAML(tiny(WAY, statistics), dynamics=dynamics, num_steps=2)


def episodes(num_tasks: int) -> EpisodeSource:
    return Blobs(num_tasks=num_tasks, way=WAY, shot=2, num_queries=2, item=(1, 16, 16))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("statistics", ["episode", "running"])
@pytest.mark.parametrize("name", LEARNERS)
def test_hypergradients_equal_central_differences(name: str, statistics: Rule) -> None:
    """The network is smooth at a random point, within the step."""
    source = learner(name, statistics).on(episodes(num_tasks=1))
    problem, hparams = source.at(0), source.init_hparams()
    grads = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse()).grads
    step_size = 1e-8  # at 1e-6 some of the thousands of activations cross their kink
    for seed in range(3):
        direction = {name: normal(*value.shape, seed=seed) for name, value in hparams.items()}
        after, before = (
            ht.unroll(problem, {name: value + step * direction[name] for name, value in hparams.items()}).outer_loss
            for step in (step_size, -step_size)
        )
        slope = sum((grads[name] * value).sum() for name, value in direction.items())
        torch.testing.assert_close((after - before).squeeze() / (2.0 * step_size), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_tasks_together_equal_tasks_one_by_one(statistics: Rule) -> None:
    source = learner("MAML", statistics).on(episodes(num_tasks=2))
    hparams = source.init_hparams()
    grads = [
        ht.hypergradient(
            source.at(0), hparams, backend=ht.hypergradients.Reverse(), execution=ht.Execution(tasks=route)
        ).grads
        for route in ("vmap", "loop")
    ]
    for name, value in grads[1].items():
        torch.testing.assert_close(grads[0][name], value, rtol=1e-10, atol=1e-12)


def test_adapting_answers_with_one_logit_per_class() -> None:
    made = learner("MAML", "running")
    support = Examples(normal(4, 1, 16, 16, seed=5), torch.tensor([0, 0, 1, 1]))
    assert made.adapt(made.init_hparams(), support)(normal(3, 1, 16, 16, seed=6)).shape == (3, WAY)
