"""What is changed: operators of cosmic-ray, and those that it lacks, written on its interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeAlias

import cosmic_ray.plugins
import parso
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import ExprStmt, Name, PythonNode
from parso.tree import Leaf, NodeOrLeaf

Span: TypeAlias = tuple[tuple[int, int], tuple[int, int]]

# One or two replacements of each operator. All others that cosmic-ray has (`+` by `>>`) end in a TypeError, which any
# test notices.
_FROM_COSMIC_RAY = (
    *("ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div"),
    *("ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul", "ReplaceBinaryOperator_Mod_FloorDiv"),
    *("ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_BitOr_BitAnd", "ReplaceBinaryOperator_BitAnd_BitOr"),
    *("ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq"),
    *("ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_Lt_GtE"),
    *("ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_LtE_Gt"),
    *("ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_Gt_LtE"),
    *("ReplaceComparisonOperator_GtE_Gt", "ReplaceComparisonOperator_GtE_Lt"),
    *("ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is"),
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not"),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer"),
    *("RemoveDecorator", "ZeroIterationForLoop"),
)

_DISPLAYS = ("testlist_comp", "testlist_star_expr", "testlist", "dictorsetmaker")


class DropElement(Operator):
    """Leaves an element of a tuple, list, set or dict out: a part of a cache's key, a name, a case."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        """Yields the place of each element."""
        for element in _elements(node):
            yield element[0].start_pos, element[-1].end_pos

    def mutate(self, node: PythonNode, index: int) -> PythonNode:
        """Returns the display without the element; a tuple of one element stays a tuple."""
        elements = _elements(node)
        kept = [element for number, element in enumerate(elements) if number != index]
        comma = [parso.python.tree.Operator(",", (0, 0))]
        rest = list(chain.from_iterable([*element, *comma] for element in kept))
        node.children = rest if len(kept) == 1 and node.type != "dictorsetmaker" else rest[:-1]
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Returns what becomes of a tuple."""
        return (Example("key = (a, b)", "key = ( b,)"), Example("key = {a: 1, b: 2}", "key = {a: 1}", occurrence=1))


class DropKeyword(Operator):
    """Leaves a keyword argument of a call out, so that its default holds."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        """Yields the place of each keyword argument."""
        for argument in _keywords(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: PythonNode, index: int) -> PythonNode:
        """Returns the arguments without one."""
        place = node.children.index(_keywords(node)[index])
        children = list(node.children)
        del children[place]
        if node.type == "arglist":
            del children[min(place, len(children) - 1)]
        node.children = children
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Returns what becomes of calls."""
        return (Example("f(a, b=1)", "f(a)"), Example("f(b=1, c=2)", "f( c=2)"), Example("f(b=1)", "f()"))


class DropStatement(Operator):
    """Puts `pass` in the place of a call, of an assignment in place, or of a name's new value made from its old one."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        """Yields the place of a statement that can be left out without a name going missing."""
        if node.type == "simple_stmt" and _is_droppable(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: PythonNode, index: int) -> PythonNode:
        """Returns `pass`."""
        node.children[0] = Name("pass", node.children[0].start_pos, node.children[0].get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Returns what becomes of statements."""
        return (Example("f(a)\n", "pass\n"), Example("x += 1\n", "pass\n"), Example("x = g(x)\n", "pass\n"))


class KeepBranch(Operator):
    """Takes one branch of `a if condition else b` always."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        """Yields the place twice, for both branches."""
        if _is_conditional(node):
            yield node.start_pos, node.end_pos
            yield node.start_pos, node.end_pos

    def mutate(self, node: PythonNode, index: int) -> NodeOrLeaf:
        """Returns the first or the last branch."""
        node.children = [node.children[4 * index]]
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Returns what becomes of an expression."""
        return (Example("x = a if c else b", "x = a"), Example("x = a if c else b", "x = b", occurrence=1))


class SwapName(Operator):
    """Takes the opposite function: the largest for the smallest, all for any."""

    _PAIRS = (
        *(("min", "max"), ("any", "all"), ("floor", "ceil"), ("argmin", "argmax"), ("minimum", "maximum")),
        *(("amin", "amax"), ("zeros_like", "ones_like"), ("zeros", "ones"), ("real", "imag"), ("isnan", "isinf")),
    )
    _OTHER = dict(_PAIRS) | {right: left for left, right in _PAIRS}

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        """Yields the place of a name that has an opposite, where it is read."""
        if isinstance(node, Name) and node.value in self._OTHER and not node.is_definition() and not _is_label(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Name, index: int) -> Name:
        """Returns the opposite name."""
        node.value = self._OTHER[node.value]
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Returns what becomes of a call."""
        return (Example("x = max(a)", "x = min(a)"),)


class ReverseMembership(Operator):
    """Puts `not in` for `in`, and the other way round."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        """Yields the place of the word."""
        if node.type == "comparison" and _membership(node) in (["in"], ["not", "in"]):
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: PythonNode, index: int) -> PythonNode:
        """Returns the opposite comparison."""
        word = "in" if len(_membership(node)) == 2 else "not in"
        node.children[1] = Name(word, node.children[1].start_pos, " ")
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Returns what becomes of comparisons."""
        return (Example("a in b", "a not in b"), Example("a not in b", "a in b"))


