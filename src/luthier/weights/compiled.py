"""How the passes of `kernels` are compiled: numba, without Python's lock, and two operations that numba lacks.

Numba compiles each pass when it is first called, and keeps the code in its cache (beside the file it stands in, or in
the user's cache folder); where neither can be written, every process compiles anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba.core import types
from numba.extending import intrinsic

F = TypeVar("F")


def compiled(**settings: Any) -> Callable[[F], F]:
    """`numba.njit` that lets go of Python's lock; cached where there is a place for it."""

    def inner(function: F) -> F:
        try:
            return njit(nogil=True, error_model="numpy", cache=True, **settings)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # numba found no folder that can be written
            return njit(nogil=True, error_model="numpy", **settings)(function)  # type: ignore[no-any-return]

    return inner


@intrinsic  # type: ignore[untyped-decorator]
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32 with one rounding, as torch.add(c, a, alpha=b) computes it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(*[types.float32] * 3), emit


@intrinsic  # type: ignore[untyped-decorator]
def float32_of_bits(context: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), emit
