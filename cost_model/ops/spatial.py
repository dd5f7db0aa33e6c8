"""Ops over images: pooling, resizing, padding of borders, patches.

Batch and channels are parallel; spatial dims are where windows lie side by side, and whole elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import Op, OpCall, pass_of, register, register_priced, saves_nothing, saving, sweep
from cost_model.program import OpCost

POOL_FLOPS = 9.0
"""Comparisons or additions per output element: a window of three by three, by convention."""


def _spatial_factors(count: int) -> Callable[[OpCall], FactorMap]:
    """The last ``count`` dims are whole, of each tensor its own; those before are parallel."""

    def factors(call: OpCall) -> FactorMap:
        before, after = (" ".join(f"{kind}{i}" for i in range(count)) for kind in ("x", "y"))
        operands = ", ".join(f"... {before}" for _ in call.inputs)
        outs = ", ".join(f"... {after}" for _ in call.outputs)
        linear = ((0,),) if call.op in _LINEAR else ()
        return parse_map(f"{operands} -> {outs}", call.inputs, call.outputs, whole=f"{before} {after}", linear=linear)

    return factors


def _pool_factors(count: int) -> Callable[[OpCall], FactorMap]:
    """As all ops over images; a dim whose windows lie side by side is (window, place in it)."""

    def factors(call: OpCall) -> FactorMap:
        before, after, whole, sizes = [], [], [], {}
        for i in range(count):
            extent = _side_by_side(call, i, count)
            before.append(f"(y{i} k{i})" if extent else f"x{i}")
            after.append(f"y{i}")
            whole += [f"k{i}"] if extent else [f"x{i}", f"y{i}"]
            sizes.update({f"k{i}": extent} if extent else {})
        notation = f"... {' '.join(before)} -> ... {' '.join(after)}"
        linear = ((0,),) if call.op in _LINEAR else ()
        return parse_map(notation, call.inputs, call.outputs, whole=" ".join(whole), linear=linear, sizes=sizes)

    return factors


def _side_by_side(call: OpCall, dim: int, count: int) -> int:
    """Extent of a pool's windows along spatial dim ``dim`` where they cover it and do not overlap, else 0."""
    source, made = (meta.shape[len(meta.shape) - count + dim] for meta in (call.inputs[0], call.outputs[0]))
    kernel, stride, padding, dilation = (
        _setting(call, name, dim) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    is_plain = kernel > 1 and stride in (0, kernel) and padding == 0 and dilation in (0, 1)
    return kernel if is_plain and source == made * kernel else 0


def _setting(call: OpCall, name: str, dim: int) -> int:
    """One number of an argument that has one for each dim or for all; 0 where none is given."""
    value = call.args.get(name)
    listed = list(value) if isinstance(value, list | tuple) else [value]
    number = listed[dim % len(listed)] if listed else 0
    return number if isinstance(number, int) else 0


def _scattered(call: OpCall) -> tuple[OpCost, ...]:
    """The gradient is spread over the windows it came from."""
    (source, *_), (out, *_) = call.inputs, call.outputs
    return (sweep("scatter", source, out, flops=POOL_FLOPS * out.numel),) if source.is_floating else ()


_POOLS = {"max_pool": _pool_factors, "avg_pool": _pool_factors, "adaptive_avg_pool": _spatial_factors}
_LINEAR = {f"aten.{kind}avg_pool{d}d.default" for kind in ("", "adaptive_") for d in (1, 2, 3)} | {
    "aten._adaptive_avg_pool2d.default"
}
for _d in (1, 2, 3):
    for _name, _factors in _POOLS.items():
        _saves = saving("in0") if "max" in _name else saves_nothing
        register(Op(f"aten.{_name}{_d}d.default", _factors(_d), pass_of("reduction", POOL_FLOPS), _scattered, _saves))
for _name, _d in (
    ("max_pool2d_with_indices", 2), ("max_pool3d_with_indices", 3),
    ("adaptive_max_pool2d", 2), ("adaptive_max_pool3d", 3),
):  # fmt: skip
    register(
        Op(
            f"aten.{_name}.default",
            _spatial_factors(_d),
            pass_of("reduction", POOL_FLOPS),
            _scattered,
            saving("in0", "out1"),
        )
    )
register(Op("aten._adaptive_avg_pool2d.default", _spatial_factors(2), pass_of("reduction"), _scattered, saves_nothing))
_RESIZED = """upsample_nearest1d:1 _upsample_nearest_exact1d:1 upsample_linear1d:1 upsample_nearest2d:2
_upsample_nearest_exact2d:2 upsample_bilinear2d:2 upsample_bicubic2d:2 _upsample_bilinear2d_aa:2
_upsample_bicubic2d_aa:2 upsample_nearest3d:3 _upsample_nearest_exact3d:3 upsample_trilinear3d:3"""
_LINEAR |= {f"aten.{item.split(':')[0]}.{end}" for item in _RESIZED.split() for end in ("default", "vec")}
for _item in _RESIZED.split():
    _name, _count = _item.split(":")
    for _end in ("default", "vec"):
        register(
            Op(f"aten.{_name}.{_end}", _spatial_factors(int(_count)), pass_of("gather"), _scattered, saves_nothing)
        )
for _name, _d in (
    ("reflection_pad1d", 1), ("reflection_pad2d", 2), ("replication_pad1d", 1), ("replication_pad2d", 2),
):  # fmt: skip
    _LINEAR.add(f"aten.{_name}.default")
    register(Op(f"aten.{_name}.default", _spatial_factors(_d), pass_of("gather"), _scattered, saves_nothing))


def _shuffle_factors(call: OpCall) -> FactorMap:
    """Channels are (c r r): what moves into the image is whole, all else parallel."""
    factor = call.args.get("upscale_factor") or call.args.get("downscale_factor")
    assert isinstance(factor, int)
    inward = "... (c r s) h w -> ... c (h r) (w s)"
    outward = "... c (h r) (w s) -> ... (c r s) h w"
    notation = inward if "unshuffle" not in call.op else outward
    sizes = {"r": factor, "s": factor}
    return parse_map(notation, call.inputs, call.outputs, whole="r s", linear=((0,),), sizes=sizes)


for _name in ("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default"):
    register(
        Op(_name, _shuffle_factors, pass_of("copy", 0.0), lambda call: (pass_of("copy", 0.0)(call),), saves_nothing)
    )


def _patches_factors(call: OpCall) -> FactorMap:
    """Patches of [n, (c), h, w] as [n, (c k), positions] and back: the batch is parallel, channels outermost."""
    inside, outside = ("c h w", "(c k) l") if "im2col" in call.op else ("(c k) l", "c h w")
    channels = call.inputs[0].shape[-3] if "im2col" in call.op else call.outputs[0].shape[-3]
    return parse_map(
        f"... {inside} -> ... {outside}",
        call.inputs,
        call.outputs,
        whole="h w k l",
        linear=((0,),),
        sizes={"c": channels},
    )


for _name in ("aten.im2col.default", "aten.col2im.default"):
    register(Op(_name, _patches_factors, pass_of("gather"), _scattered, saves_nothing))


def _grid_factors(call: OpCall) -> FactorMap:
    """Places of the grid are parallel; any of them may lie anywhere in the image."""
    dims = range(len(call.inputs[0].shape) - 2)
    source, places = (" ".join(f"{letter}{d}" for d in dims) for letter in "xy")
    notation = f"n c {source}, n {places} at -> n c {places}"
    return parse_map(notation, call.inputs, call.outputs, whole=f"{source} at", linear=((0,),))


for _name in ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"):
    register(Op(f"aten.{_name}.default", _grid_factors, pass_of("gather", 8.0), _scattered, saving("in0", "in1")))

register_priced(
    """aten.max_pool2d_with_indices_backward.default aten.avg_pool2d_backward.default aten.avg_pool3d_backward.default
    aten.max_pool3d_with_indices_backward.default aten._adaptive_avg_pool2d_backward.default
    aten.adaptive_max_pool2d_backward.default
    aten.upsample_nearest1d_backward.default aten.upsample_nearest2d_backward.default
    aten._upsample_nearest_exact2d_backward.default
    aten.upsample_linear1d_backward.default aten.upsample_bilinear2d_backward.default
    aten.upsample_bicubic2d_backward.default aten.upsample_nearest3d_backward.default
    aten.upsample_trilinear3d_backward.default aten.reflection_pad1d_backward.default
    aten.reflection_pad2d_backward.default aten.replication_pad1d_backward.default
    aten.replication_pad2d_backward.default aten.grid_sampler_2d_backward.default
    aten.grid_sampler_3d_backward.default aten.adaptive_max_pool3d_backward.default
    aten._upsample_bilinear2d_aa_backward.default aten._upsample_bicubic2d_aa_backward.default""",
    pass_of("scatter"),
)
