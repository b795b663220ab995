"""Random numbers that depend on a key and on nothing else, so that any step can be replayed.

Two needs, two functions: `random_words` for draws that must be equal on every platform (episodes, minibatches), and
`seed_generators` for the noise that a model draws itself (dropout), which comes from torch's default generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# Python's integers have no width: the mask makes words of them.
_WORD = (1 << 64) - 1
_HOST = ("cpu", "meta")  # code on them draws from the host's generator, or not at all


def mix(*key: int) -> int:
    """Returns a 64-bit seed for a tuple of integers; neighbouring keys give unrelated seeds.

    References:
        Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators (the finaliser of SplitMix64).
    """
    state = 0
    for word in key:
        state = (state + (word & _WORD) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def random_words(count: int, *key: int) -> np.ndarray:
    """Returns `count` random uint64 words for a key of integers, the same on every platform and numpy version.

    The raw stream of the Philox generator is fixed by its definition; what libraries derive from it (permutations,
    floats) may change between versions, so callers derive those from the words themselves.
    """
    return np.random.Philox(key=mix(*key)).random_raw(count)


def random_permutation(length: int, *key: int) -> np.ndarray:
    """Returns a permutation of `0 .. length - 1` for a key of integers, the same on every platform."""
    # Stable: the order of equal words would otherwise be that of numpy's algorithm of the day.
    return np.argsort(random_words(length, *key), kind="stable")


def seed_generators(device: torch.device, *key: int) -> None:
    """Sets torch's default generators of the host and of `device` to a state given by the key alone."""
    # Not `torch.manual_seed`, which seeds every device: the generators of other devices are not put back after a run.
    seed = mix(*key) >> 1  # torch takes signed 64-bit seeds
    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "xpu"):
        # The shortest way, which every inner step takes.
        torch.get_device_module(device).default_generators[_index(device)].manual_seed(seed)
    elif device.type not in _HOST:
        _set_state(device, torch.Generator(device).manual_seed(seed).get_state())


def generator_states(device: torch.device) -> tuple[Tensor, ...]:
    """Returns the states of torch's default generators that code on a device may draw from; they lie on the host."""
    host = torch.default_generator.get_state()
    return (host,) if device.type in _HOST else (host, _state(device))


def set_generators(states: tuple[Tensor, ...], device: torch.device) -> None:
    """Sets torch's default generators of the host and of `device` to the states that `generator_states` returned."""
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        _set_state(device, states[1])


@contextmanager
def preserved_generators(device: torch.device) -> Iterator[None]:
    """Leaves torch's default generators of the host and of `device` as they were found."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generators(states, device)


def _index(device: torch.device) -> int:
    return torch.get_device_module(device).current_device() if device.index is None else device.index


# `torch.cuda`, `torch.xpu` and the module that any other backend registers name these two alike; that of Apple's GPU
# takes no device, since there is one.
def _state(device: torch.device) -> Tensor:
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
