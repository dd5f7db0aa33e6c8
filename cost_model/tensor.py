"""What a price or a rule may know of a tensor: its shape and its dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
FLOATING = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})

COMPLEX = {"complex64": "float32", "complex128": "float64"}
"""And the dtype of their parts, in which they are calculated with."""


@dataclass(frozen=True)
class TensorMeta:
    """Shape in elements and dtype by torch's name without the ``torch.`` prefix."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in DTYPE_BYTES, self.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOATING

    @property
    def is_complex(self) -> bool:
        return self.dtype in COMPLEX

    @property
    def has_gradient(self) -> bool:
        """Whether torch differentiates values of this dtype."""
        return self.is_floating or self.is_complex
