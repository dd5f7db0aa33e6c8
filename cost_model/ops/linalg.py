"""Decompositions and solutions of small matrices, many at once: the last two dims are whole, those before parallel."""

from __future__ import annotations

from collections.abc import Callable

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import Op, OpCall, dims_of, pass_of, register, saving, sweep
from cost_model.program import OpCost

BACKWARD_PASSES = 3.0
"""Work of a backward in that of its forward: two triangular solutions and a product, by convention."""


def _of_matrices(call: OpCall) -> FactorMap | None:
    """Dims in front of the matrices stand in front of every result; the rest of each result is its own and whole.

    None where a result was not asked for: it is empty.
    """
    if any(meta.shape == (0,) for meta in call.outputs):
        return None
    lead = len(call.inputs[0].shape) - 2
    names = [f"a{i}" for i in range(lead)]
    terms, whole = [], []
    for place, meta in enumerate((*call.inputs, *call.outputs)):
        own = [f"m{place}_{i}" for i in range(len(meta.shape) - lead)]
        terms.append(" ".join([*names, *own]))
        whole += own
    count = len(call.inputs)
    notation = f"{', '.join(terms[:count])} -> {', '.join(terms[count:])}"
    return parse_map(notation, call.inputs, call.outputs, whole=" ".join(whole))


def _alike(call: OpCall) -> FactorMap | None:
    """None where operands broadcast against each other."""
    lead = call.inputs[0].shape[:-2]
    return _of_matrices(call) if all(meta.shape[: len(lead)] == lead for meta in call.inputs) else None


def _inverted(call: OpCall) -> FactorMap | None:
    """linalg_pinv: one tolerance for all matrices. None where each has its own."""
    source, *limits = call.inputs
    if any(meta.shape for meta in limits):
        return None
    lead = " ".join(f"a{i}" for i in range(len(source.shape) - 2))
    notation = f"{', '.join([f'{lead} m n', *[''] * len(limits)])} -> {lead} n m"
    return parse_map(notation, call.inputs, call.outputs, whole="m n")


def _triangular(call: OpCall) -> FactorMap | None:
    """linalg_solve_triangular: linear in what it is solved for, whose columns stay apart (rows where X stands left)."""
    lead = len(call.inputs[0].shape) - 2
    if call.inputs[1].shape[:-2] != call.inputs[0].shape[:-2]:
        return None
    batch = " ".join(f"a{i}" for i in range(lead))
    solved = f"{batch} m k" if call.args.get("left", True) else f"{batch} k m"
    notation = f"{batch} m n, {solved} -> {solved}"
    return parse_map(notation, call.inputs, call.outputs, whole="m n", linear=((1,),))


def _from_factor(call: OpCall) -> FactorMap | None:
    """cholesky_solve: linear in what it is solved for, whose columns stay apart."""
    lead = len(call.inputs[0].shape) - 2
    if call.inputs[1].shape[:-2] != call.inputs[0].shape[:-2]:
        return None
    batch = " ".join(f"a{i}" for i in range(lead))
    notation = f"{batch} m k, {batch} m n -> {batch} m k"
    return parse_map(notation, call.inputs, call.outputs, whole="m n", linear=((0,),))


def _from_factors(call: OpCall) -> FactorMap | None:
    """linalg_lu_solve: linear in what it is solved for, whose columns stay apart (rows where X stands left)."""
    matrix, _, solved = call.inputs
    lead = len(matrix.shape) - 2
    if solved.shape[:-2] != matrix.shape[:-2]:
        return None
    batch = " ".join(f"a{i}" for i in range(lead))
    free = f"{batch} m k" if call.args.get("left", True) else f"{batch} k m"
    return parse_map(
        f"{batch} m n, {batch} p, {free} -> {free}", call.inputs, call.outputs, whole="m n p", linear=((2,),)
    )


def _cubic(call: OpCall) -> OpCost:
    """One multiplication and addition for each element of a matrix and each of its rows."""
    rows = call.inputs[0].shape[-1]
    return sweep("other", *call.inputs, *call.outputs, flops=2.0 * rows * call.inputs[0].numel)


def _cubic_backward(call: OpCall) -> tuple[OpCost, ...]:
    flops = BACKWARD_PASSES * _cubic(call).flops
    return (sweep("other", *call.inputs, *call.inputs, *call.outputs, flops=flops),)


def _distance_factors(call: OpCall) -> FactorMap:
    """_cdist_forward: rows of either operand in pairs; what they are measured along is whole."""
    return parse_map("... m d, ... n d -> ... m n", call.inputs, call.outputs, whole="d")


def _distance_price(call: OpCall) -> OpCost:
    depth = call.inputs[0].shape[-1]
    return sweep("elementwise", *call.inputs, *call.outputs, flops=3.0 * depth * call.outputs[0].numel)


def _distance_backward(call: OpCall) -> tuple[OpCost, ...]:
    return _distance_price(call), _distance_price(call)


def _cross_factors(call: OpCall) -> FactorMap:
    """linalg_cross: the dim of the three coordinates is whole."""
    rank = len(call.inputs[0].shape)
    (dim,) = dims_of(call, "dim", rank)
    names = " ".join(f"a{i}" for i in range(rank))
    return parse_map(f"{names}, {names} -> {names}", call.inputs, call.outputs, whole=f"a{dim}", linear=((0,), (1,)))


def _register(names: str, factors: Callable[[OpCall], FactorMap | None]) -> None:
    for name in names.split():
        register(Op(f"aten.{name}", factors, _cubic, _cubic_backward, saving("in0", "out0", "out1")))


_register(
    """linalg_cholesky_ex.default linalg_inv_ex.default linalg_qr.default _linalg_svd.default _linalg_eigh.default
    _linalg_det.default _linalg_slogdet.default linalg_matrix_exp.default linalg_lu_factor_ex.default
    cholesky_inverse.default linalg_householder_product.default linalg_lu.default""",
    _of_matrices,
)
_register("linalg_pinv.atol_rtol_tensor", _inverted)
_register("cholesky_solve.default", _from_factor)
_register("linalg_lu_solve.default", _from_factors)
_register("_linalg_solve_ex.default triangular_solve.default", _alike)
_register("linalg_solve_triangular.default", _triangular)
register(
    Op("aten._cdist_forward.default", _distance_factors, _distance_price, _distance_backward, saving("in0", "in1"))
)
register(
    Op(
        "aten.linalg_cross.default",
        _cross_factors,
        pass_of("elementwise", 5.0),
        lambda call: (pass_of("elementwise", 5.0)(call),) * 2,
        saving("in0", "in1"),
    )
)
