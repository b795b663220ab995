import hashlib
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pooch
import pytest

from hypertorch.errors import DatasetError
from hypertorch.fewshot.datasets.download import OMNIGLOT_FILES, OMNIGLOT_URL, download_omniglot
from hypertorch.fewshot.datasets.omniglot_files import read_part
from tests.helpers.omniglot import SMALL_BACKGROUND, SMALL_EVALUATION, write_archive


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    """A web server on this machine: its folder, its address and the checksums of its files."""
    folder = tmp_path / "web"
    folder.mkdir()
    paths = [write_archive(folder, part) for part in (SMALL_BACKGROUND, SMALL_EVALUATION)]
    files = {path.name: "md5:" + hashlib.md5(path.read_bytes()).hexdigest() for path in paths}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}", files
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _quiet_pooch():
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("progress", [None, True, False])
def test_downloaded_archives_are_whole_and_readable(web, tmp_path, progress, capsys):
    folder, url, files = web
    options = {} if progress is None else {"progress": progress}
    paths = download_omniglot(tmp_path / "new", url=url, files=files, **options)
    assert [path.name for path in paths] == list(files)
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in paths)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(files)
    shown = capsys.readouterr().out
    assert ("images_background.zip" in shown) == (progress is not False)
    assert read_part(tmp_path / "new", SMALL_BACKGROUND, image_size=15, cache_dir=tmp_path / "c").shape == (
        5,
        4,
        15,
        15,
    )


def test_what_is_there_is_left_alone(web, tmp_path):
    _, url, files = web
    mine = tmp_path / "images_background.zip"
    mine.write_bytes(b"rebuilt")
    download_omniglot(tmp_path, url=url, files=files, progress=False)
    assert mine.read_bytes() == b"rebuilt"
    assert (tmp_path / "images_evaluation.zip").exists()


def test_a_wrong_checksum_leaves_nothing(web, tmp_path):
    _, url, _ = web
    wrong = {"images_background.zip": "md5:" + "0" * 32}
    with pytest.raises(
        DatasetError, match=r"`url` 'http.*images_background.zip' could not be downloaded.*hash.*Try again"
    ):
        download_omniglot(tmp_path / "new", url=url, files=wrong, progress=False)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_that_the_server_does_not_have(web, tmp_path):
    _, url, _ = web
    with pytest.raises(DatasetError, match=r"`url` .*other.zip' could not be downloaded.*404.*by other means"):
        download_omniglot(tmp_path, url=url, files={"other.zip": "md5:" + "0" * 32}, progress=False)


def test_no_server(tmp_path):
    with pytest.raises(DatasetError, match=r"could not be downloaded.*ConnectionError"):
        download_omniglot(tmp_path, url="http://127.0.0.1:9", progress=False)


def test_the_public_home_is_complete():
    assert OMNIGLOT_URL.startswith("https://")
    assert set(OMNIGLOT_FILES) == {"images_background.zip", "images_evaluation.zip"}
    assert all(re.fullmatch(r"md5:[0-9a-f]{32}", checksum) for checksum in OMNIGLOT_FILES.values())
