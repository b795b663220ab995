"""Whether the process that works on a trial still lives."""

from __future__ import annotations

import subprocess
import sys
import time

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage

from hypertorch.search import processes
from hypertorch.search.processes import Process


@pytest.fixture
def storage() -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = InMemoryStorage()
    optuna.create_study(storage=storage, study_name="search")
    return storage


def written(storage: BaseStorage, name: str, moment: float) -> None:
    storage.set_study_user_attr(0, f"process {name}", moment)


def one_more(storage: BaseStorage) -> Process:
    return Process(storage, 0)


def test_it_lives_within_its_block_only(storage: BaseStorage) -> None:
    one = Process(storage, 0)
    assert not one.is_alive(one.name)
    with one:
        assert one.is_first()
    with one_more(storage) as one, one_more(storage) as other:
        assert not one.is_first() and not other.is_first()
        assert one.is_alive(one.name) and one.is_alive(other.name)
        assert one.others() == [other.name]
    assert not one.is_alive(one.name) and one.others() == []


def test_a_process_that_was_killed_is_dead_at_once(storage: BaseStorage) -> None:
    with Process(storage, 0) as one:
        machine, _, _, mark = one.name.rsplit(" ", 3)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        name = " ".join((machine, str(child.pid), processes._started(child.pid), mark))
        written(storage, name, time.time())
        assert one.is_alive(name)
        child.kill()
        child.wait()
        child.stdin and child.stdin.close()
        assert not one.is_alive(name)


def test_a_number_that_is_used_again_is_another_process(storage: BaseStorage) -> None:
    with Process(storage, 0) as one:
        machine, number, started, mark = one.name.rsplit(" ", 3)
        if not started:
            pytest.skip("this system does not say when a process began")
        name = " ".join((machine, number, str(int(started) - 1), mark))
        written(storage, name, time.time())
        assert not one.is_alive(name)


def test_one_of_another_machine_lives_as_long_as_it_gives_signs(storage: BaseStorage) -> None:
    with Process(storage, 0) as one:
        name = "elsewhere pid:[1] 7 12 abcdefab"
        written(storage, name, time.time() - 50.0)
        assert one.is_alive(name)
        written(storage, name, time.time() - 70.0)
        assert not one.is_alive(name)


def test_it_gives_signs_of_life(storage: BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_BEAT", 0.01)
    with Process(storage, 0) as one:
        first = storage.get_study_user_attrs(0)[f"process {one.name}"]
        deadline = time.monotonic() + 10.0
        while storage.get_study_user_attrs(0)[f"process {one.name}"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
