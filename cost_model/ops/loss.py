"""Losses: sums over samples, so that shards and microbatches add up."""

from __future__ import annotations

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import TRANSCENDENTAL_FLOPS
from cost_model.ops.norm import SOFTMAX_FLOPS
from cost_model.ops.rows import alike
from cost_model.ops.table import (
    INSIDE,
    INSIDE_COSTS,
    WITHIN_BACKWARD,
    Op,
    OpCall,
    backward_only,
    bytes_moved,
    no_backward,
    pass_of,
    register,
    register_priced,
    saves_nothing,
    saving,
    sweep,
)
from cost_model.placement import Shard
from cost_model.program import OpCost
from cost_model.tensor import DTYPE_BYTES, TensorMeta


def _cross_entropy_factors(call: OpCall) -> FactorMap:
    """Samples are summed; classes may be split inside (all_reduces of a number a row), unless labels are smoothed."""
    smoothed = bool(call.args.get("label_smoothing"))
    return parse_map(
        "n v, n -> ",
        call.inputs,
        call.outputs,
        inside="" if smoothed else "v",
        whole="v" if smoothed else "",
        ordered="v",
    )


def _reductions(local: OpCall, place: Shard, ranks: int) -> tuple[tuple[str, int], ...]:
    """The rows' maxima, then sums and targets together, in float32."""
    rows = local.inputs[0].shape[0] * 4
    return ("all_reduce", rows), ("all_reduce", 2 * rows)


def _class_shares_price(call: OpCall) -> OpCost:
    """The softmax of each row; the largest before and after."""
    (logits,), (shares, rows) = call.inputs, call.outputs
    return sweep("softmax", logits, logits, shares, shares, rows, flops=SOFTMAX_FLOPS * shares.numel)


def _class_gradients_price(call: OpCall) -> OpCost:
    """A product of each element, and a pass over rows of which all classes are masked."""
    (gradient,) = call.outputs
    return sweep("softmax_backward", *call.inputs, gradient, gradient, gradient, flops=2 * gradient.numel)


def _split_costs(local: OpCall) -> tuple[OpCost, ...]:
    """A softmax of a rank's classes, and their gradients."""
    logits, labels = local.inputs[:2]
    dtype = "float32" if DTYPE_BYTES[logits.dtype] < 4 else logits.dtype
    shares, rows = TensorMeta(logits.shape, dtype), TensorMeta(logits.shape[:1], dtype)
    made = OpCall("", (logits,), (shares, rows), {})
    return _class_shares_price(made), _class_gradients_price(OpCall("", (shares, rows, rows, labels), (logits,), {}))


def _cross_entropy_price(call: OpCall) -> OpCost:
    """log_softmax of the logits, which is kept for the backward, then one element a row."""
    logits, labels = call.inputs[:2]
    return sweep("loss", logits, logits, labels, *call.outputs, flops=SOFTMAX_FLOPS * logits.numel)


def _cross_entropy_backward(call: OpCall) -> tuple[OpCost, ...]:
    """nll_loss_backward writes one element a row into zeros; the softmax's backward reads that and its result."""
    logits, labels = call.inputs[:2]
    return (
        sweep("loss_backward", logits, labels),
        sweep("softmax_backward", logits, logits, logits, flops=4 * logits.numel),
    )


def _count_factors(call: OpCall) -> FactorMap:
    return parse_map("n -> ", call.inputs, call.outputs)


def _nll_price(call: OpCall) -> OpCost:
    """Reads the labels and one element a row."""
    source, rows = call.inputs[:2]
    picked = rows.numel * source.nbytes / max(source.numel, 1)
    outputs = sum(m.nbytes for m in call.outputs)
    return OpCost("loss", float(rows.numel), rows.nbytes + picked + outputs, source.dtype)


def _nll_backward_price(call: OpCall) -> OpCost:
    """Writes zeros of the size of the log-probabilities, then one element a row."""
    gradient, _, labels = call.inputs[:3]
    return sweep("loss_backward", *call.outputs, labels, gradient, flops=labels.numel)


