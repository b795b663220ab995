"""Loggers: what they write, and that rewinding drops exactly what a resumed run logs again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypertorch.errors import CheckpointError
from hypertorch.outer import JsonLinesLogger, Logger, MemoryLogger, TensorBoardLogger
from tests.helpers.small_files import small_files


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / "metrics.jsonl"
    logger = JsonLinesLogger(path)
    assert not path.exists()
    logger.log(10, {"outer_loss": 0.1 + 0.2, "accuracy": 1.0})
    logger.log(20, {"outer_loss": math.nan, "accuracy": -math.inf})
    assert lines(path) == [
        {"step": 10, "outer_loss": 0.1 + 0.2, "accuracy": 1.0},
        {"step": 20, "outer_loss": None, "accuracy": None},
    ]
    logger.close()
    logger.close()
    logger.log(30, {"outer_loss": 1.0})
    logger.close()
    assert len(lines(path)) == 3


@pytest.mark.parametrize(
    "tail", ["", '{"step": 3', '{"step": 2, "x": 1.0}', "garbage\n", "[1]\n", '{"x": 1}\n', '{"step": "1"}\n', "\x00\n"]
)
def test_rewinding_drops_later_and_broken_lines(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonLinesLogger(path)
    for step in (1, 2, 2, 3, 4):
        logger.log(step, {"x": float(step)})
    with path.open("a") as file:
        file.write(tail)
    logger.rewind(2)
    assert [record["step"] for record in lines(path)] == [1, 2, 2]
    logger.log(3, {"x": 5.0})
    logger.close()
    assert [record["step"] for record in lines(path)] == [1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewinding_a_line_torn_in_the_middle_and_one_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st{"step": 2}\n\xff\xfe\n{"step": 2}\n')
    JsonLinesLogger(path).rewind(5)
    assert [record["step"] for record in lines(path)] == [1, 2]


def test_rewinding_leaves_a_file_without_later_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    JsonLinesLogger(path).rewind(1)
    assert path.stat().st_ino == before


@pytest.mark.parametrize("make", [JsonLinesLogger, TensorBoardLogger])
def test_rewinding_before_anything_is_written(tmp_path: Path, make: type[JsonLinesLogger]) -> None:
    logger: Logger = make(tmp_path / "nothing")
    logger.rewind(0)
    logger.close()
    assert not (tmp_path / "nothing").exists()


def test_memory_keeps_records() -> None:
    logger = MemoryLogger()
    logger.log(1, {"a": 1.0})
    logger.log(2, {"a": 2.0, "b": 5.0})
    logger.log(3, {"a": 3.0})
    logger.rewind(2)
    logger.close()
    assert logger.series("a") == ([1, 2], [1.0, 2.0])
    assert logger.series("b") == ([2], [5.0])
    assert logger.series("c") == ([], [])


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    logger = TensorBoardLogger(folder)
    logger.log(1, {"validation/accuracy": 0.5})
    logger.log(2, {"validation/accuracy": 0.75})
    logger.close()
    assert scalars(folder, "validation/accuracy") == [(1, 0.5), (2, 0.75)]


def test_tensorboard_hides_what_was_rewound(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log(step, {"x": float(step)})
    logger.close()
    again = TensorBoardLogger(tmp_path)
    again.rewind(1)
    again.log(2, {"x": 20.0})
    again.log(3, {"x": 30.0})
    again.close()
    assert scalars(tmp_path, "x") == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_a_record_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonLinesLogger(path)
    logger.log(0, {"x": 1.0})
    told = pytest.raises(CheckpointError, match=r"metrics\.jsonl` could not be written .*File too large.*Mend that")
    with small_files(), told:
        logger.log(1, {f"figure {number}": 1.0 for number in range(1000)})
    # Not once more for what was left in the buffer, which would hide the first error.
    logger.close()
    logger.rewind(3)
    assert lines(path) == [{"step": 0, "x": 1.0}]


@pytest.mark.parametrize("place", ["x" * 5000, "/dev/null/x", "/proc/x"], ids=lambda place: place[:10])
@pytest.mark.parametrize("kind", [JsonLinesLogger, TensorBoardLogger])
def test_a_place_that_cannot_be_written_to_is_named(kind: type[Logger], place: str) -> None:
    with pytest.raises(CheckpointError, match=r"^`.*` could not be written \(.*\): .*\. .* choose another folder"):
        kind(place).log(1, {"x": 1.0})  # type: ignore[call-arg]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("step", [JsonLinesLogger.rewind, lambda logger, at: logger.log(at, {"x": 1.0})])
def test_what_is_no_file_is_not_waited_for(
    make: Callable[[Path], object], step: Callable[[JsonLinesLogger, int], None], tmp_path: Path
) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl` is no regular file.* Delete it"):
        step(JsonLinesLogger(tmp_path / "metrics.jsonl"), 1)
