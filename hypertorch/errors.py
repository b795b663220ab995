"""The exceptions that hypertorch raises beside `ValueError` and `TypeError`, and its warnings."""


class HypertorchError(Exception):
    """Base of the library's own exceptions: catching it catches all of them."""


class IncompatibleBackendError(HypertorchError):
    """A hypergradient backend cannot serve this problem (its dynamics, horizon or kind of hyperparameter)."""


class ForwardModeError(IncompatibleBackendError):
    """PyTorch cannot push a tangent through an inner problem, or forward mode would have another derivative.

    Attributes:
        reason: what stands in the way.
        advice: what to do, a sentence.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}. {advice}")
        self.reason = reason
        self.advice = advice


class DetachedHyperparameterError(HypertorchError):
    """A hyperparameter does not reach the outer loss, so its hypergradient would be a silent zero."""


class NonFiniteError(HypertorchError):
    """A run produced NaN or infinity; the message names the inner step and the entry.

    Attributes:
        inner_step: inner steps that were taken before it appeared; None if it did not appear in an inner step.
    """

    def __init__(self, message: str, *, inner_step: int | None = None) -> None:
        super().__init__(message)
        self.inner_step = inner_step


class NonFiniteWarning(UserWarning):
    """An outer step met NaN or infinity, and was skipped, or taken over a shorter horizon."""


class ReplayError(HypertorchError):
    """Something evaluated again on the same arguments was another, so its derivative would be of another run."""


class CheckpointError(HypertorchError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class LostRankError(HypertorchError):
    """A process of a run on several ended or did not answer, and the others cannot go on without it."""


class DatasetError(HypertorchError):
    """A data set is missing, damaged, or not laid out as expected."""


class LinearSolveWarning(UserWarning):
    """An equation that a hypergradient rests on was not solved well: a linear system, or the inner problem itself.

    Attributes:
        residual: what is left of that equation, relative to its size; the largest of all tasks.
    """

    def __init__(self, message: str, residual: float) -> None:
        super().__init__(message)
        self.residual = residual


class ZeroHypergradientWarning(UserWarning):
    """A hypergradient stays exactly zero over the first outer steps of a run, although there is a path.

    Attributes:
        names: the outer variables.
    """

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names
