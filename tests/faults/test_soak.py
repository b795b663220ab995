"""The long runs know every backend, every linear solver and every choice between ways."""

from __future__ import annotations

import inspect
from dataclasses import fields

import hypertorch as ht
from tests.faults.soak import COMPILED, FAMILIES

BACKENDS = {made.backend for made in (loop() for loop in {**FAMILIES, **COMPILED}.values()) if hasattr(made, "backend")}


def test_every_backend_and_every_choice_of_its_ways_runs_long() -> None:
    missing = set()
    for kind in vars(ht.hypergradients).values():
        if not (inspect.isclass(kind) and issubclass(kind, ht.Hypergradient)) or inspect.isabstract(kind):
            continue
        own = [backend for backend in BACKENDS if type(backend) is kind]
        if not own:
            missing.add(kind.__name__)
        for field in fields(kind):
            # A number changes no way; a switch, a word and what is None by default do.
            is_choice = field.default is None or isinstance(field.default, bool | str)
            if is_choice and all(getattr(backend, field.name) == field.default for backend in own):
                missing.add(f"{kind.__name__}.{field.name}")
    assert not missing


def test_every_linear_solver_runs_long() -> None:
    used = {type(backend.solver) for backend in BACKENDS if isinstance(backend, ht.hypergradients.Implicit)}
    exported = [getattr(ht.linear_solvers, name) for name in ht.linear_solvers.__all__]
    solvers = {one for one in exported if inspect.isclass(one) and issubclass(one, ht.linear_solvers.LinearSolver)}
    assert {solver for solver in solvers if not inspect.isabstract(solver)} <= used
