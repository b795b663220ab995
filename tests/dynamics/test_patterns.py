"""Which parameter belongs to which pattern."""

from __future__ import annotations

import pytest

from hypertorch.dynamics.settings import belonging, check_patterns, first_match

NAMES = ["body.weight", "body.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("patterns", "parameter", "expected"),
    [
        (("*", "head.bias"), "head.bias", "head.bias"),
        (("head.*", "*.bias", "*"), "head.bias", "head.*"),
        (("*.bias", "head.*", "*"), "head.bias", "*.bias"),
        (("head.*", "*.bias", "*"), "body.weight", "*"),
        (("head.*",), "body.weight", None),
        (("head",), "head.weight", None),
        (("HEAD.*",), "head.weight", None),
        (("[bh]*.w?ight",), "head.weight", "[bh]*.w?ight"),
    ],
)
def test_a_name_wins_and_then_the_first_pattern(patterns: tuple[str, ...], parameter: str, expected: str) -> None:
    assert first_match(patterns, parameter) == expected


def test_parameters_belong_to_one_pattern_in_their_own_order() -> None:
    patterns = ["*.bias", "head.weight", "*"]
    parts = [belonging(patterns, pattern, NAMES) for pattern in patterns]
    assert parts == [["body.bias", "head.bias"], ["head.weight"], ["body.weight"]]


@pytest.mark.parametrize(
    "patterns", [["*"], ["body.*", "head.*"], ["body.*", "head.*", "*"], ["head.bias", "*"], NAMES]
)
def test_patterns_that_cover_all_are_fine(patterns: list[str]) -> None:
    check_patterns("`lr` of `SGD`", patterns, NAMES)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["head.*"], r"`lr` of `SGD` has the entries \['head.\*'\], none .* `body.weight`.*Add an entry"),
        (["neck.*", "*"], r"`lr` of `SGD` has the entry 'neck.\*', which matches none of .*'body.bias'.*Use one of"),
        (["*", "head.*"], r"has the entry 'head.\*', but every inner parameter it matches belongs to another.*first"),
        (["*", "neck"], "has the entry 'neck', which matches none"),
    ],
)
def test_patterns_that_do_not_fit_are_explained(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_patterns("`lr` of `SGD`", patterns, NAMES)
