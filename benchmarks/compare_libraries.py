"""Runs hypertorch, higher, TorchOpt, JAX and plain training on the same work, and compares time, memory and results.

scripts/benchmark                                  everything, on the CPU (hours)
scripts/benchmark --cuda                           the same on a GPU
scripts/benchmark 'only=[small_unroll]'            one work
scripts/benchmark quick=true                       tiny sizes: a look at whether everything runs
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
from benchmarks import variants
from benchmarks.machine import library_versions, machine
from benchmarks.measure import Settings, measure
from benchmarks.memory import available_bytes
from benchmarks.results import Results, Sweep
from benchmarks.sizes import build_work, other_sizes, sizes
from benchmarks.tables import ratio_lines, table_of_costs, table_of_growth, table_of_rows
from benchmarks.timing import Rounds
from benchmarks.work import Work
from experiments.common.commands.failures import ExpectedFailure, Failures
from experiments.common.configuration.readers import (
    ascending_lengths,
    device,
    dtype,
    listed_names,
    optional,
    positive_number,
    quoted,
    switch,
    whole_number,
)
from experiments.common.configuration.reads import Reads, check_settings_are_read, given_settings
from experiments.common.configuration.typed_settings import parse, setting
from experiments.common.runs.run_folder import command, open_folder
from hypertorch.autodiff.live_memory import parse_bytes

MAIN_CONFIG = Path(__file__).resolve().with_suffix(".yaml")
failures = Failures(MAIN_CONFIG)


def _bytes(config: DictConfig, key: str) -> int:
    return parse_bytes(OmegaConf.select(config, key), key)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What the command reads, beside its works and sweeps.

    Args:
        seed: chooses the data and the first weights.
        device: where to compute.
        dtype: of the tensors.
        threads: threads of every contestant, and cores that it is kept on; None for each library's own choice.
        resume: whether to go on with an earlier benchmark.
        only: names of the works and sweeps to run; None for all.
        contestants: names of those that take part; None for all.
        quick: whether sizes are tiny.
        repetitions: rounds in which every contestant runs once.
        shortest_repetition: a repetition takes at least so long (unit: seconds).
        longest_timing: a contestant is timed for so long (unit: seconds).
        memory: whether peak memory is measured.
        memory_limit: what a contestant may take beside the data (unit: bytes); None for most of what is free.
        longest_run: a run may take so long in a process of its own (unit: seconds).
        longest_work: the times of a work may take so long (unit: seconds).
        tolerance: largest relative error of a hypergradient that agrees.
    """

    seed: int = setting(partial(whole_number, minimum=0, purpose="it chooses the data and the first weights"))
    device: torch.device = setting(device)
    dtype: torch.dtype = setting(dtype)
    threads: int | None = setting(
        optional(partial(whole_number, minimum=1, purpose="it is the number of threads of a contestant"))
    )
    resume: bool = setting(switch)
    only: list[str] | None = setting(partial(listed_names, example="small_unroll"))
    contestants: list[str] | None = setting(partial(listed_names, example="higher,TorchOpt"))
    quick: bool = setting(switch)
    repetitions: int = setting(partial(whole_number, minimum=1, purpose="the median is taken over them"))
    shortest_repetition: float = setting(
        partial(positive_number, purpose="a repetition takes so long", example=0.2, or_zero=True)
    )
    longest_timing: float = setting(partial(positive_number, purpose="a contestant is timed for so long", example=120))
    memory: bool = setting(switch)
    memory_limit: int | None = setting(optional(_bytes))
    longest_run: float = setting(partial(positive_number, purpose="a run may take so long", example=1800))
    longest_work: float = setting(
        partial(positive_number, purpose="the times of a work may take so long", example=14400)
    )
    tolerance: float = setting(
        partial(positive_number, purpose="rounding alone sets hypergradients apart", example=1e-4)
    )


_READS = Reads(
    settings=(BenchmarkSettings,),
    blocks=("works.*", "sweeps.*.work"),
    entries=("sweeps.*.axis", "sweeps.*.size", "sweeps.*.values"),
)
_SHARE_OF_FREE_MEMORY = 0.8
_UNKNOWN_MEMORY = 2**33
_QUICK_SIZES = 2
_QUICK_ROUNDS = Rounds(repetitions=2, shortest=0.0, longest=5.0)


