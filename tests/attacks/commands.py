"""Runs a command in this process, as it would be typed, for the tables of attacks."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from experiments import train
from experiments.common.commands.failures import ExpectedFailure


def typed(folder: Path, *words: str, module: ModuleType = train) -> str:
    """Returns what a command wrote, if it took its input.

    Args:
        folder: where it is typed.
        words: what stands behind the name of the program.
        module: the program.

    Raises:
        ExpectedFailure: with the message, if it refused it as a command is to: in one line, without a traceback.
        AssertionError: with what it wrote, if it failed in another way.
    """
    name, before = module.__name__.rpartition(".")[2], (sys.argv, Path.cwd(), os.environ.get("HYDRA_FULL_ERROR"))
    error, output = io.StringIO(), io.StringIO()
    GlobalHydra.instance().clear()
    try:
        sys.argv = [f"{name}.py", *words]
        os.chdir(folder)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(output):
            code = module.failures.exit_code(module.main)
    except SystemExit as ended:  # by Hydra's own parser of words that begin with a hyphen
        code = ended.code
    except Exception:  # noqa: BLE001 (whatever it is, it would be a traceback)
        raise AssertionError(f"a traceback: {traceback.format_exc()[-600:]}") from None
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        if before[2] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[2]
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    text = error.getvalue()
    if code == 0:
        return f"taken: {text[-200:]}"
    lines = re.findall(r"^error: .*$", text, flags=re.MULTILINE)
    if len(lines) != 1 or "Traceback" in text or not text.endswith(f"{lines[0]}\n"):
        raise AssertionError(f"exit code {code} and no single line of an error: {text[-600:]}")
    raise ExpectedFailure(lines[0].removeprefix("error: "))
