"""Arithmetic that is the same for one number and for an array of them.

A formula of a step or of its memory is written once, for one plan (floats) and for many at once (numpy arrays).
numpy is only imported where an array has come in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Degree", "Real", "larger", "smaller"]

#: A float, or an array of floats.
Real = TypeVar("Real", float, "NDArray[np.float64]")
#: A whole number, or an array of them.
Degree = TypeVar("Degree", int, "NDArray[np.int64]")


@overload
def larger(a: float, b: float) -> float: ...
@overload
def larger(a: NDArray[np.float64], b: float | NDArray[np.float64]) -> NDArray[np.float64]: ...
@overload
def larger(a: float, b: NDArray[np.float64]) -> NDArray[np.float64]: ...
def larger(a: float | NDArray[np.float64], b: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
    """The larger of two, element by element.

    >>> larger(1.0, 2.0)
    2.0
    >>> import numpy as np
    >>> larger(1.0, np.array([0.5, 3.0])).tolist()
    [1.0, 3.0]
    """
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a if a >= b else b
    import numpy as np

    return np.maximum(a, b)


@overload
def smaller(a: float, b: float) -> float: ...
@overload
def smaller(a: NDArray[np.float64], b: float | NDArray[np.float64]) -> NDArray[np.float64]: ...
@overload
def smaller(a: float, b: NDArray[np.float64]) -> NDArray[np.float64]: ...
def smaller(a: float | NDArray[np.float64], b: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
    """The smaller of two, element by element.

    >>> smaller(1.0, 2.0)
    1.0
    """
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a if a <= b else b
    import numpy as np

    return np.minimum(a, b)
