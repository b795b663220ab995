"""Two processes against one: the same numbers, the same errors, one writer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import tree
from tests.helpers.problems import normal
from tests.outer.runs import assert_same_run, full_loop, records
from tests.ranks.cases import CASES, Found, run

ROOT = Path(__file__).resolve().parents[2]
_LONGEST = 300  # seconds; on a free machine it takes ten
# What the last process finds otherwise than the first: who logs, writes, and what each was asked for.
OWN = ("records", "chunk", "own", "rows", "files", "tensors", "error")
SAME_BITS = (
    "maml by loop", "maml by vmap", "hyper-representation", "noise", "warm start", "everything", "forward",
    "forward in chunks", "forward gradient", "forward gradient one by one", "evolution", "evaluation",
    "evaluation of a single problem", "evaluation without tasks", "NaN raises", "NaN is skipped", "NaN shortens",
    "out of memory", "other start",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, of which the second is killed in the end."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.ranks.pair"]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=_LONGEST)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL], errors
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Found]]:
    """What each of two processes finds in every case."""
    return [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(2)]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries and sequences hold, by path."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    if not isinstance(value, dict | list | tuple):
        yield path, value
    for name, entry in entries:
        yield from leaves(entry, f"{path}/{name}")


def differing(first: Any, second: Any) -> list[str]:
    """The paths at which two findings are not the same bits."""
    left, right = dict(leaves(first)), dict(leaves(second))

    def same(path: str) -> bool:
        if path not in left or path not in right:
            return False
        ours, theirs = left[path], right[path]
        return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs

    return [path for path in {**left, **right} if not same(path)]


def largest_gap(first: Any, second: Any) -> float:
    """The largest difference of two numbers in findings of one form."""
    left, right = dict(leaves(first)), dict(leaves(second))
    assert left.keys() == right.keys()
    pairs = [(left[path], right[path]) for path in left if left[path] is not None]
    return max(float((torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max()) for ours, theirs in pairs)


@pytest.mark.parametrize("name", SAME_BITS)
def test_two_processes_find_the_same_bits_as_one(name: str, two: list[dict[str, Found]], tmp_path: Path) -> None:
    alone = run(name, None, tmp_path)
    assert "error" not in alone or name == "NaN raises"
    assert differing(alone, two[0][name]) == []


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("uneven shares", 1e-14),
        ("maml in single precision", 1e-6),
        ("hyper-representation in single precision", 1e-6),
    ],
)
def test_two_processes_round_otherwise_and_no_more(
    name: str, allowed: float, two: list[dict[str, Found]], tmp_path: Path
) -> None:
    alone = run(name, None, tmp_path)
    assert len(alone["records"]) >= 3
    assert largest_gap(alone, two[0][name]) <= allowed


@pytest.mark.parametrize("name", CASES)
def test_all_processes_find_the_same_bits(name: str, two: list[dict[str, Found]]) -> None:
    first, second = ({key: value for key, value in each[name].items() if key not in OWN} for each in two)
    assert differing(first, second) == []


def test_a_hypergradient_is_one_collective(two: list[dict[str, Found]]) -> None:
    calls = two[0]["collectives"]

    def more(name: str, before: str, after: str) -> int:
        return calls[after].get(name, 0) - calls[before].get(name, 0)

    assert more("all_gather", "3", "5") == 2
    assert more("all_gather", "3 logged", "5 logged") == 2
    # The metrics of a step that is logged.
    assert more("all_gather_object", "3", "5") == 0
    assert more("all_gather_object", "3 logged", "5 logged") == 2
    assert more("broadcast_object_list", "3 logged", "5 logged") == more("all_reduce", "3 logged", "5 logged") == 0


def test_the_first_process_alone_writes(two: list[dict[str, Found]], tmp_path: Path) -> None:
    alone = run("writing", None, tmp_path)
    assert len(alone["files"]) > 2 and alone["records"] > 2 and alone["tensors"] > 2
    assert two[0]["writing"] == alone
    assert two[1]["writing"] == {"files": [], "records": 0, "tensors": 0}


def test_too_little_memory_on_one_process_makes_smaller_chunks_on_all(two: list[dict[str, Found]]) -> None:
    assert [each["out of memory"]["warnings"] for each in two] == [
        ["8 tasks at once do not fit into memory", "4 tasks at once do not fit into memory"]
    ] * 2
    assert two[0]["out of memory"]["chunk"] == 2


def test_an_error_on_one_process_is_raised_on_all(two: list[dict[str, Found]]) -> None:
    first, second = (each["NaN raises"]["error"] for each in two)
    assert first == second
    assert "outer step 2: the inner loss holds NaN or infinity at inner step 2" in first[1]
    assert [len(each["NaN is skipped"]["warnings"]) for each in two] == [1, 1]
    assert "over 2 of 3 inner steps" in two[0]["NaN shortens"]["warnings"][0]


def test_the_route_of_the_first_process_is_that_of_all(two: list[dict[str, Found]]) -> None:
    assert [each["route"] for each in two] == [{"taken": ["vmap"]}] * 2


def test_a_tensor_of_any_dtype_arrives_as_it_was(two: list[dict[str, Found]]) -> None:
    for each in two:
        for rank, found in enumerate(each["dtypes"]["found"]):
            expected = {**two[rank]["dtypes"]["own"], "rows": two[rank]["dtypes"]["rows"]}
            assert differing(found, expected) == []
            assert all(found[name].dtype == value.dtype for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("refused: Reverse", "IncompatibleBackendError", "`Reverse` differentiates a single inner problem in one"),
        ("refused: persistent", "IncompatibleBackendError", "`EvolutionStrategies` differentiates a single"),
        ("refused: keep_tangents", "IncompatibleBackendError", "`Forward` differentiates a single inner problem in"),
        ("refused: one sample", "IncompatibleBackendError", "`ForwardGradient` differentiates a single inner problem"),
        ("refused: too few tasks", "IncompatibleBackendError", "`num_tasks` is 1, but 2 processes share the tasks"),
        ("refused: real time", "IncompatibleBackendError", "`execution` has 2 processes, but a real-time run is one"),
        ("refused: other numbers of tasks", "ValueError", "3 tasks, and `source.at(0)` has 4"),
        ("other hparams", "ValueError", "`hparams['curvature']` of process 1 is not that of process 0"),
        ("other hparams evaluated", "ValueError", "`hparams['start']` of process 1 is not that of process 0"),
    ],
)
def test_what_cannot_be_shared_is_refused(name: str, kind: str, message: str, two: list[dict[str, Found]]) -> None:
    for each in two:
        found = each[name]["error"]
        assert found[0] == kind and message in found[1]


def test_a_lost_process_ends_the_other_which_leaves_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    found = json.loads((folder / "lost.json").read_text())
    assert "process 0 of 2 waited for the others, and one of them ended or did not answer in time" in found["error"]
    assert found["seconds"] < 30
    newest = ht.Checkpoints(folder / "lost" / "checkpoints").newest()
    # Of the last step that all took, although none was due there.
    assert newest is not None and newest.name == "step_00000008.safetensors"
    resumed = full_loop(folder / "lost", execution=ht.Execution(tasks="loop")).run(12, resume=True)
    assert_same_run(resumed, full_loop(tmp_path, execution=ht.Execution(tasks="loop")).run(12))
    assert records(folder / "lost" / "metrics.jsonl") == records(tmp_path / "metrics.jsonl")


# Without other processes


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 20])
def test_shares_cover_all_work_evenly_and_in_order(size: int, count: int) -> None:
    shares = ht.Ranks(rank=0, size=size).shares(count)
    assert [index for share in shares for index in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= 1
    assert [ht.Ranks(rank=rank, size=size).share(count) for rank in range(size)] == shares


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 7, 8, 32])
def test_halves_of_a_sum_in_pairs_round_like_the_whole(num_terms: int) -> None:
    terms = [{"a": normal(5, seed=seed), "b": None} for seed in range(num_terms)]

    def total(some: list[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
        found = tree.PairwiseSum()
        for term in some:
            found.add(term)
        return found.total()

    whole = total(terms)
    assert whole["b"] is None and whole["a"] is not None
    torch.testing.assert_close(whole["a"], torch.stack([normal(5, seed=seed) for seed in range(num_terms)]).sum(0))
    if num_terms in (2, 4, 8, 32):
        half = num_terms // 2
        halves = total([total(terms[:half]), total(terms[half:])])
        assert halves["a"] is not None and torch.equal(halves["a"], whole["a"])


def test_one_process_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False) if size is None else monkeypatch.setenv("WORLD_SIZE", size)
        with ht.join_ranks() as ranks:
            assert ranks is None


def test_an_environment_that_is_not_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="`WORLD_SIZE` is 'two' in the environment"), ht.join_ranks():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'. are not there"):
        ht.join_ranks().__enter__()
    with pytest.raises(ValueError, match="`timeout` is 0.0: it is how many seconds"):
        ht.join_ranks(timeout=0.0).__enter__()


def test_places_and_executions_are_checked() -> None:
    with pytest.raises(ValueError, match="`rank` is 2 of `size` 2"):
        ht.Ranks(rank=2, size=2)
    with pytest.raises(TypeError, match="`ranks` is 2, not a `Ranks`"):
        ht.Execution(ranks=2)  # type: ignore[arg-type]
