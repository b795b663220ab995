"""The mutants: every single change of the library that can be seen when it runs."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from omegaconf import OmegaConf
from parso.tree import NodeOrLeaf

from scripts.mutation.operators import Span, operators

PACKAGE = "hypertorch"
# Names whose statements only a type checker reads.
_FOR_READERS = ("__all__", "__slots__", "TypeAlias", "TypeVar", "ParamSpec")
_ALIASES = ("Callable[", "Mapping[", "Literal[", "dict[", "tuple[", "Union[")
# `zip(..., strict=True)` is an assertion about the code around it; another `device` shows only where there is a second.
_UNSEEN_ARGUMENTS = ("strict", "device")
_WITHOUT_EFFECT = ("@override", "@final", "@overload")
_SPEAKING = ("warnings.warn(", "_logger.", "logger.")

Place: TypeAlias = tuple[Span, str, int]
"""Where, by which operator, and which of the operator's places in the file it is."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One small error.

    Attributes:
        path: of the file, from the root of the checkout.
        function: the qualified name of the function or class around it; empty at the module's level.
        operator: what makes it.
        occurrence: the number of the operator's places in the file before it.
        first_line: of the statement that is changed, counted from 1.
        last_line: of it.
        at_import: whether it runs when the module is imported: outside of the body of any function.
        old: the changed lines as they are.
        new: the changed lines as they become.
    """

    path: str
    function: str
    operator: str
    occurrence: int
    first_line: int
    last_line: int
    at_import: bool
    old: str
    new: str

    @property
    def folder(self) -> str:
        """The folder that its results are counted under."""
        parts = Path(self.path).parts
        return parts[1] if len(parts) > 2 else "core"

    @property
    def place(self) -> str:
        """The file and the line, as editors open them."""
        return f"{self.path}:{self.first_line}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is, wherever its lines move to."""
        return self.path, self.function, self.old, self.new

    def code(self, source: str) -> str:
        """Returns the file with the error."""
        changed = mutate_code(source, operators()[self.operator], self.occurrence)
        assert changed is not None
        return changed

    def as_dict(self) -> dict[str, Any]:
        """Returns its fields by name."""
        return asdict(self)

    def diff(self) -> str:
        """Returns the changed lines."""
        lines = [f"- {line}" for line in self.old.splitlines()] + [f"+ {line}" for line in self.new.splitlines()]
        return "\n".join(lines)


def draw(root: Path, folders: list[str], *, seed: int, count: int) -> list[Mutant]:
    """Returns some of all mutants, each as likely as any other, in the order that they were drawn in.

    The order is that of a digest of the seed and the place: elsewhere the code may change, and the draw stays.
    """
    everything = [(rank, path, *place) for path in sources(root, folders) for rank, place in _ranked(root, path, seed)]
    drawn: dict[tuple[str, str], Mutant] = {}
    for _, path, span, operator, occurrence in sorted(everything):
        if len(drawn) == count:
            break
        made = make(root, path, span, operator, occurrence)
        if made is not None:
            mutant, meaning = made
            drawn.setdefault((path, meaning), mutant)
    return list(drawn.values())


def _ranked(root: Path, path: str, seed: int) -> Iterator[tuple[bytes, Place]]:
    """Yields the places of a file, each with what it is sorted by: made of its line's text, not of its number."""
    source = (root / path).read_text()
    lines = source.splitlines()
    alike: Counter[tuple[str, str, int]] = Counter()
    for span, operator, occurrence in places(source):
        row, column = span[0]
        where = (lines[row - 1], operator, column)
        alike[where] += 1
        yield hashlib.sha256(repr((seed, path, where, alike[where])).encode()).digest(), (span, operator, occurrence)


def sources(root: Path, folders: list[str]) -> list[str]:
    """Returns the files of the folders, from the root of the checkout; "core" are those of the package's root."""
    found: list[str] = []
    for folder in folders:
        pattern = "*.py" if folder == "core" else f"{folder}/**/*.py"
        found += [str(path.relative_to(root)) for path in (root / PACKAGE).glob(pattern)]
    return sorted(found)


def places(source: str) -> list[Place]:
    """Returns what can be changed in a file: where, by which operator, and which of the operator's places it is."""
    tree = parso.parse(source)
    nodes = list(ast_nodes(tree))
    ignored = list(_ignored(nodes))
    found: list[Place] = []
    for name, operator in operators().items():
        # Numbered as cosmic-ray counts them.
        for occurrence, span in enumerate(span for node in nodes for span in operator.mutation_positions(node)):
            if not any(first <= span[0] and span[1] <= last for first, last in ignored):
                found.append((span, name, occurrence))
    return sorted(found)


