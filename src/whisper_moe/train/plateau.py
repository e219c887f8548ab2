"""When a run looks like the plateau before grokking (arXiv 2201.02177)."""

from __future__ import annotations


class Plateau:
    """Tells when a run looks like the plateau before grokking: what is trained on is known, what is not is not.

    Nothing says that it will end; but it is no reason to stop where weights are decayed. Overfitting looks the same.
    """

    known, apart, evaluations = 0.1, 10.0, 3

    def __init__(self) -> None:
        self._first: float | None = None
        self._row = 0

    def seen(self, step: int, train_loss: float, validation_loss: float) -> str | None:
        """A sentence when the plateau has just been reached, for one evaluation; None otherwise.

        Reached: in three evaluations in a row, the training loss is under a tenth of the first and a tenth of the
        validation loss, which is more than half of the first training loss.
        """
        self._first = train_loss if self._first is None else self._first
        here = train_loss < self.known * self._first and train_loss * self.apart < validation_loss
        self._row = self._row + 1 if here and validation_loss > 0.5 * self._first else 0
        if self._row != self.evaluations:
            return None
        return (
            f"step {step}: the training loss is {train_loss:.3g}, the validation loss {validation_loss:.3g}: overfitting, or the "
            "plateau before grokking; with weight decay and many more steps it may fall (arXiv 2201.02177)"
        )