@hydra.main(version_base="1.3", config_path=str(MAIN_CONFIG.parent), config_name=MAIN_CONFIG.stem)
@failures.reported
def main(config: DictConfig) -> None:
    """Measures, prints and writes."""
    check_settings_are_read(config, _READS)
    own = parse(BenchmarkSettings, config)
    if own.threads is not None:
        torch.set_num_threads(own.threads)
    settings = measuring(own)
    # All of them before the first is run: a mistake in the last must not be found after hours.
    works = {str(name): _sized(build_work(config, f"works.{name}"), config) for name in config.works}
    sweeps = {str(name): build_sweep(config, str(name)) for name in config.sweeps}
    chosen = chosen_names(config, own.only)
    refuse_unknown_contestants(
        settings,
        [work for name, work in works.items() if name in chosen]
        + [work for name, sweep in sweeps.items() if name in chosen for work in sweep.works],
    )
    refuse_idle_settings(config, own, chosen)
    folder = open_folder(config, HydraConfig.get().overrides.task)
    console = Console()
    results = Results(folder=folder.path, header=header(config, settings), works=works, sweeps=sweeps, chosen=chosen)
    if folder.resumed and folder.results.is_file():
        results.go_on_from(folder.results)
        settings = replace(settings, memory_limit=results.header["memory_limit_bytes"])

    def say(text: str) -> None:
        console.print(f"  {text}", style="dim", highlight=False)

    for name, size, work in results.missing():
        title = work.title if size is None else f"{name}: {work.title}"
        console.print(f"\n{title}", markup=False, highlight=False)
        rows = measure(name, work, size, settings, say)
        if not rows:
            say("none of the contestants takes part")
            continue
        console.print(table_of_rows(rows))
        console.print(table_of_costs(rows))
        results.add(rows, folder.results)
    results.draw()
    results.write(folder.results)
    for name in results.measured_sweeps():
        console.print(table_of_growth(f"{name}: growth with {sweeps[name].axis}", results.exponents(name)))
    console.print("\n".join(["", *ratio_lines(results.ratios())]), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\neverything is in {folder.path}", markup=False, highlight=False, soft_wrap=True)


def measuring(own: BenchmarkSettings) -> Settings:
    """Returns how to measure."""
    free = available_bytes()
    rounds = Rounds(repetitions=own.repetitions, shortest=own.shortest_repetition, longest=own.longest_timing)
    return Settings(
        seed=own.seed,
        device=own.device,
        dtype=own.dtype,
        num_threads=own.threads,
        rounds=_QUICK_ROUNDS if own.quick else rounds,
        tolerance=own.tolerance,
        memory=own.memory,
        memory_limit=(
            own.memory_limit
            if own.memory_limit is not None
            else _UNKNOWN_MEMORY
            if free is None
            else int(_SHARE_OF_FREE_MEMORY * free)
        ),
        longest_run=own.longest_run,
        longest_work=own.longest_work,
        contestants=own.contestants,
    )


def refuse_unknown_contestants(settings: Settings, works: Sequence[Work]) -> None:
    """Raises if a contestant takes part in none of the works.

    Raises:
        ExpectedFailure: naming it.
    """
    known = list(dict.fromkeys(name for work in works for name in work.contestants()))
    for name in settings.contestants or ():
        if name not in known:
            raise ExpectedFailure(
                f"`contestants` names {name!r}, which takes part in none of the works. Choose from: {quoted(known)}. "
                f"What has a comma or a bracket needs double quotes: 'contestants=[higher,\"{variants.COMPILED}\"]'."
            )


def chosen_names(config: DictConfig, only: Sequence[str] | None) -> frozenset[str]:
    """Returns the names of the works and sweeps to run: all, or those that `only` names.

    Args:
        config: the configuration, for the names that there are.
        only: names of those wanted; None for all.

    Raises:
        ExpectedFailure: if `only` names others.
    """
    known = [str(name) for name in [*config.works, *config.sweeps]]
    for name in only or ():
        if name not in known:
            raise ExpectedFailure(
                f"`only` names {name!r}, which is neither a work nor a sweep. Choose from: {quoted(known)}."
            )
    return frozenset(known if only is None else only)


def refuse_idle_settings(config: DictConfig, own: BenchmarkSettings, chosen: Collection[str]) -> None:
    """Raises if a setting on the command line has no effect in this benchmark.

    Args:
        config: the configuration, whose works and sweeps have been built.
        own: the plain settings, parsed from it.
        chosen: names of the works and sweeps to run.

    Raises:
        ExpectedFailure: naming the setting, and what leaves it out.
    """
    for given in given_settings(config):
        part, _, rest = given.partition(".")
        name = rest.partition(".")[0]
        # What goes on with an earlier part repeats its settings, whatever it runs itself.
        if part in ("works", "sweeps") and name not in chosen and not own.resume:
            raise ExpectedFailure(
                f"`{given}` is given, but `only` leaves {name!r} out: it would have no effect. Name it in `only`, or "
                "leave the setting out."
            )
        if own.quick and (reason := _quick_leaves_out(config, given)):
            raise ExpectedFailure(
                f"`{given}` is given, but {reason}: it would have no effect. Leave it out, or `quick`."
            )
        if not own.memory and given in ("memory_limit", "longest_run"):
            raise ExpectedFailure(
                f"`{given}` is given, but `memory` is false, and it bounds nothing else: it would have no effect. "
                "Leave one of the two out."
            )


def _quick_leaves_out(config: DictConfig, given: str) -> str | None:
    """Returns why a setting has no effect with `quick=true`; None if it has one."""
    if given in ("repetitions", "shortest_repetition", "longest_timing"):
        return "`quick` takes rounds of its own"
    part, _, rest = given.partition(".")
    if part == "sweeps" and given.endswith(".values") and len(OmegaConf.select(config, given)) > _QUICK_SIZES:
        return f"`quick` takes the smallest {_QUICK_SIZES} of the sizes"
    block, _, size = given.rpartition(".")
    if part in ("works", "sweeps") and (part == "works" or ".work." in rest) and size != "_target_":
        work = build_work(config, block)
        if all(replace(work, **{size: other}).tiny() == work.tiny() for other in other_sizes(work, size)):  # type: ignore[type-var]
            return "`quick` takes a size of its own"
    return None


def build_sweep(config: DictConfig, name: str) -> Sweep:
    """Returns a sweep with its works, by ascending size.

    Raises:
        ExpectedFailure: if the work has no such size.
    """
    work = build_work(config, f"sweeps.{name}.work")
    size = str(config.sweeps[name].size)
    if size not in sizes(work):
        raise ExpectedFailure(
            f"`sweeps.{name}.size` is {size!r}, which is no size of {type(work).__name__}, so nothing would grow. Use "
            f"one of: {', '.join(sizes(work))}."
        )
    if size in config.sweeps[name].work:
        raise ExpectedFailure(
            f"`sweeps.{name}.work.{size}` is given, but a sweep takes its {size} from `sweeps.{name}.values`: it would "
            "have no effect. Leave it out."
        )
    values = ascending_lengths(config, f"sweeps.{name}.values")
    if config.quick:
        work, values = work.tiny(), values[:_QUICK_SIZES]
    return Sweep(axis=str(config.sweeps[name].axis), by_size={value: _resized(work, size, value) for value in values})


def header(config: DictConfig, settings: Settings) -> dict[str, Any]:
    """Returns what determines the numbers, for results.json, which adds the date."""
    shown = {key: value for key, value in OmegaConf.to_container(config, resolve=True).items() if key != "paths"}  # type: ignore[union-attr]
    return {
        "command": command("scripts/benchmark", HydraConfig.get().overrides.task),
        "versions": library_versions(),
        "machine": machine(settings.device),
        "memory_limit_bytes": settings.memory_limit,
        "settings": shown,
    }


def _sized(work: Work, config: DictConfig) -> Work:
    return work.tiny() if config.quick else work


def _resized(work: Any, size: str, value: int) -> Work:
    return replace(work, **{size: value})


if __name__ == "__main__":
    sys.exit(failures.exit_code(main))
