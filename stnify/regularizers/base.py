"""What every kind of noise inside the network has in common."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from stnify.errors import ShapeError
from stnify.rows import RowLayout, expand_rows, trailing


class Noise(nn.Module, ABC):
    """Noise whose strength is a hyperparameter: a rate, or a standard deviation.

    Off in eval mode. Draws from the global generator. In a linearised pass primal and tangent meet
    the same draw, because one operation applies it to both.

    Args:
        column: Which hyperparameter is the strength.
        place: What it replaces or follows, for errors.
        factor: The strength is this many times the hyperparameter, in constrained units.

    Attributes:
        layout: Which rows of the input belong to which example.
    """

    settings: ClassVar[tuple[str, ...]] = ("column", "factor")
    """Attributes that tell one instance from another."""

    def __init__(self, column: int, place: str = "", factor: float = 1.0) -> None:
        super().__init__()
        self.column = column
        self.place = place
        self.factor = factor
        self.layout = RowLayout.BATCH

    def extra_repr(self) -> str:
        """Name the settings."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)

    def strength(self, inputs: Tensor, constrained: Tensor) -> Tensor:
        """Return the strength for every row of ``inputs``, constrained units.

        Args:
            inputs: ``(rows, ...)``, or rows in the second dimension if the layout says so.
            constrained: ``(h,)`` or ``(batch, h)``, constrained units.

        Returns:
            A scalar for ``(h,)``; for ``(batch, h)`` what broadcasts against ``inputs``, with the
            value of the example each row belongs to.
        """
        strength = constrained[..., self.column] * self.factor
        if not strength.ndim:
            return strength
        if not inputs.ndim:
            return strength.mean()
        row = row_dimension(inputs, self.layout)
        by_row = expand_rows(strength[:, None], inputs.shape[row], self.layout)
        return trailing(by_row[:, 0], inputs.ndim - row)

    def require_real(self, inputs: object) -> None:
        """Raise ShapeError if ``inputs`` is not one tensor of real numbers."""
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            return
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ShapeError(
            f"noise must act on one tensor of real numbers, but at {self.place!r} there is "
            f"{found}. Choose another place by `at`, `after` or `exclude`."
        )


class TensorNoise(Noise):
    """Noise that needs nothing but the tensor it acts on."""

    def forward(self, inputs: Tensor, constrained: Tensor | None) -> Tensor:
        """Act on ``inputs``, or return them as they are in eval mode.

        Args:
            inputs: ``(rows, ...)``.
            constrained: ``(h,)`` for one strength, ``(batch, h)`` for one for each example,
                constrained units; None leaves the inputs alone.

        Raises:
            ShapeError: The inputs are not one tensor of real numbers, or lack a dimension.
        """
        self.require_real(inputs)
        if not self.training or constrained is None:
            return inputs
        return self.act(inputs, self.strength(inputs, constrained))

    @abstractmethod
    def act(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Return ``inputs`` with noise; unchanged, bit for bit, where the strength is zero.

        Args:
            inputs: ``(rows, ...)``, perhaps a dual number.
            strength: A scalar, or what broadcasts against ``inputs``, constrained units.
        """


def row_dimension(inputs: Tensor, layout: RowLayout) -> int:
    """Return the dimension of ``inputs`` that counts rows; the last one if it has fewer."""
    return min(layout.dim, inputs.ndim - 1)
