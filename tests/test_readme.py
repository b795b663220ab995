"""What the README shows works: its Python runs, its commands compose, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments.resolvers  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# Blocks of one section are one program.
PYTHON = {
    section.splitlines()[0]: blocks
    for section in TEXT.split("\n## ")
    if (blocks := re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
}
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SMALLER = {"num_outer_steps=100": "num_outer_steps=2", "num_episodes=100": "num_episodes=4"}


@pytest.mark.parametrize("section", PYTHON)
def test_python_runs(section: str) -> None:
    namespace: dict[str, object] = {}
    for code in PYTHON[section]:
        for shown, small in SMALLER.items():
            code = code.replace(shown, small)
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace


def test_there_is_something_to_run() -> None:
    assert len(PYTHON) >= 3
    assert {"scripts/train", "scripts/test"} <= {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_and_compose(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert (ROOT / program).is_file(), f"{program} is not in the repository"
    if program != "scripts/train" or any(argument.startswith("--") for argument in arguments):
        return
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert compose("train", arguments)
