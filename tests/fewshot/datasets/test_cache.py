import os
import sys
from pathlib import Path

import numpy as np
import pytest

from hypertorch.fewshot.datasets.cache import cached_array, default_cache_dir


class Maker:
    def __init__(self, value=5):
        self.array = np.full((3, 4, 4), value, dtype=np.uint8)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.array


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_the_second_call_reads(tmp_path):
    maker = Maker()
    first = cached_array("a", "key", maker, tmp_path / "new")
    second = cached_array("a", "key", maker, tmp_path / "new")
    assert maker.calls == 1
    assert second.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
    assert only_file(tmp_path / "new").suffix == ".safetensors"


def test_another_key_is_made_anew(tmp_path):
    cached_array("a", "key 1", Maker(1), tmp_path)
    assert cached_array("a", "key 2", Maker(2), tmp_path)[0, 0, 0] == 2


def test_a_file_under_the_wrong_name_is_not_trusted(tmp_path):
    cached_array("a", "key 1", Maker(1), tmp_path)
    stale = only_file(tmp_path).read_bytes()
    cached_array("a", "key 2", Maker(2), tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(stale)
    assert cached_array("a", "key 2", Maker(2), tmp_path)[0, 0, 0] == 2


def test_no_damage_goes_unnoticed(tmp_path):
    expected = cached_array("a", "key", Maker(), tmp_path)
    path = only_file(tmp_path)
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 4, 20, len(whole) - 1)]
    damaged += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 3)]
    for content in damaged:
        path.write_bytes(content)
        maker = Maker()
        np.testing.assert_array_equal(cached_array("a", "key", maker, tmp_path), expected)
        assert maker.calls == 1
        np.testing.assert_array_equal(cached_array("a", "key", maker, tmp_path), expected)
        assert maker.calls == 1  # mended


def test_an_error_while_making_leaves_no_file(tmp_path):
    def fail():
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        cached_array("a", "key", fail, tmp_path)
    assert list(tmp_path.iterdir()) == []


def data_set(folder):
    return cached_array("a", "key", Maker(), folder)


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.warns(UserWarning, match=r"`cache_dir` .*file' cannot be written .*Pass a `cache_dir`") as caught:
        array = data_set(occupied)
    assert array[0, 0, 0] == 5
    # The line that asks for the data set, and not one inside of it.
    assert caught[0].filename == __file__
    assert caught[0].lineno != data_set.__code__.co_firstlineno + 1


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="cannot be written .no space left"):
        data_set(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is a Linux convention")
def test_the_default_follows_the_operating_system(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert default_cache_dir() == tmp_path / "hypertorch"
    cached_array("a", "key", Maker())
    assert only_file(tmp_path / "hypertorch").name.startswith("a-")
