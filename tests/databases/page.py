"""The page that shows what every exact backend makes of PyTorch's databases."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias, get_args

from tests.databases.verdicts import TOLERANCE, WAYS, Verdict, Word

Results: TypeAlias = dict[str, dict[str, dict[str, Verdict]]]
"""`operation or module -> sample -> way -> verdict`."""

_TITLES = {"operators": "Operations", "modules": "Modules"}
_MARKS: dict[Word, str] = {
    "wrong": "**wrong**",
    "PyTorch wrong": "**PyTorch wrong**",
    "error": "error",
    "refused": "refused",
    "right": "right",
    "not judged": "-",
}  # the worst first: what a row shows of several samples
_INTRODUCTION = f"""\
# Operations

Which operations of PyTorch each exact backend serves. This page is written by a program; do not edit it:

```bash
.venv/bin/python -m tests.databases.table
```

Every operation that PyTorch lists as twice differentiable, and every module of its database in training and in
evaluation mode, is put into the inner loss of a run of three steps with two hyperparameters. The hypergradient depends
on the Hessian of the operation and on its cross derivatives. It is compared in float64 with central differences of the
outer loss. `Implicit` is compared with its own formula, whose derivatives are differences of gradients.

- **right**: the relative error is below {TOLERANCE:.0e} in every sample.
- **refused**: hypertorch raises an error of its own. It names the operation and says what to do instead.
- **error**: PyTorch raises an error, which hypertorch passes on.
- **PyTorch wrong**: a loop written out in plain autograd is as wrong.
- **wrong**: the backend is wrong where plain autograd is right.
- **-**: not judged. The operation has no derivative at the sample or near it (a kink, a jump, a number that is not
  finite), or it rounds to a lower precision.

A row shows the worst of the operation's samples.
"""


def page(results: Results, versions: dict[str, str], missing: Sequence[str] = ()) -> str:
    """Returns the page.

    Args:
        results: what came out.
        versions: what it holds for.
        missing: what was not run.
    """
    parts = [_INTRODUCTION, ", ".join(f"{name} {version}" for name, version in versions.items()) + ", CPU.\n"]
    if missing:
        parts.append(f"**Not run: {', '.join(f'`{name}`' for name in missing)}.**\n")
    for database, title in _TITLES.items():
        own = {name.partition("/")[2]: value for name, value in results.items() if name.startswith(f"{database}/")}
        parts += [f"## {title}\n", _counts(own), _rows(own)]
    parts += ["## What to do\n", _advice(results), "## Not judged\n", _not_judged(results)]
    return "\n".join(parts)


def worst(verdicts: Iterable[Verdict]) -> Word:
    """Returns the worst word of several samples."""
    words = {verdict.word for verdict in verdicts}
    return next(word for word in _MARKS if word in words)


def advice_of(message: str) -> str:
    """Returns what a refusal says to do: from its last imperative on."""
    # What it quotes of PyTorch before that may end without a full stop.
    starts = [found.start() for found in re.finditer(r"(?<= )(Pass|Push|Run|Shorten|Use|Write) ", message)]
    return message[starts[-1] :] if starts else re.split(r"(?<=[.)`]) (?=[A-Z])", message.strip())[-1]


def _counts(own: Results) -> str:
    samples = [verdicts for found in own.values() for verdicts in found.values()]
    words = get_args(Word)
    lines = [
        f"{len(own)} names, {len(samples)} samples. How many samples came out how:\n",
        _line(["backend", *words]),
        _line(["---"] * (len(words) + 1)),
    ]
    for way in WAYS:
        counts = Counter(verdicts[way].word for verdicts in samples)
        lines.append(_line([_code_before_comma(way), *(str(counts[word]) for word in words)]))
    return "\n".join(lines) + "\n"


def _rows(own: Results) -> str:
    rows, all_right, none = [], [], []
    for name, found in sorted(own.items(), key=lambda item: item[0].lower()):
        if not found:
            none.append(name)
            continue
        words = [worst(verdicts[way] for verdicts in found.values()) for way in WAYS]
        if set(words) <= {"right", "not judged"} and "right" in words:
            all_right.append(name)
        else:
            rows.append(_line([f"`{name}`", *(_MARKS[word] for word in words)]))
    head = [_line(["", *map(_code_before_comma, WAYS)]), _line(["---"] * (len(WAYS) + 1))]
    parts = ["\n".join([*head, *rows])]
    if all_right:
        names = ", ".join(f"`{name}`" for name in all_right)
        summary = f"<summary>{len(all_right)} are right by every backend</summary>"
        parts.append(f"\n<details>{summary}\n\n{names}\n\n</details>")
    if none:
        parts.append("\nWithout a dense input that has a derivative: " + ", ".join(f"`{name}`" for name in none) + ".")
    return "\n".join(parts) + "\n"


def _advice(results: Results) -> str:
    """Returns every piece of advice with the operations that get it, and the errors that give none."""
    groups: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, found in results.items():
        for verdicts in found.values():
            for way, verdict in verdicts.items():
                if verdict.word == "refused":
                    groups["refused", advice_of(verdict.text)][name.partition("/")[2]].add(way)
                if verdict.word == "error":
                    groups["error", _first_words(verdict.text)][name.partition("/")[2]].add(way)
    parts = []
    for (word, text), names in sorted(groups.items(), key=lambda item: (item[0][0] == "error", -len(item[1]))):
        ways = [way for way in WAYS if any(way in found for found in names.values())]
        said = f"**{text}**" if word == "refused" else f"error of PyTorch: {text}"
        listed = ", ".join(f"`{name}`" for name in sorted(names))
        parts.append(f"- {said} ({', '.join(map(_code_before_comma, ways))})\n  {listed}")
    return "\n".join(parts) + "\n"


def _not_judged(results: Results) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for found in results.values():
        for sample, verdicts in found.items():
            reasons = {verdict.text for verdict in verdicts.values() if verdict.word == "not judged"}
            for reason in reasons:
                groups[re.sub(r"\d+e[-+]\d+", "a part", reason)].append(sample.partition("/")[2])
    lines = [
        f"- {reason} ({len(samples)}): {', '.join(f'`{sample}`' for sample in samples)}"
        for reason, samples in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(lines) + "\n"


def _first_words(text: str) -> str:
    line = text.splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."


def _code_before_comma(way: str) -> str:
    code, comma, rest = way.partition(", ")
    return f"`{code}`{comma}{rest}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"
