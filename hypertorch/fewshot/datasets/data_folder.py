"""The folder that a data set is read from: the argument, or what the environment says."""

from __future__ import annotations

import os
from pathlib import Path

from hypertorch.errors import DatasetError

_ADVICE = "Pass the path of the folder: `root=...`, or `dataset.root=...` on the command line."


def data_folder(root: str | Path | None) -> Path | None:
    """Returns the folder that `root` names, or HYPERTORCH_DATA where it is None; None if neither names one.

    Raises:
        TypeError: if `root` is no path.
        DatasetError: if the system cannot look up such a path.
    """
    if root is not None and (not isinstance(root, (str, os.PathLike)) or isinstance(os.fspath(root), bytes)):
        raise TypeError(f"`root` is {root!r}, a {type(root).__name__}: it says where the data is. {_ADVICE}")
    given = os.environ.get("HYPERTORCH_DATA") if root is None else root
    if not given:
        return None
    try:
        folder = Path(given).expanduser()
        folder.exists()
    # A user that there is not is a RuntimeError, a zero byte a ValueError, and a name that is too long an OSError.
    except (OSError, RuntimeError, ValueError) as error:
        raise DatasetError(
            f"`root` is {str(given)[:200]!r}, which cannot be looked up ({str(error)[:200]}): no folder has such a "
            f"path. {_ADVICE}"
        ) from error
    return folder
