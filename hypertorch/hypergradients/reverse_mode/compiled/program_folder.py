"""Where programs are kept on disk, for the next process."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

import platformdirs

from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError

# Where PyTorch keeps programs; it sets the variable itself when its compiler is loaded.
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_PROGRAMS = "hypertorch-programs"


def keep_in_cache_of_user() -> None:
    """Lets programs be kept in the user's own cache folder, for the next process.

    PyTorch's choice is a folder for temporary files: many systems empty it when they start, and all users share it,
    although what lies there is run. The folder of an environment variable or of an earlier compilation stays. Where
    there is no cache folder to write to, it is one for temporary files that only this user may write to.

    Raises:
        NotCompilableError: if somebody else may write to it.
    """
    if FOLDER in os.environ:
        return
    own = f"{_PROGRAMS}-{os.getuid()}" if hasattr(os, "getuid") else _PROGRAMS
    for folder in (platformdirs.user_cache_path("hypertorch") / "programs", Path(tempfile.gettempdir()) / own):
        if not _is_one_word(str(folder)):
            continue
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_private = _is_private(folder)
        except OSError:  # no folder to write to
            continue
        if not is_private:
            raise NotCompilableError(
                f"programs are kept in '{folder}', which another user owns or may write to, and what lies there is "
                f"run. Delete that folder, or set `{FOLDER}` to one of your own"
            )
        os.environ[FOLDER] = str(folder)
        return


def refuse_folder() -> None:
    """Raises `NotCompilableError` for a folder of programs whose path a C++ compiler would not be called with."""
    folder = os.environ.get(FOLDER, "")
    if folder and not _is_one_word(folder):
        raise NotCompilableError(
            f"programs are kept in '{folder}', and PyTorch cannot call a C++ compiler with blanks or quotes in a path. "
            f"Set `{FOLDER}` to another folder"
        )


def _is_one_word(path: str) -> bool:
    """Returns whether PyTorch, which splits its commands as a shell does, leaves a path whole."""
    try:
        return shlex.split(path) == [path]
    except ValueError:  # a quote alone
        return False


def _is_private(folder: Path) -> bool:
    """Returns whether a folder belongs to this user, and nobody else may write to it."""
    if not hasattr(os, "getuid"):
        return True
    found = folder.stat()
    # A link of a stranger could lead elsewhere tomorrow.
    return found.st_uid == folder.lstat().st_uid == os.getuid() and not found.st_mode & 0o022
