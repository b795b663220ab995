"""What the README and the pages of docs/ show works: Python runs, commands compose, links lead somewhere."""

from __future__ import annotations

import csv
import importlib.util
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import experiments.common.runs.resolvers  # noqa: F401 (makes `${run_folder:}` known to the configs)
import hypertorch as ht
from tests.helpers import pages

ROOT = pages.ROOT
RESULTS = ROOT / "experiments" / "results"
MOST_LINES = 150
EXTENDING = "docs/extending.md"
SMALLER = {"num_outer_steps=100": "num_outer_steps=2", "num_episodes=100": "num_episodes=4"}
# They name files as they were called then.
OF_THE_PAST = {"docs/mutation-testing.md", "CHANGELOG.md"}
WITH_PYTHON = [page for page in pages.PAGES if pages.blocks(page, "python")]
COMMANDS = [(page, shlex.join(words)) for page in pages.PAGES for words in pages.commands(page)]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The blocks of a page are one program.
    namespace: dict[str, object] = {"__name__": "page"}
    for line, code in pages.blocks(page, "python"):
        for shown, small in SMALLER.items():
            code = code.replace(shown, small)
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + code, page, "exec", dont_inherit=True), namespace)


def test_walk_throughs_are_the_files_that_are_tested() -> None:
    """What the page shows is what passes the conformance tests, to the letter."""
    shown = [code for _, code in pages.blocks(EXTENDING, "python")]
    files = [path for path in sorted((ROOT / "tests" / "extending").glob("*.py")) if not path.stem.startswith("test_")]
    assert len(files) >= 5
    differing = [path.name for path in files if path.read_text(encoding="utf-8") not in shown]
    assert not differing, f"{EXTENDING} shows {differing} otherwise than tests/extending has them: copy them into it"


def test_choices_of_the_extending_page_compose(tmp_path: Path) -> None:
    """A YAML file of one's own is a choice, by its folder and name."""
    files = [code for _, code in pages.blocks(EXTENDING, "yaml")]
    assert files
    for code in files:
        group, name = Path(code.partition("\n")[0].removeprefix("# configs/")).with_suffix("").parts
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / f"{name}.yaml").write_text(code, encoding="utf-8")
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("train", [f"hydra.searchpath=[file://{tmp_path}]", f"{group}={name}"])
        assert config[group] == OmegaConf.create(code)


def test_there_is_something_to_run() -> None:
    assert {"README.md", "docs/concepts.md", "docs/few-shot.md", "docs/coming-from.md"} <= set(WITH_PYTHON)
    of_readme = {words[0] for words in pages.commands("README.md")}
    assert {"scripts/train", "scripts/test"} <= of_readme


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_exist_and_compose(page: str, command: str) -> None:
    words = shlex.split(command)
    config, arguments = None, words[1:]
    if words[0] == ".venv/bin/python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"there is no module {words[2]}"
        return
    if words[0] == ".venv/bin/python":
        config, arguments = Path(words[1]).stem, words[2:]
        assert (ROOT / words[1]).is_file(), f"{words[1]} is not in the repository"
    elif words[0].startswith(".venv/bin/"):
        assert (Path(sys.prefix) / "bin" / Path(words[0]).name).is_file(), f"the environment has no {words[0]}"
    else:
        config = Path(words[0]).name
        assert (ROOT / words[0]).is_file(), f"{words[0]} is not in the repository"
    if not (ROOT / "configs" / f"{config}.yaml").is_file() or any(word.startswith("--") for word in arguments):
        return
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert compose(config, arguments)


@pytest.mark.parametrize("page", pages.PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in pages.links(page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}, which is not in the repository"
        if anchor:
            found = pages.anchors(str(target.resolve().relative_to(ROOT)))
            assert anchor in found, f"{page} links to {link}, but the headings there are {sorted(found)}"


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page not in OF_THE_PAST])
def test_files_that_are_named_exist(page: str) -> None:
    missing = {path for path in pages.paths(page) if not (ROOT / path).exists()}
    assert not missing, f"{page} names {sorted(missing)}, which the repository does not have"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        linked = [(Path(page).parent / link.partition("#")[0]) for page in new for link in pages.links(page)]
        new = {str(path) for path in linked if str(path) in pages.PAGES} - reached
    assert reached == set(pages.PAGES)


def test_the_readme_is_short() -> None:
    assert len(pages.text("README.md").splitlines()) <= MOST_LINES


def accuracies() -> dict[str, tuple[str, str]]:
    """Returns accuracy and published figure of every experiment on 5-way 1-shot Omniglot, as committed."""
    with (RESULTS / "fewshot" / "table.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["learner"]: (row["accuracy (%)"], row["published (%)"])
            for row in csv.DictReader(file)
            if row["setting"] == "omniglot 5way 1shot"
        }


def test_accuracies_of_the_readme_are_those_of_the_result_files() -> None:
    committed = accuracies()
    shown = [row for row in pages.rows("README.md") if row[1].strip("`") in committed]
    assert len(shown) >= 4
    for _, experiment, *figures in shown:
        assert tuple(figures) == committed[experiment.strip("`")], experiment


def test_speed_in_the_readme_is_that_of_the_result_files() -> None:
    tables = sorted((ROOT / "benchmarks" / "results").rglob("ratios.md"))
    lines = [line for table in tables for line in table.read_text(encoding="utf-8").splitlines()[2:]]
    measured = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    shown = [row for row in pages.rows("README.md") if row[0] in {work for work, *_ in measured}]
    assert len(shown) >= 4
    for work, contestant, quantity, against, goal, ratio, reached in shown:
        assert [work, contestant, quantity, against, f"at most {goal}", ratio, reached] in measured, work


def test_the_source_distribution_holds_the_pages() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    included = settings.partition("[tool.hatch.build.targets.sdist]")[2].partition("]")[0]
    for page in (*pages.PAGES, "CITATION.cff"):
        assert f'"/{Path(page).parts[0]}"' in included, f"{page} is not in the source distribution"


def test_the_citation_names_this_version() -> None:
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation.version == ht.__version__
