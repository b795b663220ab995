"""How everything public that takes arguments is called rightly: the attacks change one argument of each."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hypertorch as ht
from hypertorch import dynamics, fewshot, hypergradients, linear_solvers, search
from hypertorch.dynamics import schedules
from tests.helpers.problems import Ridge
from tests.search import problems as searched

RIDGE = Ridge().problem(4)
HPARAMS = RIDGE.init_hparams()
SEARCHED = searched.problem()
SGD = dynamics.SGD(lr=0.1)
MLP = fewshot.MLP(in_features=3, hidden=(4,), out_features=2)
FEATURES = fewshot.MLP(in_features=3, hidden=(4,), out_features=None, feature_length=2)
CLASSES = fewshot.TensorClasses.of({name: torch.rand(4, 3) for name in "abcd"})
ADAM = functools.partial(torch.optim.Adam, lr=0.1)
HEAD = {"backbone": FEATURES, "way": 2, "dynamics": SGD, "num_steps": 1}
NETWORK = {"network": MLP, "dynamics": SGD, "num_steps": 1}
UNUSED = Path(tempfile.gettempdir()) / "unused"


class Net(nn.Module):
    """A module of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


# The arguments that have no default, or whose default leaves out what could be wrong.
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    ht.BilevelProblem: {"inner": RIDGE.inner, "outer": RIDGE.outer, "dynamics": SGD, "num_steps": 4},
    ht.BoundedSum: {"total": 0.5},
    ht.Box: {},
    ht.Checkpoints: {"directory": UNUSED},
    ht.Execution: {},
    ht.FunctionalModule: {"module": Net()},
    ht.Hyper: {"name": "lr"},
    ht.JsonLinesLogger: {"path": UNUSED / "m.jsonl"},
    ht.Minibatches: {"dataset": range(5), "batch_size": 2},
    ht.OuterLoop: {"source": RIDGE, "optimizer": ADAM, "backend": hypergradients.Reverse()},
    ht.Positive: {},
    ht.Problems: {"make": lambda step: RIDGE},
    ht.Ranks: {"rank": 0, "size": 2},
    ht.RealTime: {"problem": RIDGE, "optimizer": ADAM, "every": 2},
    ht.Simplex: {},
    ht.Snapshots: {"every": 1},
    ht.TensorBoardLogger: {"directory": UNUSED},
    ht.Validation: {"source": RIDGE, "every": 1, "num_episodes": 1},
    ht.check_hypergradient: {"problem": RIDGE, "hparams": HPARAMS, "backend": hypergradients.Reverse()},
    ht.compare_backends: {
        "problem": RIDGE,
        "hparams": HPARAMS,
        "backends": {"a": hypergradients.Reverse()},
        "repeats": 1,
    },
    ht.evaluate: {"source": RIDGE, "hparams": HPARAMS, "num_episodes": 1},
    ht.horizon_bias: {"problem": RIDGE, "hparams": HPARAMS, "windows": (1, 2)},
    ht.hypergradient: {"problem": RIDGE, "hparams": HPARAMS, "backend": hypergradients.Reverse()},
    ht.load_hparams: {"path": UNUSED},
    ht.metasmoothness: {"problem": RIDGE, "hparams": HPARAMS, "step_size": 1e-3},
    ht.save_hparams: {"path": UNUSED / "h.safetensors", "hparams": HPARAMS},
    ht.spectral_radius: {"problem": RIDGE, "hparams": HPARAMS, "dimension": 4, "max_restarts": 0},
    ht.unroll: {"problem": RIDGE, "hparams": HPARAMS},
    dynamics.Adagrad: {},
    dynamics.Adam: {},
    dynamics.AdamW: {},
    dynamics.Clipped: {"rule": SGD, "max_norm": 1.0},
    dynamics.CoordinatewiseLSTM: {},
    dynamics.CoordinatewiseMLP: {},
    dynamics.Groups: {"members": {"*": SGD}},
    dynamics.LearnedBuffers: {"rule": dynamics.SGD(lr=0.1, momentum=0.9)},
    dynamics.LearnedUpdate: {"rule": dynamics.CoordinatewiseMLP()},
    dynamics.Lion: {},
    dynamics.Muon: {},
    dynamics.NAdam: {},
    dynamics.RAdam: {},
    dynamics.RMSprop: {},
    dynamics.ReversibleMomentum: {"lr": 0.1},
    dynamics.SGD: {"lr": 0.1},
    dynamics.TorchOptim: {"optimizer": ADAM},
    schedules.cosine: {"num_steps": 4, "start": 0.1},
    schedules.cyclical: {"num_steps": 4, "start": 0.1, "peak": 0.2, "steps_up": 2},
    schedules.one_cycle: {"num_steps": 10, "peak": 0.2},
    hypergradients.EvoGrad: {},
    hypergradients.EvolutionStrategies: {"num_pairs": 1, "sigma": 0.1},
    hypergradients.Forward: {},
    hypergradients.ForwardGradient: {},
    hypergradients.Implicit: {},
    hypergradients.OneStep: {},
    hypergradients.Reverse: {},
    hypergradients.Reversible: {},
    hypergradients.Truncated: {"window": 1},
    hypergradients.measured_execution: {"problem": RIDGE, "hparams": HPARAMS, "backend": hypergradients.Reverse()},
    hypergradients.plan_memory: {"problem": RIDGE, "hparams": HPARAMS, "budget": "1 GiB"},
    linear_solvers.ConjugateGradient: {},
    linear_solvers.Dense: {},
    linear_solvers.FixedPoint: {},
    linear_solvers.Neumann: {},
    linear_solvers.Nystrom: {},
    fewshot.ANIL: HEAD,
    fewshot.Augmentation: {},
    fewshot.BatchNorm: {"features": 2},
    fewshot.Classification: {},
    fewshot.Conv4: {"way": 2, "hidden": 2},
    fewshot.Embedding: {"before": nn.Identity(), "after": nn.Identity()},
    fewshot.Episode: {
        "support": fewshot.Examples(torch.zeros(1, 2, 3), torch.zeros(1, 2)),
        "query": fewshot.Examples(torch.zeros(1, 2, 3), torch.zeros(1, 2)),
    },
    fewshot.EpisodeSampler: {"dataset": CLASSES, "way": 2, "shot": 1, "num_queries": 1, "num_tasks": 1},
    fewshot.Examples: {"inputs": torch.zeros(1, 2, 3), "targets": torch.zeros(1, 2)},
    fewshot.FeatureNorm: {"features": 2, "length": 1.0},
    fewshot.HyperRepresentation: HEAD,
    fewshot.IMAML: NETWORK,
    fewshot.ImageClasses: {
        "images": torch.zeros(2, 1, 3, 3, dtype=torch.uint8),
        "counts": (1, 1),
        "class_names": ("a", "b"),
    },
    fewshot.MAML: NETWORK,
    fewshot.MLP: {},
    fewshot.MetaSGD: {"network": MLP, "dynamics": SGD},
    fewshot.Normalisation: {"mean": (0.0,), "std": (1.0,)},
    fewshot.ProtoNet: {"backbone": FEATURES, "way": 2},
    fewshot.R2D2: {"backbone": FEATURES, "way": 2},
    fewshot.Reptile: NETWORK,
    fewshot.ResNet12: {"way": 2, "channels": (1, 1, 1, 1)},
    fewshot.Sinusoid: {},
    fewshot.StrokeCharacters: {"split": "meta_val", "num_classes": 1, "drawings": 1, "image_size": 8},
    fewshot.TaskSpec: {"item_shape": (3,), "outputs": 2, "is_classification": True},
    fewshot.TensorClasses: {"items": torch.rand(2, 3), "counts": (1, 1), "class_names": ("a", "b")},
    search.DatasetDistance: {"network": search.DeepSet(2)},
    search.DeepSet: {"num_inputs": 2},
    search.GradientBayes: {"bounds": [(0.1, 1.0)]},
    search.GradientSampler: {},
    search.greedy_portfolio: {"losses": torch.rand(3, 4, dtype=torch.float64), "count": 2},
    search.hyperband: {"min_steps": 1, "max_steps": 9, "eta": 3},
    search.is_worse: {"values": [1.0, 2.0], "best": [1.0, 1.0], "maximise": False},
    search.loss_distances: {
        "losses": torch.rand(3, 4, dtype=torch.float64),
        "others": torch.rand(2, 4, dtype=torch.float64),
    },
    search.lr_range_test: {"problem": RIDGE, "num_steps": 40},
    search.minimise: {
        "problem": SEARCHED,
        "bounds": {"l2": (0.1, 1.0), "shift": (0.0, 1.0)},
        "backend": hypergradients.Reverse(),
        "num_evaluations": 1,
    },
    search.nearest_best: {"distances": torch.rand(3), "losses": torch.rand(3, 4, dtype=torch.float64), "count": 2},
    search.pad_sets: {"sets": [torch.rand(2, 3)]},
    search.regrets: {"losses": torch.rand(4, dtype=torch.float64), "order": [0, 1]},
    search.successive_halving: {"num_trials": 9, "min_steps": 1, "max_steps": 9, "eta": 3},
    search.widen: {
        "params": {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(2), "b.weight": torch.rand(1, 2)},
        "layer": "a",
        "num_units": 3,
        "following": "b",
    },
    search.with_lr: {"dynamics": SGD, "lr": 0.2},
}
