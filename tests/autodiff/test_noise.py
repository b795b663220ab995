"""Noise is a function of its key."""

from __future__ import annotations

import pytest
import torch

from hypertorch.autodiff.noise import (
    generator_states,
    mix,
    preserved_generators,
    random_permutation,
    random_words,
    seed_generators,
)

CPU = torch.device("cpu")


def test_words_are_pinned_across_platforms() -> None:
    assert [int(word) for word in random_words(2, 0, 0)] == WORDS
    assert mix(1, 2, 3) == MIXED


def test_neighbouring_keys_are_unrelated() -> None:
    seeds = {mix(a, b, c) for a in range(10) for b in range(10) for c in range(-3, 10)}
    assert len(seeds) == 10 * 10 * 13
    assert mix(0, 1) != mix(1, 0)
    assert mix(1) != mix(1, 0)


def test_permutations_are_permutations() -> None:
    assert sorted(random_permutation(50, 1)) == list(range(50))
    assert list(random_permutation(50, 1)) != list(random_permutation(50, 2))


def test_generators_are_seeded_by_the_key_and_put_back() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with preserved_generators(CPU):
        seed_generators(CPU, 1, -1)
        first = torch.rand(2)
        seed_generators(CPU, 1, -2)
        assert not torch.equal(torch.rand(2), first)
        seed_generators(CPU, 1, -1)
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(2), expected)


def test_generators_are_put_back_after_an_error() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    def fail() -> None:
        with preserved_generators(CPU):
            seed_generators(CPU, 1)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert torch.equal(torch.rand(2), expected)


WORDS = [15744299189795819943, 11424349517701572599]
MIXED = 7702586659592502839


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    module = getattr(torch, kind)
    generators = [torch.Generator() for _ in range(4)]
    monkeypatch.setattr(module, "current_device", lambda: 3)
    monkeypatch.setattr(module, "default_generators", generators)
    # Asked in a context: the seeds of the host's generator are those of this test alone.
    with preserved_generators(CPU):
        seed_generators(torch.device(kind), 5)
        seed_generators(torch.device(kind, 1), 6)
    seeds = [generator.initial_seed() for generator in generators]
    assert (seeds[3], seeds[1]) == (mix(5) >> 1, mix(6) >> 1)
    assert seeds[0] not in (mix(5) >> 1, mix(6) >> 1)


def test_apples_gpu_is_asked_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    device, generator = torch.device("mps"), torch.Generator()
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    monkeypatch.setattr(torch, "Generator", lambda _: type(generator)())
    generator.manual_seed(1)
    with preserved_generators(device):
        seed_generators(device, 5)
        assert generator.initial_seed() == mix(5) >> 1
    assert generator.initial_seed() == 1


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_the_hosts_generator_is_all_there_is_for_code_on(name: str) -> None:
    assert len(generator_states(torch.device(name))) == 1
    with preserved_generators(torch.device(name)):
        seed_generators(torch.device(name), 5)
        assert torch.default_generator.initial_seed() == mix(5) >> 1
