"""The op table: one entry per op holds its factor map and its price.

To add an op, add one ``register(Op(...))`` to the file of its family; entries have no defaults, and a test
fails when one is incomplete or when an op's factor map does not hold under execution.
"""

from cost_model.ops import (
    activations,
    attention,
    collectives,
    convolution,
    draws,
    elementwise,
    factories,
    gather,
    linalg,
    loss,
    matmul,
    norm,
    order,
    reduce,
    spatial,
    spectral,
    views,
)
from cost_model.ops.table import (
    BETWEEN_REPLICAS,
    INSIDE,
    INSIDE_COSTS,
    OPS,
    PRODUCTS,
    WITHIN_BACKWARD,
    Op,
    OpCall,
    Ref,
    entry_of,
    price_of,
)

__all__ = [
    "BETWEEN_REPLICAS",
    "INSIDE",
    "INSIDE_COSTS",
    "OPS",
    "PRODUCTS",
    "WITHIN_BACKWARD",
    "Op",
    "OpCall",
    "Ref",
    "activations",
    "attention",
    "collectives",
    "convolution",
    "draws",
    "elementwise",
    "entry_of",
    "factories",
    "gather",
    "linalg",
    "loss",
    "matmul",
    "norm",
    "order",
    "price_of",
    "reduce",
    "spatial",
    "spectral",
    "views",
]
