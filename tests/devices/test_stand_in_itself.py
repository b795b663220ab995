"""What the stand-in raises and counts, so that a test that passes on it has seen something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hypertorch.autodiff.products import load_forward_mode
from tests.helpers.stand_in import StandIn


def test_devices_do_not_meet() -> None:
    with StandIn() as device:
        there, here = torch.ones(3, device=device.device), torch.ones(3)
        for meet in (
            lambda: there + here,
            lambda: here @ there,
            lambda: torch.stack([there[0], here[0]]),
            lambda: here.add_(there),
            lambda: torch.where(there > 0, here, there),
        ):
            with pytest.raises(RuntimeError, match="same device, but found .*:0 and cpu"):
                meet()
        assert (there * here.sum()).device == device.device  # a number of the host


def test_reads_and_copies_are_counted() -> None:
    with StandIn() as device:
        there = torch.ones(3, device=device.device)
        reads: list[Callable[[], object]] = [
            lambda: float(there.sum()),
            lambda: bool(there.any()),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: there.to("cpu"),
            lambda: torch.zeros(3).copy_(there),
            lambda: torch.equal(there, there),
            lambda: there.nonzero(),
            lambda: there[there > 0],
            lambda: torch.linalg.inv(torch.diag(there)),
        ]
        for read in reads:
            device.reset()
            read()
            assert device.reads.total() == 1 and "test_stand_in_itself.py:" in next(iter(device.reads))
        uploads: list[Callable[[], object]] = [
            lambda: torch.tensor(1.0, device=device.device),
            lambda: torch.ones(3).to(device.device),
            lambda: there.copy_(torch.zeros(3)),
            lambda: there[torch.tensor([0, 1])],
            lambda: torch.ones(3).to(device.device, non_blocking=True),
        ]
        for upload in uploads:
            device.reset()
            upload()
            assert (device.reads.total(), device.uploads.total()) == (0, 1)
        device.reset()
        torch.ones(3).pin_memory().to(device.device, non_blocking=True)
        there[there > 0] = 2.0
        torch.zeros(3, device=device.device)
        assert there.to("meta").is_meta
        assert not device.reads and not device.uploads


def test_tangents_are_carried_together() -> None:
    load_forward_mode()
    with StandIn() as device:
        value, tangents = device.put(torch.tensor(0.9)), device.put(torch.ones(2))
        push = torch.func.vmap(lambda tangent: torch.func.jvp(lambda x: x - 1.0, (value,), (tangent,))[1])
        assert torch.equal(push(tangents).cpu(), torch.ones(2))


def test_a_generator_belongs_to_a_device() -> None:
    with StandIn() as device:
        own = torch.Generator(device.device).manual_seed(1)
        host = torch.default_generator.get_state()
        assert torch.rand(2, generator=own, device=device.device).device == device.device
        torch.rand(2, device=device.device)
        assert torch.equal(torch.default_generator.get_state(), host)
        with pytest.raises(RuntimeError, match="expected a generator of it, found one of cpu"):
            torch.rand(2, generator=torch.Generator().manual_seed(7), device=device.device)


def test_it_leaves_nothing_behind() -> None:
    before = torch.Generator, torch.accelerator.current_accelerator, torch.accelerator.synchronize
    with StandIn():
        pass
    assert before == (torch.Generator, torch.accelerator.current_accelerator, torch.accelerator.synchronize)
    assert torch.tensor(1.0).device.type == "cpu"