register(
    Op(
        name="autopar.cross_entropy_sum.default",
        factors=_cross_entropy_factors,
        price=_cross_entropy_price,
        backward_price=_cross_entropy_backward,
        saves=saving("in0", "in1"),
    )
)
INSIDE["autopar.cross_entropy_sum.default"] = _reductions
INSIDE_COSTS["autopar.cross_entropy_sum.default"] = _split_costs
register_priced("autopar.class_shares.default", _class_shares_price)
register_priced("autopar.class_gradients.default", _class_gradients_price)
WITHIN_BACKWARD["autopar.cross_entropy_sum.default"] = lambda call: call.inputs[0].nbytes  # of log probabilities
register(
    Op(
        name="autopar.count_labels.default",
        factors=_count_factors,
        price=lambda call: sweep("reduction", *call.inputs, *call.outputs),
        backward_price=no_backward,
        saves=saves_nothing,
    )
)
register(
    Op(
        name="aten.cross_entropy_loss.default",
        factors=backward_only,
        price=_cross_entropy_price,
        backward_price=_cross_entropy_backward,
        saves=saving("in0", "in1"),
    )
)
register_priced("aten.nll_loss_forward.default", _nll_price)
register_priced("aten.nll_loss_backward.default", _nll_backward_price)


def _pointwise_factors(call: OpCall) -> FactorMap | None:
    """Losses of each element; what is reduced inside the op is not split (``clean`` takes the reduction out)."""
    if call.args.get("reduction") != 0:
        return None
    return parse_map(f"{', '.join(['...'] * len(call.inputs))} -> ...", call.inputs, call.outputs)


def _pointwise_backward(call: OpCall) -> tuple[OpCost, ...]:
    out = call.inputs[0]
    return (sweep("elementwise", out, out, *call.inputs, flops=4 * out.numel),) if out.is_floating else ()


def _pointwise_price(call: OpCall) -> OpCost:
    return sweep("loss", *call.inputs, *call.outputs, flops=8 * call.inputs[0].numel)


POINTWISE = (
    "binary_cross_entropy_with_logits binary_cross_entropy mse_loss l1_loss smooth_l1_loss huber_loss kl_div "
    "soft_margin_loss poisson_nll_loss margin_ranking_loss hinge_embedding_loss"
)
"""Losses of one number an element, with an argument ``reduction``."""
_PLAIN = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
"""Those without a logarithm."""
for _name in POINTWISE.split():
    _price = alike("aten.mse_loss.default", _pointwise_price) if _name in _PLAIN else _pointwise_price
    register(Op(f"aten.{_name}.default", _pointwise_factors, _price, _pointwise_backward, saving("in0", "in1")))
register_priced(
    """aten.binary_cross_entropy_backward.default aten.mse_loss_backward.default aten.smooth_l1_loss_backward.default
    aten.huber_loss_backward.default aten.soft_margin_loss_backward.default""",
    pass_of("elementwise", 4.0),
)


CTC_FLOPS = 4 * TRANSCENDENTAL_FLOPS
"""Of a place between labels at a step: three exps and a logarithm (Graves et al., ICML 2006, equation 6)."""


def _ctc_cost(call: OpCall, passes: int) -> OpCost:
    """Every step visits the labels of each sample and the blanks around them; passes: forward, once more and back."""
    likely, labels = call.inputs[-4:-2]
    steps, samples, _ = likely.shape
    states = TensorMeta((samples, steps, 2 * labels.shape[-1] + 1), likely.dtype)
    moved = bytes_moved(call) + passes * states.nbytes
    return OpCost("transcendental", passes * CTC_FLOPS * states.numel, float(moved), likely.dtype)


register(
    Op(
        "autopar.ctc.default",
        lambda call: parse_map("t b c, b s, b, b -> b", call.inputs, call.outputs, whole="t c s"),
        lambda call: _ctc_cost(call, 1),
        lambda call: (_ctc_cost(call, 2),),
        saving("in0", "in1", "in2", "in3"),
    )
)
register_priced("autopar.ctc_backward.default", lambda call: _ctc_cost(call, 2))
