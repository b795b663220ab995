"""A few-shot learner of one's own: classification by cosine to the class mean."""

import torch
from torch.nn import functional as F

from hypertorch.fewshot import ClosedFormHead


class CosineMeans(ClosedFormHead):
    """The head is the direction of each class mean, at a temperature that is learnt with the features."""

    def __init__(self, backbone, *, way=5):
        # An outer variable beside the weights of the backbone, in their dtype.
        log_scale = torch.tensor(2.0).to(next(backbone.parameters()).detach())
        super().__init__(backbone, way=way, own_hparams={"log_scale": log_scale})

    def solve(self, support, targets, hparams):
        members = F.one_hot(targets, self.way).to(support)
        return {"mean": F.normalize(members.T @ support, dim=-1)}

    def outputs(self, head, features, hparams):
        return hparams["log_scale"].exp() * F.normalize(features, dim=-1) @ head["mean"].T
