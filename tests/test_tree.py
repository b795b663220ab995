"""Algebra on dictionaries of tensors."""

from __future__ import annotations

import pytest
import torch

from hypertorch import tree
from hypertorch.fewshot import Episode, Examples
from tests.helpers.problems import normal

A = {"x": normal(2, 3, seed=0), "y": normal(4, seed=1)}
B = {"x": normal(2, 3, seed=2), "y": normal(4, seed=3)}


def flat(entries: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([entries[name].flatten() for name in sorted(entries)])


def test_algebra_equals_that_of_the_flattened_vectors() -> None:
    torch.testing.assert_close(flat(tree.add(A, B, alpha=-2.0)), flat(A) - 2.0 * flat(B))
    torch.testing.assert_close(tree.dot(A, B), flat(A) @ flat(B))
    torch.testing.assert_close(tree.norm(A), flat(A).norm())
    assert not flat(tree.zeros_like(A)).any()


def test_the_empty_dictionary_has_norm_zero() -> None:
    assert tree.norm({}) == 0.0


def test_prefixes_come_and_go() -> None:
    prefixed = tree.with_prefix("momentum", A)
    assert set(prefixed) == {"momentum.x", "momentum.y"}
    restored = tree.without_prefix("momentum", {**prefixed, "other.z": normal(1, seed=0)})
    assert restored == A


def test_leaves_are_cut_and_integers_stay() -> None:
    source = normal(2, seed=0).requires_grad_()
    leaves = tree.leaves_requiring_grad({"a": source * 2, "label": torch.arange(3)})
    assert leaves["a"].is_leaf
    assert leaves["a"].requires_grad
    assert not leaves["label"].requires_grad


def test_missing_derivatives_are_no_zeros() -> None:
    one = torch.ones(())
    assert tree.add_optional(None, None) is None
    assert tree.add_optional(one, None) is one
    assert tree.add_optional(None, one) is one
    assert tree.add_optional(one, one) == 2.0


def test_batches_of_any_nesting_are_mapped() -> None:
    examples = Examples(torch.arange(6).reshape(2, 3), torch.arange(2))
    batch = {"episode": Episode(examples, examples), "list": [torch.arange(2), None], "word": "kept"}
    taken = tree.map_batch(lambda value: value[1], batch)
    assert isinstance(taken["episode"], Episode)
    assert taken["episode"].query.inputs.tolist() == [3, 4, 5]
    assert taken["list"] == [torch.tensor(1), None]
    assert taken["word"] == "kept"
    assert len(tree.batch_tensors(batch)) == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finiteness_sees_one_bad_entry(bad: float) -> None:
    values = [torch.zeros(3), torch.tensor([1.0, bad]), torch.arange(3)]
    assert not tree.all_finite(values)
    assert tree.all_finite([values[0], values[2]])


def test_finite_entries_whose_sum_overflows_are_finite() -> None:
    assert tree.all_finite([torch.full((4,), 3e38)])
    assert tree.all_finite([torch.full((4,), 1e300, dtype=torch.float64)])


def test_opposite_infinities_are_not_finite() -> None:
    assert not tree.all_finite([torch.tensor([float("inf"), -float("inf")])])
    assert not tree.all_finite([torch.tensor([float("inf")]), torch.tensor([-float("inf")])])


@pytest.mark.parametrize("part", [complex(1.0, float("nan")), complex(1.0, float("inf")), complex(float("nan"), 1.0)])
def test_both_parts_of_a_complex_number_are_finite(part: complex) -> None:
    assert not tree.all_finite([torch.ones(2), torch.tensor([1.0, part])])
    assert tree.all_finite([torch.ones(2), torch.tensor([1.0, complex(1.0, 3e38)])])


def test_sparse_data_may_be_asked_about() -> None:
    assert tree.all_finite([torch.ones(2), torch.eye(2).to_sparse()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_the_smallest_numbers_are_not_zero(dtype: torch.dtype) -> None:
    smallest = torch.tensor([0.0, -torch.finfo(dtype).smallest_normal], dtype=dtype)
    tensors = {"zero": torch.zeros(2, dtype=dtype), "none": torch.ones(0), "small": smallest, "nan": smallest / 0.0}
    tensors |= {"large": torch.ones(3, dtype=torch.float64) * 1e300, "yes": torch.tensor([False, True])}
    tensors |= {"no": torch.tensor([False]), "one": torch.tensor([0, 1]), "0": torch.tensor(0)}
    assert tree.not_zero(tensors) == {"small", "nan", "large", "yes", "one"}


def test_one_tree_is_concatenated_to_itself() -> None:
    only = {"a": torch.arange(3.0)}
    assert torch.equal(tree.concatenate([only])["a"], only["a"])
