"""A grid of images, each with the label that it was given, and the true one where that is another."""

from __future__ import annotations

from matplotlib.figure import Figure, SubFigure
from torch import Tensor


def draw_image_grid(
    part: Figure | SubFigure, shape: tuple[int, int], inputs: Tensor, given: Tensor, true: Tensor
) -> None:
    """Draws images, row by row; a wrong label is red, with the true one in brackets, a right label green.

    Args:
        part: where to draw.
        shape: rows and columns; images past the last place are left out.
        inputs: pixels from 0 (paper) to 1 (ink), shape `(images, pixels)`.
        given: the labels given, shape `(images,)`.
        true: the true labels, shape `(images,)`.
    """
    side = round(inputs.shape[1] ** 0.5)
    cells = part.subplots(*shape, squeeze=False).flat
    for cell, pixels, label, truth in zip(cells, inputs.cpu(), given.tolist(), true.tolist(), strict=False):
        cell.imshow(pixels.reshape(side, side).numpy(), cmap="gray_r", vmin=0, vmax=1)
        text, color = (f"{label}", "tab:green") if label == truth else (f"{label} ({truth})", "tab:red")
        cell.set_title(text, fontsize=9, color=color)
    for cell in part.axes:
        cell.set(xticks=[], yticks=[], frame_on=False)
