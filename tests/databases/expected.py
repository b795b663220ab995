"""What every backend owes every sample: the right number, or a refusal whose advice helps."""

from __future__ import annotations

from tests.databases.samples import Sample
from tests.databases.verdicts import Verdict, judge

# What a refusal recommends, and the way that it leads to.
_RECOMMENDED = {
    "`Reverse()`": "Reverse()",
    "`derivative='reverse'`": "Reverse()",
    "`Forward(chunk_size=1)`": "Forward(chunk_size=1)",
    "`chunk_size` above 1": "Forward()",
}


def assert_right_or_refused(sample: Sample) -> None:
    """Asserts that no backend returns a wrong number, and that following a refusal's advice gives the right one."""
    verdicts = judge(sample)
    wrong = {way: verdict.text for way, verdict in verdicts.items() if verdict.word in ("wrong", "PyTorch wrong")}
    assert not wrong, f"{sample.name}: {wrong}"
    useless = {way: verdict.text for way, verdict in verdicts.items() if not advice_helps(verdict, verdicts)}
    assert not useless, f"{sample.name}: {useless}"


def advice_helps(verdict: Verdict, verdicts: dict[str, Verdict]) -> bool:
    """Returns whether one of the backends that a refusal recommends is right; True where it recommends none."""
    if verdict.word != "refused":
        return True
    recommended = [way for words, way in _RECOMMENDED.items() if words in verdict.text]
    return not recommended or any(verdicts[way].word == "right" for way in recommended)