def make(root: Path, path: str, span: Span, operator: str, occurrence: int) -> tuple[Mutant, str] | None:
    """Returns a mutant and what its code means; None if the change is no code or means what was there."""
    source = (root / path).read_text()
    code = mutate_code(source, operators()[operator], occurrence) or ""
    try:
        meaning = ast.dump(ast.parse(code))
    except SyntaxError:
        return None
    if meaning == ast.dump(ast.parse(source)):
        return None
    old, new = _changed_lines(source, code)
    tree = parso.parse(source)
    first, last = _statement(tree, span)
    mutant = Mutant(
        path=path,
        function=_function(tree, span),
        operator=operator,
        occurrence=occurrence,
        first_line=first,
        last_line=last,
        at_import=_is_at_import(tree, span),
        old=old,
        new=new,
    )
    return mutant, meaning


def equivalents(file: Path) -> dict[tuple[str, str, str, str], str]:
    """Returns why a mutant changes nothing that a test could see, by file, function, old and new lines."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(file))
    return {
        (entry["file"], entry["function"] or "", entry["old"].strip(), entry["new"].strip()): entry["why"]
        for entry in entries
    }


def digest(root: Path, paths: list[str]) -> str:
    """Returns what files come to, names and contents."""
    sums = hashlib.sha256()
    for path in sorted(paths):
        sums.update(path.encode())
        sums.update((root / path).read_bytes())
    return sums.hexdigest()[:16]


def _ignored(nodes: list[NodeOrLeaf]) -> Iterator[Span]:
    """Yields the places whose changes nobody sees at run time, or that are the words of an error or warning."""
    for node in nodes:
        kind = node.type
        if kind == "annassign":
            yield node.children[1].start_pos, node.children[1].end_pos
        elif kind in ("param", "funcdef") and node.annotation is not None:
            yield node.annotation.start_pos, node.annotation.end_pos
        elif (
            _is_for_readers(node)
            or _is_star(node)
            or (kind == "argument" and _code(node.children[0]) in _UNSEEN_ARGUMENTS)
        ):
            yield node.start_pos, node.end_pos
        elif kind == "raise_stmt" or (kind in ("atom_expr", "power") and _code(node).startswith(_SPEAKING)):
            texts = [leaf for leaf in ast_nodes(node) if leaf.type in ("fstring", "strings")]
            yield from ((text.start_pos, text.end_pos) for text in texts)


def _is_for_readers(node: NodeOrLeaf) -> bool:
    """Returns whether only a type checker reads a statement."""
    if node.type == "expr_stmt":
        return any(word in _code(node) for word in _FOR_READERS) or _code(node.children[-1]).startswith(_ALIASES)
    if node.type == "if_stmt":
        return _code(node.children[1]) == "TYPE_CHECKING"
    return node.type == "decorator" and _code(node).strip() in _WITHOUT_EFFECT


def _is_star(node: NodeOrLeaf) -> bool:
    """Returns whether a node is the star before parameters that are given by name, which multiplies nothing."""
    return node.type == "operator" and node.parent is not None and node.parent.type == "parameters"


def _code(node: NodeOrLeaf) -> str:
    return node.get_code(include_prefix=False)


def _changed_lines(source: str, code: str) -> tuple[str, str]:
    """Returns the lines that differ, before and after."""
    lines = list(difflib.ndiff(source.splitlines(), code.splitlines()))
    old = "\n".join(line[2:].strip() for line in lines if line.startswith("- "))
    new = "\n".join(line[2:].strip() for line in lines if line.startswith("+ "))
    return old, new


def _function(tree: NodeOrLeaf, span: Span) -> str:
    node: NodeOrLeaf | None = tree.get_leaf_for_position(span[0], include_prefixes=True)
    names: list[str] = []
    while node is not None:
        if node.type in ("funcdef", "classdef"):
            names.append(node.name.value)
        node = node.parent
    return ".".join(reversed(names))


def _is_at_import(tree: NodeOrLeaf, span: Span) -> bool:
    node: NodeOrLeaf = tree.get_leaf_for_position(span[0], include_prefixes=True)
    while node.parent is not None:
        if node.parent.type == "funcdef" and node is node.parent.children[-1]:
            return False
        node = node.parent
    return True


def _statement(tree: NodeOrLeaf, span: Span) -> tuple[int, int]:
    """Returns the first and the last line of the statement around a place; of a compound one, of its head."""
    heads = ("if_stmt", "while_stmt", "for_stmt", "with_stmt", "try_stmt", "funcdef", "classdef")
    node: NodeOrLeaf | None = tree.get_leaf_for_position(span[0], include_prefixes=True)
    while node is not None and node.parent is not None:
        if node.type in ("simple_stmt", "decorator", "param"):
            return node.start_pos[0], node.get_last_leaf().start_pos[0]
        if node.parent.type in heads:
            return node.start_pos[0], max(node.start_pos[0], min(node.end_pos[0], span[1][0]))
        node = node.parent
    return span[0][0], span[1][0]
