"""Errors, times, ratios, exponents and words: figures mean what they say."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

from benchmarks.agreement import relative_error
from benchmarks.contestant import NotMeasured
from benchmarks.failure_reasons import is_out_of_memory, reason
from benchmarks.ratios import Ratio, measured_ratio
from benchmarks.row import Row
from benchmarks.sweep import crossover, growth
from benchmarks.tables import byte_words, ratio_lines, table_of_costs, table_of_rows, time_words
from benchmarks.timing import Rounds
from benchmarks.work import Target


class TestAgreement:
    reference: ClassVar = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor(1.0)}

    def test_is_the_worst_entry(self) -> None:
        found = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor(1.1)}
        assert relative_error(found, self.reference) == pytest.approx(0.1)
        assert relative_error(self.reference, self.reference) == 0.0

    def test_small_entries_are_judged_by_the_whole(self) -> None:
        reference = {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}
        assert relative_error({"a": torch.tensor(1.0), "b": torch.tensor(1e-7)}, reference) == pytest.approx(1e-5)

    def test_anything_else_disagrees(self) -> None:
        assert math.isinf(relative_error({"a": self.reference["a"]}, self.reference))
        assert math.isinf(relative_error({**self.reference, "b": torch.ones(1)}, self.reference))
        assert math.isinf(relative_error({**self.reference, "b": torch.tensor(math.nan)}, self.reference))
        zeros = {"a": torch.zeros(2)}
        assert relative_error(zeros, zeros) == 0.0
        assert math.isinf(relative_error({"a": torch.ones(2)}, zeros))


class TestRounds:
    def ran(self, seconds: dict[str, float], rounds: Rounds) -> tuple[list[str], dict[str, list[float]]]:
        order: list[str] = []

        def turn_of(name: str):
            def turn(number: int) -> float:
                order.extend([name] * number)
                return seconds[name]

            return turn

        times = rounds.times({name: turn_of(name) for name in seconds}, seed=0)
        return order, times

    def test_contestants_have_turns_in_an_order_drawn_for_every_round(self) -> None:
        order, times = self.ran({"a": 1.0, "b": 2.0, "c": 3.0}, Rounds(repetitions=20, shortest=0.5, longest=100.0))
        rounds = ["".join(order[start : start + 3]) for start in range(3, len(order), 3)]
        assert {"".join(sorted(names)) for names in rounds} == {"abc"}
        assert len(rounds) == 20
        assert len(set(rounds)) >= 5
        assert times == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [3.0] * 20}

    def test_short_runs_are_repeated_and_long_ones_stop(self) -> None:
        order, times = self.ran({"short": 0.25, "long": 8.0}, Rounds(repetitions=4, shortest=1.0, longest=10.0))
        assert order.count("short") == 1 + 4 * 4
        assert len(times["long"]) == 2
        assert len(times["short"]) == 4

    def test_everyone_is_timed_once(self) -> None:
        order, times = self.ran({"a": 50.0, "b": 0.6}, Rounds(repetitions=3, shortest=0.0, longest=1.0))
        assert times == {"a": [50.0], "b": [0.6, 0.6]}
        assert order.count("a") == 1

    def test_nobody(self) -> None:
        assert self.ran({}, Rounds(repetitions=3, shortest=0.0, longest=1.0)) == ([], {})


def row(contestant: str, side: str = "ours", **values) -> Row:
    given = {"work": "w", "title": "a work", "size": None, "library": "some", **values}
    return Row(contestant=contestant, side=side, **given)  # type: ignore[arg-type]


ROWS = [
    row("slow peer", "peer", min_seconds=4.0, peak_bytes=100),
    row("fast peer", "peer", min_seconds=2.0, peak_bytes=400),
    row("by hand", "by hand", min_seconds=0.5, peak_bytes=10),
    row("own", min_seconds=1.0, peak_bytes=50, figures={"kept": 3.0, "stored": 300.0}),
    row("broken", notes=("not measured: TypeError: no such thing",)),
    row("plain", "floor", min_seconds=0.25, peak_bytes=1),
]


class TestRatios:
    def ratio(self, contestant: str, quantity: str, against: str, at_most: float = 0.5):
        target = Target(contestant=contestant, quantity=quantity, against=against, at_most=at_most)
        return measured_ratio(target, ROWS)

    def test_against_the_best_peer_of_each_quantity(self) -> None:
        time = self.ratio("own", "time", "peers")
        assert (time.figure, time.against, time.reached) == (0.5, "fast peer", True)
        memory_ratio = self.ratio("own", "memory", "peers", at_most=0.49)
        assert (memory_ratio.figure, memory_ratio.against, memory_ratio.reached) == (0.5, "slow peer", False)

    def test_against_others(self) -> None:
        assert self.ratio("own", "time", "plain", 6.0).figure == 4.0
        assert self.ratio("own", "time", "by hand", 6.0).figure == 2.0
        assert self.ratio("own", "memory", "bytes", 51).figure == 50.0
        assert self.ratio("own", "memory", "bytes", 51).reached is True
        assert self.ratio("own", "kept", "stored", 0.01).figure == 0.01

    def test_what_is_missing_is_said(self) -> None:
        broken = self.ratio("broken", "time", "peers")
        assert (broken.figure, broken.reached) == (None, None)
        assert broken.notes == "broken; not measured: TypeError: no such thing"
        assert self.ratio("own", "time", "broken").notes == "broken; not measured: TypeError: no such thing"
        assert self.ratio("nobody", "time", "peers").figure is None
        assert self.ratio("own", "unheard of", "stored").figure is None
        alone = measured_ratio(Target(contestant="own", quantity="time", against="peers", at_most=1), ROWS[3:])
        assert (alone.figure, alone.notes) == (None, "peers")

    def test_who_disagrees_does_not_count(self) -> None:
        wrong = {"agrees": False, "reference": "slow peer"}
        rows = [
            row("slow peer", "peer", min_seconds=4.0, agrees=True),
            row("wrong peer", "peer", min_seconds=0.1, error=0.5, **wrong),
            row("own", min_seconds=1.0, agrees=True),
            row("wrong own", min_seconds=0.5, peak_bytes=5, figures={"kept": 1.0, "stored": 9.0}, **wrong),
            row("plain", "floor", min_seconds=0.25),
        ]

        def ratio(contestant: str, against: str, quantity: str = "time", rows: list[Row] = rows) -> Ratio:
            target = Target(contestant=contestant, quantity=quantity, against=against, at_most=100.0)
            return measured_ratio(target, rows)

        right = ratio("own", "peers")
        assert (right.against, right.figure, right.reached, right.notes) == ("slow peer", 0.25, True, "")
        for against, quantity in (("peers", "time"), ("plain", "time"), ("own", "time"), ("bytes", "memory")):
            found = ratio("wrong own", against, quantity)
            assert found.figure is not None
            assert (found.reached, found.notes) == (False, "wrong own disagrees with slow peer")
        assert ratio("wrong own", "stored", "kept").reached is False
        base = ratio("own", "wrong peer")
        assert (base.figure, base.reached) == (10.0, False)
        assert base.notes == "wrong peer disagrees with slow peer, relative error 5.0e-01"
        assert ratio_lines([base])[2].endswith(f"| at most 100 | 10 ({base.notes}) | no |")
        alone = ratio("own", "peers", rows=rows[1:])
        assert (alone.figure, alone.reached, alone.notes) == (None, None, f"peers; {base.notes}")

    def test_who_disagrees_is_no_best_peer_of_the_table(self) -> None:
        rows = [
            row("slow peer", "peer", min_seconds=4.0, agrees=True),
            row("wrong peer", "peer", min_seconds=0.1, error=0.5, agrees=False),
            row("own", min_seconds=1.0, agrees=True),
        ]
        assert list(table_of_rows(rows).columns[4].cells) == ["1", "0.025", "0.25"]

    @pytest.mark.parametrize(
        ("figure", "at_most", "shown"),
        [
            (1.0544, 1.05, "1.054 | no"),
            (1.04996, 1.05, "1.04996 | yes"),
            (1.05, 1.05, "1.05 | yes"),
            (1.06, 1.05, "1.06 | no"),
            (1 / 11.98, 1 / 12, "1/11.98 | no"),
            (1 / 12, 1 / 12, "1/12 | yes"),
        ],
    )
    def test_a_figure_is_told_from_what_was_wanted(self, figure: float, at_most: float, shown: str) -> None:
        rows = [row("base", min_seconds=1.0), row("own", min_seconds=figure)]
        target = Target(contestant="own", quantity="time", against="base", at_most=at_most)
        assert f"| {shown} |" in ratio_lines([measured_ratio(target, rows)])[2]

    def test_bytes_are_told_from_what_was_wanted(self) -> None:
        target = Target(contestant="own", quantity="memory", against="bytes", at_most=2**30)
        line = ratio_lines([measured_ratio(target, [row("own", peak_bytes=2**30 + 2**21)])])[2]
        assert "| at most 1 GiB | 1.002 GiB | no |" in line

    def test_as_markdown(self) -> None:
        lines = ratio_lines(
            [
                self.ratio("own", "time", "peers", 1 / 12),
                self.ratio("broken", "time", "peers"),
                self.ratio("own", "memory", "bytes", 2**30),
            ]
        )
        assert lines[2] == "| a work | own | time | fast peer | at most 1/12 | 0.5 | no |"
        assert lines[3].endswith("| at most 0.5 | not measured (broken; not measured: TypeError: no such thing) |  |")
        assert lines[4] == "| a work | own | memory | bytes | at most 1 GiB | 50 B | yes |"


def swept(contestant: str, figures: dict[int, float | None]) -> list[Row]:
    return [row(contestant, size=size, min_seconds=value) for size, value in figures.items()]


class TestSweep:
    def test_the_exponent_of_a_power(self) -> None:
        fit = growth(swept("a", {size: 3.0 * size**1.5 for size in (1, 10, 100, 1000)}), "time")
        assert fit is not None
        assert fit.exponent == pytest.approx(1.5)
        assert fit.factor == pytest.approx(3.0)
        assert (fit.first, fit.last) == (10, 1000)

    def test_what_does_not_grow_at_small_sizes_is_left_out(self) -> None:
        fit = growth(swept("a", {size: max(100.0, size) for size in (1, 3, 10, 100, 1000, 10_000)}), "time")
        assert fit is not None
        assert fit.exponent == pytest.approx(1.0)

    def test_too_few_points(self) -> None:
        assert growth(swept("a", {1: 1.0, 2: 2.0}), "time") is None
        assert growth(swept("a", {1: 1.0, 2: None, 3: 3.0}), "time") is None
        assert growth(swept("a", {1: 1.0, 2: 2.0, 3: 3.0}), "memory") is None

    def test_where_two_cross(self) -> None:
        rows = swept("a", {1: 1.0, 10: 10.0, 100: 100.0}) + swept("b", {1: 31.6, 10: 31.6, 100: 31.6})
        assert crossover(rows, "a", "b") == pytest.approx(31.6, rel=1e-6)
        assert crossover(rows, "b", "a") is None
        assert crossover(rows, "a", "nobody") is None


def test_reasons() -> None:
    assert reason(TypeError("no such keyword\nmore")) == "TypeError: no such keyword"
    assert reason(NotMeasured("there are no tasks")) == "there are no tasks"
    assert len(reason(RuntimeError("x" * 1000))) == 200
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("something else"))


def test_the_table_of_costs() -> None:
    rows = [
        row("eager", first_seconds=0.5, operations=12_345, moved_bytes=2048, peak_bytes=5),
        row("compiled", first_seconds=20.0, second_process_seconds=2.5),
    ]
    cells = zip(*(column.cells for column in table_of_costs(rows).columns), strict=True)
    assert list(cells) == [
        ("eager", "500 ms", "-", "5 B", "12,345", "2 KiB"),
        ("compiled", "20 s", "2.5 s", "-", "-", "-"),
    ]


def test_quartiles_are_shown() -> None:
    shown = table_of_rows([row("a", lower_quartile_seconds=0.5, upper_quartile_seconds=2.0), row("b")])
    assert list(shown.columns[2].cells) == ["500 ms to 2 s", "-"]


def test_figures_for_people() -> None:
    assert [time_words(value) for value in (None, 2.0, 0.0123, 4e-6)] == ["-", "2 s", "12.3 ms", "4 us"]
    assert [byte_words(value) for value in (None, 5, 2048, 3 * 2**20, 2**30)] == [
        "-", "5 B", "2 KiB", "3 MiB", "1 GiB",
    ]  # fmt: skip
