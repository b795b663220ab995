"""Hydra's and OmegaConf's errors in this project's form: what was given, why it cannot work, what to do."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
_SHOW = "`--cfg job` shows every setting."
# Where Hydra refuses words with hyphens.
_HYDRA = Path(hydra.__file__).parent
_FLAGS = (_HYDRA / "main.py", _HYDRA / "_internal/hydra.py", _HYDRA / "_internal/utils.py")


def explain_config_error(error: HydraException | OmegaConfBaseException, main_config: Path) -> str:
    """Returns the message for a mistake in the configuration or on the command line.

    Args:
        error: what Hydra or OmegaConf raised.
        main_config: the command's main file, for the names of its settings.
    """
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        return (
            f"`{error.override}` is not of the form setting=value, so nothing can be set by it. Write for example "
            "seed=1 (quotes keep the shell from splitting a value); a value with brackets or commas in it needs double "
            f"quotes of its own: 'setting=\"a (b), c\"'. {_SHOW}"
        )
    if isinstance(error, MissingMandatoryValue):
        return (
            f"`{error.full_key}` is not given, and has no default: the command cannot go on without it. Add "
            f"{error.full_key}=... to the command."
        )
    if isinstance(error, InterpolationKeyError):
        return _broken_reference(error)
    if isinstance(error, OmegaConfBaseException):
        return (
            f"`{error.full_key or 'the configuration'}` cannot be resolved: {one_line(error)}. Correct the value it "
            f"is made from. {_SHOW}"
        )
    if isinstance(error, ConfigCompositionException):
        return _composition_error(error, main_config)
    return f"`the configuration` cannot be used: {one_line(error)}. Correct the setting it names. {_SHOW}"


def explain_group_value(error: ValueError) -> str | None:
    """Returns the message for a group that is given a number or null, None for any other error.

    Args:
        error: what Hydra raised, of a kind that it has no class for.
    """
    if not str(error).startswith("Config group override must be a string or a list"):
        return None
    given = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    for override in OverridesParser.create().parse_overrides(given):
        group, value = override.key_or_group, override.value()
        if not group:
            return (
                f"`{override.input_line}` has no name in front of the equals sign: nothing can be set by it. Write the "
                "name of a setting or of a group there."
            )
        if not isinstance(value, (str, list)) and (CONFIGS / group).is_dir():
            choices = ", ".join(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
            return (
                f"`{group}` is {value!r}, but a group is chosen by the name of one of its files: nothing can be read "
                f"from that. Choose one of: {choices}."
            )
    return None


def explain_flags(error: ValueError) -> str | None:
    """Returns the message for words with hyphens that Hydra does not take together; None if it is about another thing.

    Args:
        error: what Hydra raised, of a kind that it has no class for.
    """
    frames = traceback.extract_tb(error.__traceback__)
    flags = " ".join(word for word in sys.argv[1:] if word.startswith("-"))
    if not frames or not flags or Path(frames[-1].filename) not in _FLAGS:
        return None
    return f"`{flags}` cannot stand together or alone: {one_line(error)}. Leave one out, or see --help."


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or [])
    if not options:
        return (
            f"`{error.missing_cfg_file or 'the configuration'}` is not there: {one_line(error)}. Choose one of the "
            "files in configs/."
        )
    lacking = (
        "which is not installed" if group.startswith("hydra/") else f"of which there is no file in configs/{group}"
    )
    return (
        f"`{group}` is {choice!r}, {lacking}: it cannot be used. Choose one of: {', '.join(options)}."
        f"{_did_you_mean(choice, options)}"
    )


def _composition_error(error: ConfigCompositionException, main_config: Path) -> str:
    text = str(error)
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return unread_setting(unknown[1], _known_settings(main_config))
    if missing := re.match(r"Could not delete from config\. '([^']+)' does not exist", text):
        return (
            f"`~{missing[1]}` deletes what is not there, or is null already: nothing would change. Leave it out, or "
            f"give the setting a value. {_SHOW}"
        )
    if re.match(r"(Ambiguous value|Sweep parameters)", text):
        setting = re.findall(r"'([^']*)'", text)[0]
        return (
            f"`{setting}` gives several values, but a run has one for each setting. Add --multirun to run once for "
            "each, or write a list as setting=[value,value]."
        )
    if re.match(r"Multiple values for (\S+)\.", text):
        group = text.split()[3].rstrip(".")
        return (
            f"`+{group}=...` adds a second choice of `{group}`, which has one already: a run uses one. Write "
            f"{group}=... without the plus sign."
        )
    cause = f" ({one_line(error.__cause__)})" if error.__cause__ is not None else ""
    return (
        f"`{_first_quoted(text) or 'the command line'}` cannot be applied: {one_line(error)}{cause}. The "
        f"configuration would not be complete. Correct that setting. {_SHOW}"
    )


def unread_setting(key: str, known: list[str], *, reason: str | None = None) -> str:
    """Returns the message for a setting that nothing reads, with the ones there are and those that come close.

    Args:
        key: its dotted name.
        known: dotted names of the settings that are read.
        reason: what is wrong with it, up to the list of those beside it; None for what holds in general.
    """
    if key.split(".", maxsplit=1)[0] == "hydra":
        return f"`{key}` is no setting of Hydra: its value would have no effect. `--cfg hydra` shows every one of its."
    parent = key.rpartition(".")[0]
    while parent and not any(name.startswith(f"{parent}.") for name in known):
        parent = parent.rpartition(".")[0]
    start = f"{parent}." if parent else ""
    siblings = dict.fromkeys(name[len(start) :].split(".")[0] for name in known if name.startswith(start))
    where = f"The settings of `{parent}` are" if parent else "The settings and groups are"
    why = reason or f"is no setting of this command: its value would have no effect. {where}"
    return f"`{key}` {why}: {', '.join(sorted(siblings))}.{_did_you_mean(key, known)} {_SHOW}"


def setting_names(config: DictConfig) -> list[str]:
    """Returns the dotted names of all settings and blocks of a configuration."""
    return list(_names(config, ""))


def _broken_reference(error: InterpolationKeyError) -> str:
    missing = re.search(r"'([^']+)' not found", str(error))
    needed = missing[1] if missing else "another setting"
    return (
        f"`{error.full_key}` is taken from `{needed}`, which this choice of groups does not have: they do not fit "
        f"together. Choose another `{(error.full_key or '').split('.')[0]}` or `dataset`, or give {error.full_key}=... "
        "yourself."
    )


def _known_settings(main_config: Path) -> list[str]:
    """Returns the names of all settings of a command with the groups that are chosen on its command line."""
    chosen = _chosen_groups(sys.argv[1:])
    with initialize_config_dir(str(main_config.parent), version_base="1.3"):
        # Where a choice is wrong too, the experiment says which settings there are: one mistake is told at a time.
        for choices in (chosen, [word for word in chosen if word.startswith("experiment=")]):
            try:
                return setting_names(compose(main_config.stem, choices))
            except HydraException:
                continue
        return setting_names(compose(main_config.stem))


def _chosen_groups(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line that choose a group's file, the first one where several are to be tried."""
    chosen = []
    for word in words:
        name, is_setting, value = word.partition("=")
        if is_setting and (CONFIGS / name.lstrip("+").split("@")[0]).is_dir():
            chosen.append(f"{name}={value.split(',')[0]}")
    return chosen


def _names(config: DictConfig, prefix: str) -> Iterator[str]:
    for key in config:
        name = f"{prefix}{key}"
        value = config._get_node(key)
        yield name
        if isinstance(value, DictConfig) and not value._is_none():
            yield from _names(value, f"{name}.")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.7)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """Returns what a library says of an error, without what it says of its own insides."""
    # PyTorch adds the calls inside of its own library.
    said, _, _ = str(error).partition("\nException raised from ")
    lines = [line.strip() for line in said.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=", "See http")))[
        :300
    ].rstrip(".")


def _first_quoted(text: str) -> str | None:
    found = re.search(r"'([^']+)'", text)
    return found[1] if found else None