class CatchNothing(Operator):
    """Lets an exception pass that is caught."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Span]:
        """Yields the place of what is caught."""
        if node.type == "except_clause":
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: PythonNode, index: int) -> PythonNode:
        """Returns the clause with no class of exceptions."""
        node.children[1] = Name("()", node.children[1].start_pos, " ")
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Returns what becomes of a clause."""
        return (Example("try: f()\nexcept OSError as e: pass", "try: f()\nexcept () as e: pass"),)


OWN: tuple[type[Operator], ...] = (
    *(DropElement, DropKeyword, DropStatement, KeepBranch, SwapName, ReverseMembership, CatchNothing),
)


def operators() -> dict[str, Operator]:
    """Returns the operators by name."""
    taken = {name: cosmic_ray.plugins.get_operator(f"core/{name}")() for name in _FROM_COSMIC_RAY}
    return {**taken, **{kind.__name__: kind() for kind in OWN}}


def _elements(node: NodeOrLeaf) -> list[list[NodeOrLeaf]]:
    """Returns the elements of a display, without the commas; none of a comprehension or of what is assigned to."""
    if node.type not in _DISPLAYS or _is_target(node):
        return []
    elements: list[list[NodeOrLeaf]] = [[]]
    for child in node.children:
        if child.type in ("comp_for", "sync_comp_for"):
            return []
        if _is_comma(child):
            elements.append([])
        else:
            elements[-1].append(child)
    return [element for element in elements if element] if len(elements) > 1 else []


def _is_target(node: NodeOrLeaf) -> bool:
    """Returns whether values are assigned to the elements, or they are assigned to as many names."""
    while node.parent is not None and node.parent.type in (*_DISPLAYS, "exprlist", "atom"):
        node = node.parent
    parent = node.parent
    if isinstance(parent, ExprStmt):
        return node is not parent.children[-1] or parent.children[0].type in (*_DISPLAYS, "atom")
    loops = ("for_stmt", "comp_for", "sync_comp_for", "with_item")
    return parent is not None and parent.type in loops and node is parent.children[1]


def _keywords(node: NodeOrLeaf) -> list[NodeOrLeaf]:
    if node.type not in ("arglist", "trailer"):
        return []
    return [child for child in node.children if child.type == "argument" and _is_equals(child.children[1])]


def _is_equals(node: NodeOrLeaf) -> bool:
    return isinstance(node, Leaf) and node.value == "="


def _is_comma(node: NodeOrLeaf) -> bool:
    return isinstance(node, Leaf) and node.value == ","


def _is_droppable(statement: NodeOrLeaf) -> bool:
    if statement.type in ("atom_expr", "power"):
        return True
    if not isinstance(statement, ExprStmt) or statement.children[1].type == "annassign":
        return False
    target, operator = statement.children[0], statement.children[1]
    if operator.type != "operator" or operator.value != "=" or target.type in ("atom_expr", "power"):
        return True
    return isinstance(target, Name) and target.value in _names(statement.children[2])


def _names(node: NodeOrLeaf) -> set[str]:
    """Returns the names that are read in an expression, without those of attributes and keyword arguments."""
    if isinstance(node, Leaf):
        before = node.get_previous_leaf()
        is_attribute = before is not None and before.value == "."
        return {node.value} if isinstance(node, Name) and not is_attribute and not _is_label(node) else set()
    return set().union(*map(_names, node.children))


def _is_conditional(node: NodeOrLeaf) -> bool:
    return node.type == "test" and len(node.children) == 5 and node.children[1].get_code(include_prefix=False) == "if"


def _is_label(name: Name) -> bool:
    """Returns whether a name is that of a keyword argument."""
    parent = name.parent
    return parent is not None and parent.type in ("argument", "param") and parent.children[0] is name


def _membership(node: PythonNode) -> list[str]:
    word = node.children[1]
    return [word.value] if isinstance(word, Leaf) else [child.value for child in word.children]
