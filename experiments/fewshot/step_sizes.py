"""The picture of learnt inner step sizes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

_LOG_LR = "log_lr"


def plot_step_sizes(hparams: dict[str, Tensor], path: Path) -> bool:
    """Draws learnt inner step sizes and returns whether there were any.

    Args:
        hparams: trained outer variables; those called `log_lr` or `log_lr.<parameter>` are logarithms of step sizes.
        path: the picture.
    """
    sizes = {
        name.removeprefix(_LOG_LR).removeprefix(".") or "all weights": value.detach().exp().cpu().double().numpy()
        for name, value in hparams.items()
        if name == _LOG_LR or name.startswith(f"{_LOG_LR}.")
    }
    if not sizes:
        return False
    figure = Figure(figsize=(6, max(2.0, 1.2 + 0.3 * len(sizes))), layout="constrained")
    axes = figure.subplots()
    schedule = sizes.get("all weights")
    if schedule is not None and schedule.ndim == 1:
        axes.plot(range(1, len(schedule) + 1), schedule, marker="o")
        axes.set(xlabel="inner step", ylabel="learnt step size")
    else:
        means = [float(value.mean()) for value in sizes.values()]
        axes.barh(list(sizes), means)
        axes.set(xlabel="learnt step size (mean)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
