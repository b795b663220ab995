"""Tensors and pictures that the loggers are handed every so often."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.outer.problems import Quadratics
from tests.outer.runs import full_loop, make_loop


def bar(hparams: TensorDict) -> dict[str, Tensor]:
    return {"bar": hparams["start"].sigmoid().reshape(1, 1, 3)}


def test_outer_variables_are_shown_from_the_start_to_the_end() -> None:
    memory = ht.MemoryLogger()
    trained = make_loop(loggers=[memory], snapshots=ht.Snapshots(every=3, pictures=bar)).run(7)
    assert list(memory.tensors) == [0, 3, 6, 7] == list(memory.pictures)
    torch.testing.assert_close(memory.tensors[0], Quadratics().init_hparams())
    torch.testing.assert_close(memory.tensors[7], trained.hparams)
    torch.testing.assert_close(memory.pictures[7], bar(trained.hparams))
    # Copies: later steps change the outer variables in place.
    torch.testing.assert_close(memory.tensors[3], make_loop().run(3).hparams)


def test_a_constraint_holds_at_the_first_snapshot() -> None:
    memory = ht.MemoryLogger()
    limits = {"curvature": ht.Box(upper=1.5)}
    make_loop(loggers=[memory], constraints=limits, snapshots=ht.Snapshots(every=1)).run(1)
    assert float(memory.tensors[0]["curvature"]) == 1.5


def test_functions_choose_what_is_shown() -> None:
    memory = ht.MemoryLogger()
    square = ht.Snapshots(every=1, tensors=lambda hparams: {"square": hparams["curvature"].square()})
    make_loop(loggers=[memory], snapshots=square).run(1)
    assert list(memory.tensors[1]) == ["square"] and memory.pictures[1] == {}


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    """The first part ends behind its checkpoint: what it showed after it is shown again, and kept once."""
    memory, snapshots = ht.MemoryLogger(), ht.Snapshots(every=2)
    full_loop(tmp_path, loggers=[memory], snapshots=snapshots).run(6)
    memory.log_tensors(8, {"lost": torch.zeros(1)})
    full_loop(tmp_path, loggers=[memory], snapshots=snapshots).run(10, resume=True)
    assert list(memory.tensors) == [0, 2, 4, 6, 8, 10]
    assert all(list(tensors) == ["start", "curvature"] for tensors in memory.tensors.values())


def test_tensorboard_gets_histograms_and_images(tmp_path: Path) -> None:
    loop = make_loop(loggers=[ht.TensorBoardLogger(tmp_path)], snapshots=ht.Snapshots(every=2, pictures=bar))
    trained = loop.run(4)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    # The curvature has one entry.
    assert [event.step for event in events.Scalars("curvature")] == [0, 2, 4]
    assert events.Scalars("curvature")[-1].value == pytest.approx(float(trained.hparams["curvature"]))
    assert events.Tags()["histograms"] == ["start"] and events.Tags()["images"] == ["bar"]
    histograms = events.Histograms("start")
    assert [event.step for event in histograms] == [0, 2, 4] == [event.step for event in events.Images("bar")]
    assert histograms[-1].histogram_value.sum == pytest.approx(float(trained.hparams["start"].sum()))
    assert (events.Images("bar")[0].width, events.Images("bar")[0].height) == (3, 1)


def test_a_histogram_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    logger = ht.TensorBoardLogger(tmp_path)
    logger.log_tensors(1, {"some": torch.tensor([1.0, float("nan"), 3.0]), "none": torch.full((2,), float("inf"))})
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["histograms"] == ["some"]
    assert events.Histograms("some")[0].histogram_value.num == 2


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 3), torch.zeros(2, 3, 3), torch.full((1, 2, 2), 1.5), torch.full((1, 2, 2), torch.nan)]
)
def test_what_is_no_picture_is_refused_before_the_first_step(picture: Tensor) -> None:
    memory = ht.MemoryLogger()
    loop = make_loop(loggers=[memory], snapshots=ht.Snapshots(every=5, pictures=lambda _: {"odd": picture}))
    with pytest.raises(ValueError, match=r"`Snapshots.pictures` returned 'odd' of shape .*: a picture has the shape"):
        loop.run(5)
    assert not memory.records


def test_snapshots_that_nobody_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`snapshots` is given, but none of the `loggers` takes tensors or pictures"):
        make_loop(loggers=[ht.JsonLinesLogger(tmp_path / "metrics.jsonl")], snapshots=ht.Snapshots(every=1))
    for every in (0, True, 1.5):
        with pytest.raises(ValueError, match="`every` is .*: it counts outer steps between two snapshots"):
            ht.Snapshots(every=every)


@pytest.mark.parametrize("shown", [None, {"a": 1.0}, [torch.zeros(1)]])
def test_what_is_no_dict_of_tensors_is_refused(shown: object) -> None:
    loop = make_loop(loggers=[ht.MemoryLogger()], snapshots=ht.Snapshots(every=1, tensors=lambda _: shown))
    with pytest.raises(TypeError, match="`Snapshots.tensors` returned .*Return a dict from names to tensors"):
        loop.run(1)
    with pytest.raises(TypeError, match="`snapshots` is 5"):
        make_loop(loggers=[ht.MemoryLogger()], snapshots=5)
