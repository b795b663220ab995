"""A catalogue of small bilevel problems for the tests, the sharper ones with a closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.types import Batch, TensorDict


def normal(*shape: int, seed: int) -> Tensor:
    """Returns standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalars(**values: float) -> TensorDict:
    """Returns the numbers as tensors without axes, in float64."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


class Ridge:
    """Ridge regression: inner loss `|Aw - y|^2 / 2n + lam |w|^2 / 2`, outer loss `|Bw - z|^2 / 2m`.

    In the eigenbasis of `A'A/n` (eigenvalues s, rotation Q) gradient descent from zero with step size `eta` gives
    `w_T = Q diag((1 - (1 - eta (s + lam))^T) / (s + lam)) Q' A'y/n`, so every derivative has a formula.
    """

    def __init__(self, seed: int = 0, features: int = 5) -> None:
        self.a, self.y = normal(20, features, seed=seed), normal(20, seed=seed + 1)
        self.b, self.z = normal(15, features, seed=seed + 2), normal(15, seed=seed + 3)
        self.eigenvalues, self.rotation = torch.linalg.eigh(self.a.T @ self.a / len(self.a))
        self.target = self.rotation.T @ (self.a.T @ self.y) / len(self.a)

    def outer_gradient(self, w: Tensor) -> Tensor:
        return self.b.T @ (self.b @ w - self.z) / len(self.b)

    def params_after(self, num_steps: int, lam: Tensor, eta: Tensor) -> Tensor:
        curvature = self.eigenvalues + lam
        return self.rotation @ ((1 - (1 - eta * curvature) ** num_steps) / curvature * self.target)

    def hypergradient_after(self, num_steps: int, lam: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns df/dlam and df/deta after `num_steps` steps, by the formula."""
        curvature = self.eigenvalues + lam
        decay = 1 - eta * curvature
        in_eta = num_steps * decay ** (num_steps - 1) * self.target
        in_lam = (
            num_steps * eta * decay ** (num_steps - 1) / curvature - (1 - decay**num_steps) / curvature**2
        ) * self.target
        outward = self.rotation.T @ self.outer_gradient(self.params_after(num_steps, lam, eta))
        return outward @ in_lam, outward @ in_eta

    def exact_hypergradient(self, lam: Tensor) -> Tensor:
        """Returns df/dlam at the exact inner solution."""
        curvature = self.eigenvalues + lam
        solution = self.rotation @ (self.target / curvature)
        return -(self.rotation.T @ self.outer_gradient(solution)) @ (self.target / curvature**2)

    def inner_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        return (self.a @ w - self.y).square().sum() / (2 * len(self.a)) + lam * w.square().sum() / 2

    def outer_loss(self, w: Tensor) -> Tensor:
        return (self.b @ w - self.z).square().sum() / (2 * len(self.b))

    def problem(self, num_steps: int, dynamics: ht.Dynamics | None = None) -> ht.BilevelProblem:
        """Returns ridge regression by gradient descent from zero, with outer variables `lam` and `eta`."""
        return ht.BilevelProblem(
            _RidgeInner(self), _RidgeOuter(self), dynamics=dynamics or ht.dynamics.SGD(lr=ht.Hyper("eta")),
            num_steps=num_steps,
        )  # fmt: skip

    def closed_form_problem(self) -> ht.BilevelProblem:
        """Returns ridge regression with its solution in `init_params` and no step."""
        return ht.BilevelProblem(
            _RidgeSolved(self), _RidgeOuter(self), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=0, allow_unused=("eta",)
        )


class _RidgeInner(ht.InnerProblem):
    def __init__(self, ridge: Ridge) -> None:
        self.ridge = ridge

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros_like(self.ridge.target)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self.ridge.inner_loss(params["w"], hparams["lam"])


