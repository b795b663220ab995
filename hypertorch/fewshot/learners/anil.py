"""ANIL: only the head is adapted in an episode, from a learnt initialisation."""

from __future__ import annotations

from torch import Tensor, nn

from hypertorch.fewshot.learners.backbone_checks import feature_count, first_parameter
from hypertorch.fewshot.learners.head_learner import HeadLearner, linear_head
from hypertorch.types import TensorDict


class ANIL(HeadLearner):
    """A linear head is adapted to the support set from an initialisation that is learnt with the representation.

    Outer variables: the weights of the representation, the head's first weights `head.weight` and `head.bias`, and
    the step size where `learn_lr` says so. MAML whose inner loop is the last layer: almost no inner loop, hence the
    name. It differs from `HyperRepresentation` in that the head does not start from zero, and in that features enter
    the head as they are unless `normalise` is set.

    Cost: per episode, one pass and one vjp of the representation; `num_steps` steps of a linear model.

    Arguments are those of `HeadLearner`; the backbone needs an attribute `num_features`.

    References:
        Raghu, Raghu, Bengio and Vinyals (2020), Rapid learning or feature reuse?, section 4.
    """

    def learnt_head(self, backbone: nn.Module, way: int) -> TensorDict:
        """Returns a linear layer's first weights, `weight` of shape `(way, features)` and `bias` of shape `(way,)`."""
        # PyTorch's own, of its global generator like those of the backbone: `torch.manual_seed` before building fixes
        # both.
        layer = nn.Linear(feature_count(backbone), way).to(first_parameter(backbone))
        return {"weight": layer.weight.detach(), "bias": layer.bias.detach()}

    def first_head(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns the learnt first weights, `weight` of shape `(way, features)` and `bias` of shape `(way,)`."""
        return {"weight": hparams["head.weight"], "bias": hparams["head.bias"]}

    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns the head's linear outputs, shape `(batch, way)`."""
        return linear_head(head, features)
