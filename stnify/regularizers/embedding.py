"""Embedding dropout with a tunable rate."""

from typing import ClassVar, final

import torch
from torch import Tensor

from stnify.errors import ShapeError
from stnify.regularizers.base import Noise, row_dimension
from stnify.regularizers.masks import drawn, keep_probability, rescaled


@final
class TunedEmbeddingDropout(Noise):
    """Zeroes whole words: all occurrences of a word within a row go or stay together.

    Words that stay are scaled by ``1 / (1 - rate)``. Every row draws its own words, also at one
    rate for the batch, so that the noise of an example is the same whether rates are its own or
    the batch's, and rows are independent. (Merity et al. drop a word from the whole batch: the same
    for every row, only that rows share the draw.)

    A draw is made for every word of every row: ``rows x words`` numbers for the time of the call.

    Args:
        column: Which hyperparameter is the rate.
        words: Rows of the embedding matrix.
        place: What it replaces or follows, for errors.
        factor: The rate is this many times the hyperparameter.

    Source: Gal & Ghahramani 2016, section 4.2; Merity et al. 2018, section 4.3; [STN] Appendix D.
    """

    settings: ClassVar[tuple[str, ...]] = ("column", "words", "factor")

    def __init__(self, column: int, words: int, place: str = "", factor: float = 1.0) -> None:
        super().__init__(column, place, factor)
        self.words = words

    def forward(self, outputs: Tensor, constrained: Tensor | None, indices: Tensor) -> Tensor:
        """Drop words from the outputs of an embedding, or return them as they are in eval mode.

        Args:
            outputs: ``(rows, ..., width)``, vectors of the words.
            constrained: ``(h,)`` for one rate, ``(batch, h)`` for one for each example,
                constrained units; None leaves the outputs alone.
            indices: ``(rows, ...)``, the words, from 0 to less than ``words``.

        Raises:
            ShapeError: The outputs are not one tensor of real numbers, or not one vector for each
                index.
        """
        self.require_real(outputs)
        if not self.training or constrained is None:
            return outputs
        if outputs.shape[:-1] != indices.shape:
            raise ShapeError(
                f"embedding dropout needs one vector for each word, but at {self.place!r} there "
                f"are indices {tuple(indices.shape)} and outputs {tuple(outputs.shape)}. Exclude "
                "it by `exclude`."
            )
        keep = keep_probability(outputs, self.strength(indices, constrained))
        kept = self._kept(indices, keep)
        return rescaled(outputs, kept[..., None], keep[..., None])

    def _kept(self, indices: Tensor, keep: Tensor) -> Tensor:
        """Draw every word once for every row; return whether the word at each index stays."""
        row = max(row_dimension(indices, self.layout), 0)
        rows_first = torch.atleast_1d(indices).movedim(row, 0)
        words = rows_first[:, None].flatten(1).long()
        by_row = drawn(keep.reshape(-1, 1), (len(words), self.words), indices)
        kept = by_row.gather(1, words).reshape(rows_first.shape)
        return kept.movedim(0, row).reshape(indices.shape)
