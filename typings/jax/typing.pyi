# jax.typing: what is accepted as an array, and as a dtype.

from typing import Any, Protocol

import numpy as np
from jax import Array

class _SupportsDType(Protocol):
    @property
    def dtype(self) -> np.dtype: ...

type ArrayLike = Array | np.ndarray | np.bool | np.number | bool | int | float | complex
type DTypeLike = str | type[Any] | np.dtype | _SupportsDType
