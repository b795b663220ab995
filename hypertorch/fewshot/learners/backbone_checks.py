"""What a network must be for a learner, and the two copies of it that a learner works with."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot.learners.module_copy import copy_module
from hypertorch.nn.functional_module import FunctionalModule

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def fit_and_predict(network: nn.Module) -> tuple[FunctionalModule, FunctionalModule]:
    """Returns a copy of a network that fits, in training mode, and one that predicts, in evaluation mode.

    A norm layer with running statistics, or a spectral norm, that is handed over in evaluation mode stays in it in both
    copies. What it has stored are constants, like a parameter that is frozen.

    Raises:
        IncompatibleBackendError: if such a layer is in training mode: PyTorch updates what it stores outside of the
            graph, so that the path through it would be dropped silently.
    """
    # The old and the new spectral norm, batch norm and instance norm: all write their buffers in place, without a
    # graph.
    frozen = [name for name, part in network.named_modules() if _stores_without_derivative(part)]
    for name in frozen:
        part = network.get_submodule(name)
        if part.training:
            raise IncompatibleBackendError(
                f"`{name or 'module'}` is a {type(part).__name__} in training mode, whose statistics PyTorch updates "
                "without a derivative: the hypergradient through them would silently be missing. To keep what it has "
                "stored (of a pretrained network, say), call `.eval()` on it, or on the whole network, before you hand "
                "it over. For statistics of the episode use `hypertorch.fewshot.BatchNorm(features, "
                "statistics='running')`, which keeps the derivative, or `track_running_stats=False`."
            )
    # One copy for each mode: the mode is state of a module, and must not be switched while a step runs. The user's own
    # module stays as it is.
    fit, predict = copy_module(network).train(), copy_module(network).eval()
    for own in (fit, predict):
        for name in frozen:
            _freeze(own.get_submodule(name))
    return FunctionalModule(fit), FunctionalModule(predict)


def _stores_without_derivative(part: nn.Module) -> bool:
    """Returns whether a layer in training mode updates its buffers outside of the graph."""
    return (
        isinstance(part, _SpectralNorm)
        or bool(getattr(part, "track_running_stats", False))
        or any(isinstance(hook, SpectralNorm) for hook in part._forward_pre_hooks.values())
    )


def _freeze(part: nn.Module) -> None:
    """Keeps a layer in evaluation mode, and makes constants of its buffers."""
    part.training = False
    # Buffers would be carried through the inner loop as state; these are constants, like frozen parameters. A name has
    # to be free before it is registered anew, hence the deletion.
    for name, value in list(part._buffers.items()):
        if value is not None:
            del part._buffers[name]
            part.register_parameter(name, nn.Parameter(value, requires_grad=False))


def first_parameter(backbone: nn.Module) -> nn.Parameter:
    """Returns a parameter, whose dtype and device are those of what is built for the backbone.

    Raises:
        ValueError: if there is none.
    """
    for parameter in backbone.parameters():
        return parameter
    raise ValueError(
        f"`backbone` is a {type(backbone).__name__} without parameters: the representation is what the outer loop "
        "learns, and there is nothing to learn. Add a layer that has some."
    )


def feature_count(backbone: nn.Module) -> int:
    """Returns how many features a backbone says it has.

    Raises:
        ValueError: if it does not say.
    """
    # Read, not tried: a trial needs inputs, and their shape is not known yet.
    count = getattr(backbone, "num_features", None)
    if isinstance(count, int):
        return count
    raise ValueError(
        f"`backbone` is a {type(backbone).__name__} whose `num_features` is {count!r}: the first head is an outer "
        "variable, so its size must be known before any image is seen. Set it to the number of features per image: "
        "`backbone.num_features = 64`."
    )


def refuse_dropout(backbone: nn.Module) -> None:
    """Raises `ValueError` if a backbone drops features at random.

    Support and query pass through a representation together, where nothing tells training from judging: dropout would
    stay on when a trained learner predicts.
    """
    random = [
        name or type(module).__name__
        for name, module in backbone.named_modules()
        if (isinstance(module, _DROPOUTS) and module.p > 0.0)
        # These two drop out by a number of their own, not by a layer.
        or (isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0.0)
    ]
    if random:
        raise ValueError(
            f"`backbone` has dropout in {random}: support and query pass through the representation together, so it "
            "would stay on when the trained learner predicts. Set its probability to 0, and regularise by "
            "augmentation or weight decay of the outer optimizer instead. MAML, which adapts all weights, can have it."
        )
