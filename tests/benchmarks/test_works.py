"""The works: contestants agree, a seed gives the data, targets name who takes part."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from benchmarks import (
    ParameterGrowth,
    ReversibleUnroll,
    SmallUnroll,
    TransformerUnroll,
    torchopt_unroll,
    variants,
)
from benchmarks.agreement import relative_error
from benchmarks.contestant import Contestant
from benchmarks.memory import peak_bytes
from benchmarks.ours import Ours
from benchmarks.timing import Stopwatch
from benchmarks.torchopt_unroll import TorchOptMeta
from hypertorch import tree
from tests.benchmarks.benchmark_works import WORKS, job_of, memory_request


def is_missing(contestant: Contestant) -> bool:
    return contestant.library == "TorchOpt" and torchopt_unroll.torchopt is None


def test_torchopt_takes_part() -> None:
    if torchopt_unroll.torchopt is None:
        pytest.skip("torchopt is not installed; it comes with the extra `benchmark`")
    assert job_of(SmallUnroll().tiny()).num_steps == 4
    assert TorchOptMeta().run(job_of(SmallUnroll().tiny())).grads is not None


@pytest.mark.parametrize("name", WORKS)
def test_all_contestants_return_the_same_hypergradient(name: str) -> None:
    work = WORKS[name].tiny()
    job = job_of(work)
    before = {key: value.clone() for key, value in [*job.hparams.items(), *job.network.named_parameters()]}
    found: dict[str, dict] = {}
    for key, contestant in work.contestants().items():
        if contestant.compiles or is_missing(contestant):
            continue
        outcome = contestant.run(job)
        assert (outcome.grads is None) == (contestant.side == "floor")
        if outcome.grads is not None:
            found[key] = outcome.grads
    assert {"higher", variants.EAGER} <= found.keys() or name == "very long"
    assert len(found) >= (2 if torchopt_unroll.torchopt is None else 3)
    reference = found["higher"]
    assert reference.keys() == job.hparams.keys()
    assert float(torch.cat([value.flatten() for value in reference.values()]).norm()) > 1e-4
    assert {key: relative_error(grads, reference) < 1e-9 for key, grads in found.items()} == dict.fromkeys(found, True)
    # Nobody left anything behind for the next one.
    after = {**job.hparams, **dict(job.network.named_parameters())}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(value.grad is None for value in after.values())


@pytest.mark.parametrize("name", WORKS)
def test_a_seed_gives_the_same_job_and_another_one_another(name: str) -> None:
    work = WORKS[name].tiny()

    def numbers(seed: int) -> torch.Tensor:
        job = job_of(work, seed)
        data = [*tree.batch_tensors(job.inner_batch(0)), *tree.batch_tensors(job.outer_batch)]
        tensors = [*job.hparams.values(), *job.network.parameters(), *data]
        return torch.cat([value.detach().double().flatten() for value in tensors])

    assert torch.equal(numbers(0), numbers(0))
    assert not torch.equal(numbers(0), numbers(1))


@pytest.mark.parametrize("name", WORKS)
def test_targets_name_contestants(name: str) -> None:
    work = WORKS[name]
    names = set(work.contestants())
    for target in work.targets():
        assert target.contestant in names
        assert target.against in {*names, "peers", "bytes", "trajectory_bytes"}
    if name != "very long":
        assert name == "params" or work.targets()
    assert list(work.contestants())[-1] == variants.PLAIN
    assert work.contestants()[variants.PLAIN].side == "floor"


def test_the_width_gives_the_wanted_number_of_parameters() -> None:
    for wanted in (1_000, 10_000, 100_000, 1_000_000):
        work = ParameterGrowth(num_params=wanted)
        count = sum(value.numel() for value in job_of(work).network.parameters())
        assert abs(count - wanted) < 0.03 * wanted


def test_the_transformer_sees_no_later_token() -> None:
    job = job_of(TransformerUnroll(num_layers=2, width=8, num_heads=2, num_tokens=5, num_sequences=2))
    tokens = job.inner_batch(0)[:, :-1]
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 64
    before, after = job.network(tokens), job.network(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])
    assert not torch.equal(before[:, 4], after[:, 4])


def test_reversible_counts_what_it_keeps() -> None:
    work = ReversibleUnroll(num_steps=40, batch_size=2, num_rows=5, hidden=3)
    figures = work.contestants()["reversible"].run(job_of(work)).figures
    weights = 784 * 3 + 3 + 2 * (9 + 3) + 3 * 10 + 10
    assert figures["trajectory_bytes"] == 40 * weights * 8
    # log2(1 / 0.9) = 0.152 bits per weight and step.
    assert figures["kept_bytes"] == pytest.approx(40 * 0.152 * weights / 8, rel=0.25)


def test_works_take_sizes_only() -> None:
    """So that a sweep can set them, and a process be told of them."""
    for work in WORKS.values():
        assert all(isinstance(getattr(work, item.name), (int, str)) for item in fields(work))  # type: ignore[arg-type]


def test_a_backend_is_made_only_when_it_runs() -> None:
    def unknown(**_: object):
        raise TypeError("unexpected keyword")

    contestant = Ours(backend=unknown)
    with pytest.raises(TypeError, match="unexpected keyword"):
        contestant.run(job_of(SmallUnroll().tiny()))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["small", "sinusoid", "conv maml"])
def test_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    work = WORKS[name].tiny()
    job = work.job(seed=0, device=device, dtype=torch.float64)
    found = work.contestants()[variants.EAGER].run(job).grads
    expected = work.contestants()["higher"].run(job).grads
    assert found is not None
    assert expected is not None
    assert relative_error(found, expected) < 1e-9
    assert Stopwatch(device=device).seconds(lambda: work.contestants()[variants.EAGER].run(job)) > 0
    assert peak_bytes(replace(memory_request(work, variants.EAGER), device="cuda")) > 0
