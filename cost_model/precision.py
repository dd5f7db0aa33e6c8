"""Precision: in which dtype each kind of tensor is kept, computed and sent."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, fields, replace

from cost_model.errors import ConfigError
from cost_model.tensor import DTYPE_BYTES, FLOATING, TensorMeta

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""A user's name of a dtype -> torch's."""
AUTO = "auto"
SENT = "bf16"
"""What is sent where that is left to the planner: as wide a range as fp32 in half the bytes, so nothing is scaled."""


_CHOSEN = ("reduce", "wire")


@dataclass(frozen=True)
class Kept:
    """dtypes of what belongs to a parameter: its gradient as accumulated and as summed over ranks, and what the
    optimizer updates, a master copy where that is not the parameter's own dtype."""

    grads: str
    reduce: str
    updated: str


@dataclass(frozen=True)
class Precision:
    """dtype of each kind of floating tensor: "fp32", "bf16", "fp16", or None.

    params: as parameters are stored and gathered; None: as the model has them.
    compute: what products, convolutions and attention are computed in (see ``passes.precision``); None: as params.
    grads: in which gradients are accumulated over microbatches; None: as params.
    reduce: in which they are summed over ranks once per step; None: as grads.
    master: of the copy that the optimizer updates and parameters are rounded from; None: it updates the parameters.
    wire: in which activations go from stage to stage and their gradients back, where that is narrower; None: as they
    are. Optimizer state is of the dtype of what is updated. reduce and wire may be "auto": the planner's choice between
    None and bf16, by price; a plan says what was chosen.
    """

    params: str | None = None
    compute: str | None = None
    grads: str | None = None
    reduce: str | None = None
    master: str | None = None
    wire: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            known = {**dict.fromkeys(DTYPES), **dict.fromkeys([AUTO] if name in _CHOSEN else [])}
            if value is not None and value not in known:
                names = ", ".join(map(repr, known))
                raise ConfigError(f"precision {name} must be {names} or None, not {value!r}")

    @classmethod
    def parse(cls, text: str) -> Precision:
        """ "bf16", for what is usual with it (``mixed``), or fields, "params=bf16,master=fp32". Errors: ConfigError."""
        if text in DTYPES:
            return cls.mixed(text)
        pairs = [part.partition("=") for part in text.split(",")]
        known = {field.name for field in fields(cls)}
        wrong = next((name for name, equals, _ in pairs if not equals or name not in known), None)
        if wrong is not None:
            raise ConfigError(
                f"precision {text!r}: {wrong!r} is not understood; give bf16, fp16, fp32, or fields of "
                f"{', '.join(sorted(known))}, as params=bf16,grads=fp32,master=fp32"
            )
        return cls(**{name: value for name, _, value in pairs})

    @classmethod
    def mixed(cls, dtype: str) -> Precision:
        """What is usual with a compute dtype: parameters in it, gradients, sums and the master copy in fp32."""
        return cls() if dtype == "fp32" else cls(params=dtype, grads="fp32", master="fp32")

    @property
    def compute_dtype(self) -> str | None:
        """By torch's name; None: as the model has it."""
        name = self.compute or self.params
        return None if name is None else DTYPES[name]

    @property
    def scales_loss(self) -> bool:
        """Whether gradients pass through fp16, whose range is short: see ``autopar.runtime.scaling``."""
        return "fp16" in (self.params, self.compute, self.grads, self.reduce, self.wire)

    def kept(self, stored: str) -> Kept:
        """What belongs to a parameter that is stored in a dtype."""
        if stored not in FLOATING:
            return Kept(stored, stored, stored)
        grads = stored if self.grads is None else DTYPES[self.grads]
        reduce = grads if self.reduce is None else DTYPES[self.reduce]
        return Kept(grads, reduce, stored if self.master is None else DTYPES[self.master])

    @property
    def choices(self) -> tuple[Precision, ...]:
        """What a plan may have: with nothing left to the planner, the exact one first."""
        each = [(None, SENT) if getattr(self, name) == AUTO else (getattr(self, name),) for name in _CHOSEN]
        return tuple(replace(self, **dict(zip(_CHOSEN, way, strict=True))) for way in itertools.product(*each))

    def sent(self, meta: TensorMeta) -> TensorMeta:
        """An activation, or its gradient, as it goes from stage to stage."""
        if self.wire is None or not meta.is_floating:
            return meta
        narrow = DTYPES[self.wire]
        return replace(meta, dtype=narrow) if DTYPE_BYTES[narrow] < DTYPE_BYTES[meta.dtype] else meta

    def sent_bytes(self, nbytes: int, meta: TensorMeta) -> int:
        """Of so many bytes of the dtype of ``meta``."""
        return nbytes * DTYPE_BYTES[self.sent(meta).dtype] // DTYPE_BYTES[meta.dtype]

    def stored(self, dtype: str) -> str:
        """The dtype in which a parameter is stored that the model has in ``dtype``."""
        return dtype if self.params is None or dtype not in FLOATING else DTYPES[self.params]

    def __str__(self) -> str:
        given = [f"{name}={value}" for name, value in asdict(self).items() if value is not None]
        return ",".join(given) or "the model's own"
