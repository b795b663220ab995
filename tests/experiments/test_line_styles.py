"""Lines can be told apart without their colours."""

from __future__ import annotations

from experiments.common.results.line_styles import COLOURS, MARKERS, line_styles


def test_no_two_lines_share_a_marker_or_a_colour_with_the_same_dashes() -> None:
    styles = line_styles(str(number) for number in range(len(MARKERS))).values()
    assert len({str(style["marker"]) for style in styles}) == len(MARKERS) == 15
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == 15
    assert len(set(COLOURS)) == 7


def test_later_markers_do_not_hide_earlier_ones() -> None:
    sizes = [style["markersize"] for style in line_styles(str(number) for number in range(15)).values()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 15
