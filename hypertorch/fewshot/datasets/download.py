"""Downloads with a checksum, from a data set's public home."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pooch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from hypertorch.errors import DatasetError

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
# MD5 as published with torchvision's loader; they are of the official archives, not of rebuilt ones. MD5 notices damage
# alone; that nobody has replaced a file rests on HTTPS.
OMNIGLOT_FILES = {
    "images_background.zip": "md5:68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "md5:6b91aef0f799c5bb55b94e3f2daec811",
}


def download_omniglot(
    root: str | Path,
    *,
    progress: bool = True,
    url: str = OMNIGLOT_URL,
    files: Mapping[str, str] = OMNIGLOT_FILES,
) -> tuple[Path, ...]:
    """Downloads the archives of Omniglot that `root` does not have yet, and returns the paths of all.

    A file appears under its name only when it is complete and its checksum is right. What is there already is left
    alone and not compared with the checksum: archives rebuilt from the official files serve as well.

    Args:
        root: folder for the archives; made if needed.
        progress: shows a bar per file.
        url: folder on the web that holds the files.
        files: checksum of each file, as `"md5:..."` or `"sha256:..."`.

    Raises:
        DatasetError: if the server cannot be reached, a checksum is wrong, or `root` cannot be written.
    """
    folder = Path(root).expanduser()
    return tuple(_fetch(folder / name, f"{url}/{name}", checksum, progress) for name, checksum in files.items())


def _fetch(path: Path, url: str, checksum: str, progress: bool) -> Path:
    if path.is_file():
        return path
    try:
        with _DownloadBar(path.name, hidden=not progress) as bar:
            # pooch accepts any bar and calls its downloaders by position; its annotations do not say so.
            downloader: Any = pooch.HTTPDownloader(progressbar=cast("bool", bar))
            pooch.retrieve(url, checksum, path.name, path.parent, downloader=downloader)
    except (OSError, ValueError) as error:  # network and disk are OSError, a wrong checksum is ValueError
        raise DatasetError(
            f"`url` {url!r} could not be downloaded to {str(path)!r} ({type(error).__name__}: {error}): without it the "
            f"data set is incomplete. Try again, or fetch {path.name!r} by other means into that folder."
        ) from error
    return path


class _DownloadBar:
    """A rich bar in the form that pooch drives: it sets `total` and calls `update`, `reset` and `close`."""

    def __init__(self, name: str, *, hidden: bool) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        self._progress = Progress(*columns, disable=hidden)
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> _DownloadBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def total(self) -> float | None:
        """Size of the file (unit: bytes)."""
        return self._progress.tasks[0].total

    @total.setter
    def total(self, value: float) -> None:
        self._progress.update(self._task, total=value)

    def update(self, amount: float) -> None:
        """Adds `amount` bytes to what has arrived."""
        self._progress.update(self._task, advance=amount)

    def reset(self) -> None:
        """Starts the bar again; pooch then adds the whole size once more."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Does nothing: the bar ends with the `with` block."""
