"""Workspace of convolutions, plain and transposed: copies of operands and results as oneDNN lays them out.

Found from the allocations of torch 2.13 (oneDNN 3) with AVX-512 and with AVX2, as the rest (``passes/workspace.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

_BOOKKEEPING = 4096  # bytes beside the copies: 128 to 2 KiB were seen
_IS_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
_BLOCK = 8 if _IS_AVX2 else 16  # channels that oneDNN lays side by side: one to each place of a register
_COLOURS = (3,) if _IS_AVX2 else (1, 2, 3)  # channels of images that the gradient of a weight reads as they are
_NARROW = 8  # channels of a group for which kernels for steps and those of a weight's gradient are not made
_GROUP = _NARROW if _IS_AVX2 else 4  # channels that kernels for groups lay side by side
_SMALL_NUMEL, _SMALL_KERNEL, _MANY_SAMPLES = 20480, 3, 16  # aten/src/ATen/native/Convolution.cpp, use_mkldnn
_PAGES, _TABLES = 16 * 1024, 20 * 1024 + 152  # bytes that a transposed one works in as it steps: unit, what all take
_VOLUME = 5  # dimensions of [batch, channels, depth, height, width], whose products are of copies of their own
_PATCHES = 1024**2  # bytes of a matrix of patches that a forward makes at a time: up to 0.9 MiB were seen
_WIDE = 32  # output channels of its weights that lie side by side, where there are more


def convolution_bytes(node: fx.Node) -> int:
    """Of one ``aten.convolution``."""
    source, weight, bias, *window = node.args
    call, out = _Convolution(source, weight, *window), _value(node)
    needed = _transposed(call, out, has_bias=bias is not None) if call.is_transposed else _plain(call, out)
    return needed + _straightened(call.source)


def convolution_backward_bytes(node: fx.Node) -> int:
    """Of one ``aten.convolution_backward``."""
    gradient, source, weight, _, *window, wanted = node.args
    call, above = _Convolution(source, weight, *window), _value(gradient)
    return _backward(call, above, wanted) + _straightened(call.source, above)


class _Convolution:
    """One call's operands, and their bytes as oneDNN lays them out: channels in blocks, filled up with zeros."""

    def __init__(
        self, source: Any, weight: Any, stride: Any, padding: Any, dilation: Any, transposed: Any, _: Any, groups: Any
    ) -> None:
        self.source, self.weight = _value(source), _value(weight)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.is_transposed, self.groups = transposed, groups

    @property
    def is_product(self) -> bool:
        """Kernels of one element over few samples: a plain product."""
        is_dense = not self.steps and not self.is_dilated
        return self.is_by_position and is_dense and self.source.shape[0] < _MANY_SAMPLES

    @property
    def is_small(self) -> bool:
        """One small sample: a product with a matrix of patches."""
        sides, numel = self.weight.shape[2:][-2:], math.prod(self.source.shape[:4])
        is_large = len(sides) == 2 and all(size > _SMALL_KERNEL for size in sides)
        return self.groups == 1 and not is_large and len(self.source) == 1 and numel <= _SMALL_NUMEL

    def blocked(self, x: Tensor) -> int:
        """Bytes of an image [batch, channels, ...]."""
        return _nbytes(x) * _filled(x.shape[1]) // x.shape[1]

    @property
    def steps(self) -> bool:
        return any(step != 1 for step in self.stride)

    @property
    def is_dilated(self) -> bool:
        return any(apart != 1 for apart in self.dilation)

    @property
    def is_by_position(self) -> bool:
        """Kernels of one element."""
        return all(size == 1 for size in self.weight.shape[2:])

    @property
    def is_by_channel(self) -> bool:
        """Each channel alone."""
        return self.groups > 1 and tuple(self.weight.shape[:2]) == (self.groups, 1)

    @property
    def is_plain(self) -> bool:
        """Whether images to be convolved are read as they are: of less channels than a block has."""
        return bool(self.groups == 1 and self.weight.shape[1] < _BLOCK) and not self.is_by_position

    def read(self, image: Tensor) -> int:
        """Bytes that are copied of an image to be convolved and of its weights."""
        if self.is_plain:
            return self.weights * self.weight.shape[1] // _filled(self.weight.shape[1])
        return self.blocked(image) + self.weights

    def summed(self, image: Tensor) -> tuple[int, int]:
        """Bytes of the copies for the gradient of the weight: of the image that was convolved, and of the gradient."""
        channels = image.shape[1]
        if self.groups > 1 or self.is_by_position or channels > _NARROW:
            return self.blocked(image), self.weights
        weights = self.weights // _filled(channels)
        if channels in _COLOURS:
            return 0, weights * channels
        return _nbytes(image) * _NARROW // channels, weights * _NARROW

    def gathered(self, positions: int) -> int:
        """What is read of one image, laid side by side, where kernels of one element step over the rest."""
        if not self.is_by_position or not self.steps:
            return 0
        return _filled(self.source.shape[1]) * positions * self.source.element_size()

    @property
    def weights(self) -> int:
        """Bytes of [channels, channels of a group, ...], of which both fill blocks."""
        first, second = self.weight.shape[:2]
        filled = 1 if self.groups > 1 else _filled(first) * _filled(second) / (first * second)
        return round(_nbytes(self.weight) * filled)

    @property
    def stepping_weights(self) -> int:
        """Bytes of those of which the second alone do, blocks of their own."""
        second = self.weight.shape[1]
        filled = _rounded(second, _BLOCK if second <= _WIDE else _WIDE)
        return _nbytes(self.weight) * filled // second

    def fills(self, unit: int) -> bool:
        """Whether the channels of a group fill blocks of so many, or each channel is alone."""
        apart = self.weight.shape[0] // self.groups, self.weight.shape[1]
        return self.groups == 1 or self.is_by_channel or all(count % unit == 0 for count in apart)

    @property
    def is_stepping(self) -> bool:
        """Whether a kernel for steps returns an image, which reads and writes it as it is: of wide groups."""
        if not self.steps or self.is_dilated or self.is_by_channel:
            return False
        narrow = _BLOCK if self.fills(_GROUP) and not self.is_transposed else _NARROW
        return self.groups == 1 or bool(self.weight.shape[0] // self.groups > narrow)

    @property
    def returns_patches(self) -> bool:
        """Whether a product with a matrix of patches returns an image: of groups that fill no blocks."""
        return (self.is_dilated and self.steps) or not (self.fills(_GROUP) or self.is_stepping)

    @property
    def is_far(self) -> bool:
        """Whether elements of kernels lie beyond the image, and apart or in a volume."""
        of = zip(self.weight.shape[2:], self.dilation, self.padding, self.source.shape[2:], strict=True)
        reaches = [((kernel - 1) * apart + 1, padding, size) for kernel, apart, padding, size in of]
        is_dilated = self.is_dilated or self.source.dim() == _VOLUME
        return is_dilated and any(reach > size or 2 * padding >= reach for reach, padding, size in reaches)

    @property
    def may_read_patches(self) -> bool:
        """Whether a forward of elements that lie apart is such a product, or is not: by more than is known here."""
        return self.is_dilated and (_IS_AVX2 or self.is_by_channel or self.is_far)

    @property
    def sums_patches(self) -> bool:
        """Whether such a product makes the gradient of the weight."""
        channels = self.weight.shape[1]
        is_blocked = self.fills(_BLOCK) and (self.is_by_channel or channels >= _BLOCK or channels in _COLOURS)
        if self.is_dilated and (_IS_AVX2 or self.steps or not is_blocked):
            return True
        if self.is_by_channel:
            return self.is_dilated or any(size > _SMALL_KERNEL for size in self.weight.shape[2:])
        return self.is_far or not self.fills(_NARROW)

    def patches(self, positions: int) -> int:
        return math.prod(self.weight.shape[1:]) * positions * self.source.element_size()


def _plain(call: _Convolution, out: Tensor) -> int:
    """Copies of the operands, and the result before it is laid out plainly."""
    positions = math.prod(out.shape[2:])
    if call.is_product:
        return _of_groups(call, _nbytes(call.source), _nbytes(out))
    if call.is_small:
        return call.patches(positions)
    made, patches = call.blocked(out), min(call.patches(positions), _PATCHES)
    if not call.fills(_GROUP):
        return max(patches, _nbytes(out)) + _BOOKKEEPING
    copies = call.read(call.source) + made - _nbytes(out) + call.gathered(positions)
    return max(copies, made, patches if call.may_read_patches else 0) + _BOOKKEEPING


def _transposed(call: _Convolution, out: Tensor, *, has_bias: bool) -> int:
    positions = math.prod(call.source.shape[2:])
    if call.is_product and call.groups > 1:
        return _of_groups(call, _nbytes(call.source) + _nbytes(out), _nbytes(out))
    if call.is_product or call.is_small:
        return len(call.source) * call.patches(positions)
    return max(_returned(call, call.source, out, has_bias=has_bias)) + _BOOKKEEPING


def _of_groups(call: _Convolution, read: int, made: int) -> int:
    """Products of groups of channels, one after the other: copies of what one reads, and results that are joined."""
    return max(made, read // call.groups) if call.groups > 1 else 0


def _backward(call: _Convolution, gradient: Tensor, wanted: Any) -> int:
    """First the gradient of the input, then those of weight and bias, each from copies of its own."""
    of_source, of_weight, of_bias = wanted
    weight, source = _nbytes(call.weight) * of_weight, _nbytes(call.source) * of_source
    convolved, inner = (gradient, call.source) if call.is_transposed else (call.source, gradient)
    positions = math.prod(inner.shape[2:])
    if call.is_product:
        columns = source if call.source.dim() == _VOLUME else 0
        read = _nbytes(call.source) + _nbytes(gradient)
        return max(columns, _of_groups(call, read, weight + source)) + _BOOKKEEPING
    if call.is_small:
        return call.patches(positions) + _BOOKKEEPING
    needs = [_for_weight(call, convolved, inner)] if of_weight or of_bias else []
    if of_source:
        needs += [need - weight for need in _for_source(call, gradient)]
    return max(needs) + _BOOKKEEPING


def _for_weight(call: _Convolution, convolved: Tensor, inner: Tensor) -> int:
    """Beyond the gradients of the operands."""
    weight, positions = _nbytes(call.weight), math.prod(inner.shape[2:])
    if call.sums_patches:
        return call.patches(positions) + 4 * weight
    read, summed = call.summed(convolved)
    copies = read + call.blocked(inner) + summed + call.gathered(positions)
    return max(copies - weight, summed + len(call.weight) * call.weight.element_size())


def _for_source(call: _Convolution, gradient: Tensor) -> tuple[int, int]:
    """Beyond the gradient of the image; a transposed one's is what a plain one returns."""
    if not call.is_transposed:
        return _returned(call, gradient, call.source, has_bias=False)
    if not call.fills(_GROUP):
        return call.patches(math.prod(call.source.shape[2:])), _nbytes(call.source)
    made = call.blocked(call.source)
    return call.read(gradient) + made - _nbytes(call.source), made


def _returned(call: _Convolution, given: Tensor, made: Tensor, *, has_bias: bool) -> tuple[int, int]:
    """What it takes beyond an image to return it to where a convolution has it from: before it is there, and after. A
    bias is added to a copy."""
    if call.returns_patches:
        biased = _nbytes(made) if has_bias else 0
        return call.patches(math.prod(given.shape[2:])) + biased, _nbytes(made)
    if call.is_stepping:
        biased = _nbytes(made) if has_bias and not _is_even(call, made) else 0
        return biased + _nbytes(given) + call.stepping_weights + _stepping(call, given, made), 2 * _nbytes(made)
    blocked = call.blocked(made)
    copies = (2 * blocked if has_bias else blocked) + call.blocked(given) + call.weights
    return copies - _nbytes(made), blocked


def _is_even(call: _Convolution, made: Tensor) -> bool:
    """Whether every step makes as many elements: one kernel does all then, the bias with the rest."""
    return all(size % step == 0 for size, step in zip(made.shape[2:], call.stride, strict=True))


def _stepping(call: _Convolution, given: Tensor, made: Tensor) -> int:
    """What a kernel for steps works in: one image with margins, and where steps make elements unevenly the rows of one
    step."""
    size = given.element_size()
    of = zip(call.weight.shape[2:], call.padding, call.stride, given.shape[2:], made.shape[2:], strict=True)
    sides = [
        side + max(0, (kernel - 1 - padding) // step) + max(0, (far - 1 + padding) // step - side + 1)
        for kernel, padding, step, side, far in of
    ]
    needed = _TABLES + _rounded(given.shape[1] * math.prod(sides) * size, _PAGES)
    if not _is_even(call, made):
        row = _rounded(made.shape[-1], _BLOCK) * _filled(made.shape[1]) * size
        needed += _BOOKKEEPING + _rounded(call.stride[0] * row, _PAGES)
    return needed


def _straightened(*images: Tensor) -> int:
    """Copies of those that do not lie element after element, as the gradient of a mean over an image."""
    return sum(_nbytes(image) for image in images if not image.is_contiguous())


def _filled(channels: int) -> int:
    return _rounded(channels, _BLOCK)


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _value(node: Any) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value