class _RidgeSolved(_RidgeInner):
    def init_params(self, hparams: TensorDict) -> TensorDict:
        a, y = self.ridge.a, self.ridge.y
        matrix = a.T @ a / len(a) + hparams["lam"] * torch.eye(a.shape[1], dtype=a.dtype)
        return {"w": torch.linalg.solve(matrix, a.T @ y / len(a))}


class _RidgeOuter(ht.OuterProblem):
    def __init__(self, ridge: Ridge) -> None:
        self.ridge = ridge

    def init_hparams(self) -> TensorDict:
        return {"lam": torch.tensor(0.3, dtype=torch.float64), "eta": torch.tensor(0.2, dtype=torch.float64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self.ridge.outer_loss(params["w"])


class NetInner(ht.InnerProblem):
    """A two-layer net with example weights, L2, minibatches and (optionally) dropout, from a learnt initialisation."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.inputs, self.labels = normal(12, 4, seed=10), torch.arange(12) % 3
        self.minibatches = ht.Minibatches(range(12), batch_size=6, seed=3)
        self.dropout = dropout

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {name: hparams[f"init.{name}"] for name in ("first", "second")}

    def batch(self, step: int) -> Tensor:
        return torch.as_tensor(self.minibatches.indices(step))

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        hidden = F.dropout(torch.tanh(self.inputs[batch] @ params["first"]), self.dropout, training=True)
        losses = F.cross_entropy(hidden @ params["second"], self.labels[batch], reduction="none")
        penalty = sum(value.square().sum() for value in params.values())
        return (hparams["weights"][batch].sigmoid() * losses).mean() + hparams["log_l2"].exp() * penalty


class NetOuter(ht.OuterProblem):
    """Cross-entropy of the two-layer net on other data, with a direct term in `log_l2`."""

    def __init__(self, extra: TensorDict | None = None, step_terms: bool = False) -> None:
        self.inputs, self.labels = normal(9, 4, seed=20), torch.arange(9) % 3
        self.extra = extra or {}

    def init_hparams(self) -> TensorDict:
        return {
            "init.first": 0.5 * normal(4, 6, seed=30),
            "init.second": 0.5 * normal(6, 3, seed=31),
            "weights": 0.1 * normal(12, seed=32),
            "log_l2": torch.tensor(-3.0, dtype=torch.float64),
            **self.extra,
        }

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        logits = torch.tanh(self.inputs @ params["first"]) @ params["second"]
        return F.cross_entropy(logits, self.labels) + 0.01 * hparams["log_l2"] ** 2


class NetOuterWithSteps(NetOuter):
    """The same with a term at every inner step."""

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return 0.1 * (index + 1) * (params["first"].square().sum() + hparams["weights"].sum())


def net_problem(
    dynamics: ht.Dynamics, extra: TensorDict, *, num_steps: int = 7, dropout: float = 0.0, step_terms: bool = False
) -> ht.BilevelProblem:
    """Returns the two-layer net trained by `dynamics`, whose learnt settings are given in `extra`."""
    outer = NetOuterWithSteps(extra) if step_terms else NetOuter(extra)
    return ht.BilevelProblem(NetInner(dropout), outer, dynamics=dynamics, num_steps=num_steps)


class TaskNetInner(ht.InnerProblem):
    """A module fitted to each task's own data, from a shared learnt initialisation."""

    def __init__(self, module: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        self.net = ht.FunctionalModule(module)
        self.buffers = self.net.buffers
        self.data = (inputs, labels)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        stored = {name: value.clone() for name, value in self.net.module.named_buffers()}
        return {**{name: hparams[name] for name in self.net.trained_names()}, **stored}

    def batch(self, step: int) -> Batch:
        return self.data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        outputs, buffers = self.net.with_buffers(params, batch[0])
        return F.cross_entropy(outputs, batch[1]), buffers


class TaskNetOuter(ht.OuterProblem):
    """Judges the fitted module on each task's query data."""

    def __init__(self, module: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        self.net = ht.FunctionalModule(module)
        self.data = (inputs, labels)

    def init_hparams(self) -> TensorDict:
        params = self.net.init_params()
        return {**{name: params[name] for name in self.net.trained_names()}, "lr": torch.tensor(0.1).to(self.data[0])}

    def batch(self, outer_step: int) -> Batch:
        return self.data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return F.cross_entropy(self.net(params, batch[0]), batch[1])

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        return {"accuracy": (self.net(params, batch[0]).argmax(-1) == batch[1]).double().mean()}


def task_problem(
    module: nn.Module, *, item: tuple[int, ...], num_tasks: int = 3, num_steps: int = 3, way: int = 3, **options: object
) -> ht.BilevelProblem:
    """Returns MAML on random data: `num_tasks` tasks of `2 way` support and `2 way` query examples."""
    labels = (torch.arange(2 * way) % way).expand(num_tasks, -1)
    support, query = normal(num_tasks, 2 * way, *item, seed=40), normal(num_tasks, 2 * way, *item, seed=41)
    return ht.BilevelProblem(
        TaskNetInner(module, support, labels),
        TaskNetOuter(module, query, labels),
        dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.5),
        num_steps=num_steps,
        num_tasks=num_tasks,
        **options,  # type: ignore[arg-type]
    )


class LambdaInner(ht.InnerProblem):
    """An inner problem made of two functions."""

    def __init__(
        self, init: Callable[[TensorDict], TensorDict], loss: Callable[[TensorDict, TensorDict, Batch], Tensor]
    ) -> None:
        self._init, self._loss = init, loss

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self._init(hparams)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self._loss(params, hparams, batch)


class LambdaOuter(ht.OuterProblem):
    """An outer problem made of first values and a function."""

    def __init__(self, hparams: TensorDict, loss: Callable[[TensorDict, TensorDict, Batch], Tensor]) -> None:
        self._hparams, self._loss = hparams, loss

    def init_hparams(self) -> TensorDict:
        return self._hparams

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self._loss(params, hparams, batch)


def scalar_problem(**changes: object) -> ht.BilevelProblem:
    """Returns: minimise `(w - c)^2` by three steps of gradient descent from 0, judge `w^2 + c`, with any part changed.

    The parts are `init` and `inner` (of a `LambdaInner`), `hparams` and `outer` (of a `LambdaOuter`) and the settings
    of `BilevelProblem`.
    """
    options: dict = {
        "init": lambda h: {"w": torch.zeros((), dtype=torch.float64)},
        "inner": lambda p, h, b: (p["w"] - h["c"]).square(),
        "outer": lambda p, h, b: p["w"].square() + h["c"],
        "hparams": scalars(c=2.0),
        "dynamics": ht.dynamics.SGD(lr=0.1),
        "num_steps": 3,
        **changes,
    }
    inner = LambdaInner(options.pop("init"), options.pop("inner"))
    outer = LambdaOuter(options.pop("hparams"), options.pop("outer"))
    return ht.BilevelProblem(inner, outer, **options)


def one_by_one(problem: ht.BilevelProblem, hparams: TensorDict) -> TensorDict:
    """Returns the mean of the hypergradients of each task as a problem of its own: the plainest thing there is."""
    total = {name: torch.zeros_like(value) for name, value in hparams.items()}
    inner, outer = problem.inner, problem.outer
    assert problem.num_tasks is not None
    for task in range(problem.num_tasks):
        alone = ht.BilevelProblem(
            type(inner)(inner.net.module, *(part[task] for part in inner.data)),  # type: ignore[attr-defined]
            type(outer)(outer.net.module, *(part[task] for part in outer.data)),  # type: ignore[attr-defined]
            dynamics=problem.dynamics,
            num_steps=problem.num_steps,
        )
        grads = ht.hypergradient(alone, hparams, backend=ht.hypergradients.Reverse()).grads
        total = {name: total[name] + grads[name] / problem.num_tasks for name in total}
    return total
