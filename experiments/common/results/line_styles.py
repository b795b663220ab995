"""Lines that can be told apart: by colour, by marker and by dashes, also without seeing colours well, or in grey."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# The palette of Okabe and Ito (2008), which people with the usual colour blindnesses tell apart; its yellow is too
# pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "8", "H", (5, 1, 0))
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns matplotlib's settings of a line for each name; no two share a marker, up to 15 names."""
    return {
        name: {
            "color": COLOURS[position % len(COLOURS)],
            "marker": MARKERS[position % len(MARKERS)],
            "linestyle": _DASHES[position // len(COLOURS) % len(_DASHES)],
            # Smaller and smaller: where lines lie on each other, the earlier ones are seen around the later.
            "markersize": max(11.0 - 0.3 * position, 6.0),
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "linewidth": 1.5,
        }
        for position, name in enumerate(names)
    }
