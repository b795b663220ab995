"""Which settings a command reads: what nothing reads is refused, however it got into the configuration.

Hydra refuses a setting that no file has, but takes any with a plus sign, and keeps those of parts that a run does not
build. A setting is read if it is

- a plain one: a field of the dataclasses of settings that the command parses,
- in a block that the run builds, where the class takes it as an argument, or
- referred to: another value of it changes one of the above.
"""

from __future__ import annotations

import copy
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.common.commands.config_errors import CONFIGS, setting_names, unread_setting
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.typed_settings import setting_keys

_ANOTHER_VALUE = "another value"
_SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def _never_idle(config: DictConfig, key: str) -> str | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What a command or an experiment reads of the configuration; `|` joins two.

    Args:
        settings: dataclasses whose fields are the plain settings.
        blocks: dotted names of what becomes an object, or patterns of such names (`*` for one name).
        idle: `(configuration, dotted name)` to the reason why that setting has no effect in this run, None if it may
            have one.
        own: settings within blocks that the command reads itself, no arguments of a class.
        entries: patterns of the settings of tables that can be added to.
        tables: names of tables that the project's files keep for others to refer to; no run refers to all of one.
    """

    settings: tuple[type, ...] = ()
    blocks: tuple[str, ...] = ()
    idle: Callable[[DictConfig, str], str | None] = _never_idle
    own: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    def __or__(self, other: Reads) -> Reads:
        """Returns what both read."""

        def idle(config: DictConfig, key: str) -> str | None:
            return self.idle(config, key) or other.idle(config, key)

        return Reads(
            settings=(*self.settings, *other.settings),
            blocks=(*self.blocks, *other.blocks),
            idle=idle,
            own=(*self.own, *other.own),
            entries=(*self.entries, *other.entries),
            tables=(*self.tables, *other.tables),
        )

    def plain(self) -> set[str]:
        """Returns the names of the plain settings, with those that say where a command writes."""
        places = (name for name, _ in _leaves(OmegaConf.load(CONFIGS / "paths/default.yaml")))
        declared = {name for kind in self.settings for name in setting_keys(kind)}
        return {"task_name", *declared, *(name for name in places if not name.startswith("hydra."))}

    def block_of(self, key: str) -> str | None:
        """Returns the name of the innermost block that a setting is in, or is; None if it is in none."""
        parts = key.split(".")
        names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((name for name in names if _is_one_of(name, self.blocks)), None)

    def is_built(self, block: str, config: DictConfig) -> bool:
        """Returns whether a run of this configuration builds a block."""
        return self.idle(config, block) is None

    def is_entry(self, key: str) -> bool:
        """Returns whether a setting belongs to a table that can be added to."""
        return _is_one_of(key, self.entries)


def check_settings_are_read(config: DictConfig, reads: Reads) -> None:
    """Checks that everything in the configuration of this Hydra job is read.

    Args:
        config: the configuration.
        reads: what the command reads.

    Raises:
        ExpectedFailure: naming the setting that is not, and the ones there are.
    """
    hydra = HydraConfig.get()
    parser = OverridesParser.create()
    overrides = parser.parse_overrides(list(hydra.overrides.task))
    known_of_hydra = OmegaConf.structured(HydraConf)
    for override in parser.parse_overrides(list(hydra.overrides.hydra)):
        _check_hydra_has(known_of_hydra, override.key_or_group)
    groups = [override for override in overrides if override.get_key_element().lstrip("+~") in hydra.runtime.choices]
    given = [item.key_or_group for item in overrides if item not in groups and not item.is_delete()]
    for override in overrides:
        if override.is_delete():
            _check_deletion(config, override, reads)
    for override in groups:
        _check_is_built(config, override.package or override.key_or_group, reads)
    plain = reads.plain()
    before = _what_is_read(config, reads, plain)
    unread: list[str] = []
    for name, _ in _leaves(config):
        is_given = any(_is_in(name, key) for key in given)
        if is_given:
            _check_is_built(config, name, reads)
        if not _is_read(config, name, reads, plain, before, is_given=is_given):
            unread.append(name)
    if unread:
        known = [name for name in setting_names(config) if not any(_is_in(key, name) for key in unread)]
        # Of a table, it may be one that another choice refers to.
        of_a_table = unread[0].split(".")[0] in reads.tables
        is_added = all(
            item.is_add() or item.is_force_add() for item in overrides if _is_in(unread[0], item.key_or_group)
        )
        reason = "is referred to by nothing that this run builds: its value would have no effect. It uses"
        raise ExpectedFailure(unread_setting(unread[0], known, reason=reason if of_a_table and not is_added else None))
    for key in dict.fromkeys(reads.block_of(name) for name, _ in _leaves(config)):
        block = None if key is None else OmegaConf.select(config, key)
        if key is not None and isinstance(block, DictConfig):
            check_arguments(block, key, skipped=reads.own)


def given_settings(config: DictConfig) -> list[str]:
    """Returns the dotted names of the settings that the command line of this Hydra job gives a value.

    Args:
        config: the configuration of the job.
    """
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    keys = [item.key_or_group for item in overrides if not item.is_delete()]
    return [name for name, _ in _leaves(config) if any(_is_in(name, key) for key in keys)]


def check_arguments(block: DictConfig, key: str, *, skipped: tuple[str, ...] = ()) -> None:
    """Checks that the class or function that a block names takes its settings, and so for the blocks within.

    Args:
        block: the block.
        key: its dotted name.
        skipped: dotted names of settings that are no arguments.

    Raises:
        ExpectedFailure: naming the one that it does not take, and those that it takes.
    """
    taken = _arguments_of(block.get("_target_"))
    for name in block:
        full = f"{key}.{name}"
        if full in skipped or name in _SPECIAL:
            continue
        if taken is not None and name not in taken:
            target = str(block["_target_"]).rpartition(".")[2]
            raise ExpectedFailure(
                unread_setting(
                    full,
                    [f"{key}.{one}" for one in taken],
                    reason=f"is no argument of {target}, so it would have no effect. It takes",
                )
            )
        for inner, value in _inner_blocks(block, str(name), full):
            check_arguments(value, inner)


def _is_read(
    config: DictConfig, name: str, reads: Reads, plain: set[str], before: Mapping[str, Any], *, is_given: bool
) -> bool:
    if name in plain or reads.is_entry(name) or reads.block_of(name) is not None:
        return True
    if name.split(".", maxsplit=1)[0] in reads.tables and not is_given:
        return True
    changed = copy.deepcopy(config)
    OmegaConf.update(changed, name, _ANOTHER_VALUE, merge=False, force_add=True)
    try:
        return _what_is_read(changed, reads, plain) != before
    except OmegaConfBaseException:
        return True


def _what_is_read(config: DictConfig, reads: Reads, plain: set[str]) -> dict[str, Any]:
    """Returns every value that the run reads, resolved, by name."""
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    values: dict[str, Any] = {}
    for name, value in _leaves(resolved):
        block = reads.block_of(name)
        if name in plain if block is None else reads.is_built(block, config):
            values[name] = value
    return values


def _check_is_built(config: DictConfig, key: str, reads: Reads) -> None:
    block = reads.block_of(key)
    reason = reads.idle(config, key) or (None if block is None else reads.idle(config, block))
    if reason is not None:
        raise ExpectedFailure(f"`{key}` is given, but {reason}")


def _check_hydra_has(known: Any, key: str) -> None:
    """Refuses settings of Hydra itself that it does not know; what it hands to plugins, those check."""
    for name in key.split(".")[1:]:
        if not (isinstance(known, DictConfig) and known._metadata.object_type not in (dict, None)):
            return
        if name not in known.keys():  # noqa: SIM118 (a value that is missing is not in it)
            raise ExpectedFailure(unread_setting(key, []))
        known = known._get_node(name)


def _check_deletion(config: DictConfig, override: Override, reads: Reads) -> None:
    key = override.key_or_group
    _check_is_built(config, key, reads)
    if reads.block_of(key) is None and not reads.is_entry(key) and not (CONFIGS / key).is_dir():
        raise ExpectedFailure(
            f"`~{key}` deletes a setting that the command reads: what it should do without is not known. Give it "
            f"another value, such as {key}=null, or leave this out."
        )


def _arguments_of(target: object) -> list[str] | None:
    """Returns the names of the arguments that a target takes; None if it takes any, or that cannot be said."""
    try:
        parameters = inspect.signature(pkgutil.resolve_name(str(target))).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):  # building it says what is wrong
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.name not in ("self", "_")]


def _inner_blocks(block: DictConfig, name: str, key: str) -> Iterator[tuple[str, DictConfig]]:
    """Yields the blocks with a target in a setting, however deep in dicts and lists."""
    if OmegaConf.is_missing(block, name):
        return
    yield from _blocks_in(block[name], key)


def _blocks_in(value: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(value, DictConfig) and "_target_" in value:
        yield key, value
    elif isinstance(value, DictConfig):
        for name in value:
            yield from _inner_blocks(value, str(name), f"{key}.{name}")
    elif OmegaConf.is_list(value):
        for position, item in enumerate(value):
            yield from _blocks_in(item, f"{key}.{position}")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every setting that holds no others, with its value as it is written."""
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation() and len(node):
            yield from _leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", node._value() if node is not None else None


def _is_in(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.count(".") == pattern.count(".") and fnmatchcase(name, pattern) for pattern in patterns)
