"""What a look at all samples tells: how sensitive the model is to each, and the leave-one-out loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from logix_like.errors import QueryError
from logix_like.query.ranking import stable_top
from logix_like.query.result import Ids, is_count


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """How the model depends on each of its training samples."""

    data_id: Ids
    """``[samples]``."""
    error: Tensor
    """``[samples]``: size of the residual, summed over outputs (prediction error)."""
    variance: Tensor
    """``[samples]``: variance of the outputs, summed (prediction variance)."""
    shift: Tensor
    """``[samples]``: how far the outputs would move without the sample, summed sizes."""
    sensitivity: Tensor
    """``[samples]``: how far the *predictions* (probabilities, means) would move without the sample, summed sizes."""
    loss: Tensor
    """``[samples]``: each sample's loss."""
    left_out_loss: Tensor
    """``[samples]``: estimated loss of each sample under the model trained without it."""

    @property
    def train_loss(self) -> float:
        """Mean loss."""
        return float(self.loss.mean())

    @property
    def loo_loss(self) -> float:
        """Leave-one-out cross-validation estimate: the mean of the left-out losses; stands for the test loss."""
        return float(self.left_out_loss.mean())

    def most_sensitive(self, k: int = 10) -> Ids:
        """Ids of the ``k`` samples whose removal would move their own prediction most, the first first."""
        if not is_count(k) or not 1 <= k <= len(self.data_id):
            raise QueryError(f"k is {k!r}; it must be between 1 and {len(self.data_id)}, the number of samples")
        chosen: Ids = self.data_id[stable_top(self.sensitivity[None], k)[1][0].numpy()]
        return chosen

    def map(self) -> tuple[Tensor, Tensor]:
        """The sensitivity map (figure 1 of the paper): error and variance of each sample, both ``[samples]``.

        Samples with both large are the ones the model memorises; their product orders them by sensitivity.
        """
        return self.error, self.variance

    def __str__(self) -> str:
        """Show the losses and the most sensitive samples."""
        k = min(5, len(self.data_id))
        listed = ", ".join(repr(one) for one in self.most_sensitive(k))
        return (
            f"{len(self.data_id)} samples: loss {self.train_loss:.4f}, leave-one-out estimate {self.loo_loss:.4f}; "
            f"most sensitive: {listed}"
        )
