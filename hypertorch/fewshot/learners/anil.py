"""ANIL: only the head is adapted in an episode, from a learnt initialisation."""

from __future__ import annotations

from torch import Tensor, nn

from hypertorch.checks.argument_types import typed
from hypertorch.dynamics import Dynamics
from hypertorch.fewshot._checks import check_way
from hypertorch.fewshot.learners.backbone_checks import feature_count, first_parameter
from hypertorch.fewshot.learners.head_learner import HeadLearner, linear_head
from hypertorch.fewshot.learners.objectives import Objective
from hypertorch.fewshot.learners.step_sizes import LearnLR, learnt_step_size
from hypertorch.types import TensorDict


class ANIL(HeadLearner):
    """A linear head is adapted to the support set from an initialisation that is learnt with the representation.

    Outer variables: the weights of the representation, the head's first weights `head.weight` and `head.bias`, and
    the step size where `learn_lr` says so. MAML whose inner loop is the last layer: almost no inner loop, hence the
    name. It differs from `HyperRepresentation` in that the head does not start from zero, and in that features enter
    the head as they are unless `normalise` is set.

    Cost: per episode, one pass and one vjp of the representation; `num_steps` steps of a linear model.

    Args:
        backbone: from inputs to features, shape `(batch, features)`, with an attribute `num_features`. It is copied.
        way: outputs of the head.
        dynamics: the inner optimiser.
        num_steps: inner steps (unit: steps).
        learn_lr: None, or `per` of the `ht.Hyper` that takes the place of the step size: "one", "step", "parameter" or
            "step,parameter".
        objective: loss and metrics of support and query; classification by default.
        normalise: centre and scale features by the support set.

    Raises:
        ValueError: if `way` is below 1, or `learn_lr` does not fit.
        IncompatibleBackendError: if the backbone has a layer whose hypergradient PyTorch would get wrong.

    References:
        Raghu, Raghu, Bengio and Vinyals (2020), Rapid learning or feature reuse?, section 4.
    """

    @typed("backbone", "way", "dynamics", "num_steps")
    def __init__(
        self,
        backbone: nn.Module,
        *,
        way: int = 5,
        dynamics: Dynamics,
        num_steps: int,
        learn_lr: LearnLR = None,
        objective: Objective | None = None,
        normalise: bool = False,
    ) -> None:
        check_way(way)
        # PyTorch's own first weights, of its global generator like those of the backbone: `torch.manual_seed` before
        # building fixes both.
        layer = nn.Linear(feature_count(backbone), way).to(first_parameter(backbone))
        head = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
        # Of the head alone: nothing else moves in an episode.
        dynamics, step_sizes = learnt_step_size(dynamics, learn_lr, head, num_steps)
        super().__init__(
            backbone,
            way=way,
            dynamics=dynamics,
            num_steps=num_steps,
            objective=objective,
            normalise=normalise,
            own_hparams={**{f"head.{name}": value for name, value in head.items()}, **step_sizes},
        )

    def first_head(self, support: Tensor, targets: Tensor, hparams: TensorDict) -> TensorDict:
        """Returns the learnt first weights, `weight` of shape `(way, features)` and `bias` of shape `(way,)`."""
        return {"weight": hparams["head.weight"], "bias": hparams["head.bias"]}

    def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
        """Returns the head's linear outputs, shape `(batch, way)`."""
        return linear_head(head, features)
