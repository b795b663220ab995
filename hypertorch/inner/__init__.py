"""The inner loop as a value: its state, its run, its tasks, and how it is run.

`InnerLoop` is what a backend is handed: `initial`, `step` and `outer` are the run, as pure functions of a state and the
outer variables, and `scan` is the loop over them.
"""

from hypertorch.inner.loop import InnerLoop, Step
from hypertorch.inner.record import Record
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState

__all__ = ["InnerLoop", "InnerState", "Record", "Step", "scan"]
