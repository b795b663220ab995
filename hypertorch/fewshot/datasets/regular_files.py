"""Files of a data set, looked at before they are opened: a pipe would be waited for, a device read without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hypertorch.errors import DatasetError


def check_regular(file: Path) -> os.stat_result:
    """Returns the status of a file that can be read.

    Raises:
        DatasetError: if it is a link to nothing, empty, or no file (a folder, a pipe, a socket, a device).
    """
    try:
        status = file.stat()
    # A link in a circle, or a name that is too long, is an OSError; a zero byte in a name is a ValueError.
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"`root` has {str(file)!r}, which cannot be read ({error}): it is missing, or is a link to a file that is "
            "gone. Restore that file, or remove what refers to it."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(
            f"`root` has {str(file)!r}, which is no regular file but {_kind(status.st_mode)}: it has no content of its "
            "own. Put a copy of the file in its place, or remove it."
        )
    if not status.st_size:
        raise DatasetError(
            f"`root` has {str(file)!r}, which is an empty file: its copying was cut off. Copy it again, or remove it."
        )
    return status


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
