"""Calls of ops that only backward graphs hold, with the arguments they have there."""

from __future__ import annotations

from typing import Any

import torch

LINE, IMAGE, VOLUME = torch.rand(2, 3, 8), torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4, 4)
HALF_IMAGE, HALF_VOLUME = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2, 2)
CHANNELS = torch.rand(3)
PLACES = torch.zeros(2, 3, 4, 4, dtype=torch.int64)
X, Y = torch.rand(4, 6), torch.rand(4, 6)
POOL_2D, POOL_3D = ([2, 2], [2, 2], [0, 0]), ([2, 2, 2], [2, 2, 2], [0, 0, 0])
RESIZED = {1: (torch.rand(2, 3, 16), [16], [2, 3, 8]), 2: (torch.rand(2, 3, 16, 16), [16, 16], [2, 3, 8, 8])}
RESIZED_3D = (torch.rand(2, 3, 8, 8, 8), [8, 8, 8], [2, 3, 4, 4, 4])

BACKWARD: dict[str, tuple[Any, ...]] = {
    "_adaptive_avg_pool2d_backward.default": (HALF_IMAGE, IMAGE),
    "_fused_adagrad_.default": (*[[X, Y]] * 3, [torch.tensor(1.0)] * 2),
    "_upsample_nearest_exact2d_backward.default": RESIZED[2],
    "_upsample_bicubic2d_aa_backward.default": (*RESIZED[2], False),
    "_upsample_bilinear2d_aa_backward.default": (*RESIZED[2], False),
    "adaptive_max_pool2d_backward.default": (HALF_IMAGE, IMAGE, PLACES),
    "adaptive_max_pool3d_backward.default": (HALF_VOLUME, VOLUME, torch.zeros(2, 3, 2, 2, 2, dtype=torch.int64)),
    "avg_pool2d_backward.default": (HALF_IMAGE, IMAGE, *POOL_2D, False, True, None),
    "avg_pool3d_backward.default": (HALF_VOLUME, VOLUME, *POOL_3D, False, True, None),
    "convolution_backward.default": (
        torch.rand(2, 4, 8, 8), IMAGE, torch.rand(4, 3, 1, 1), [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, True, True],
    ),
    "cumprod_backward.default": (X, X, 1, X.cumprod(1)),
    "diagonal_backward.default": (torch.rand(4), [4, 6], 0, 0, 1),
    "glu_backward.default": (torch.rand(4, 3), X, 1),
    "grid_sampler_2d_backward.default": (HALF_IMAGE, IMAGE, torch.rand(2, 4, 4, 2), 0, 0, False, [True, True]),
    "grid_sampler_3d_backward.default": (
        HALF_VOLUME, VOLUME, torch.rand(2, 2, 2, 2, 3), 0, 0, False, [True, True],
    ),
    "huber_loss_backward.default": (X, X, Y, 0, 1.0),
    "max_pool2d_with_indices_backward.default": (HALF_IMAGE, IMAGE, *POOL_2D, [1, 1], False, PLACES),
    "max_pool3d_with_indices_backward.default": (
        HALF_VOLUME, VOLUME, *POOL_3D, [1, 1, 1], False, torch.zeros(2, 3, 2, 2, 2, dtype=torch.int64),
    ),
    "mse_loss_backward.default": (X, X, Y, 0),
    "native_batch_norm.default": (IMAGE, CHANNELS, CHANNELS, None, None, True, 0.1, 1e-5),
    "native_batch_norm_backward.default": (
        IMAGE, IMAGE, CHANNELS, None, None, CHANNELS, CHANNELS, True, 1e-5, [True, True, True],
    ),
    "native_group_norm.default": (IMAGE, CHANNELS, CHANNELS, 2, 3, 64, 3, 1e-5),
    "native_group_norm_backward.default": (
        IMAGE, IMAGE, torch.rand(2, 3), torch.rand(2, 3), CHANNELS, 2, 3, 64, 3, [True, True, True],
    ),
    "reflection_pad1d_backward.default": (torch.rand(2, 3, 10), LINE, [1, 1]),
    "reflection_pad2d_backward.default": (torch.rand(2, 3, 10, 10), IMAGE, [1, 1, 1, 1]),
    "replication_pad1d_backward.default": (torch.rand(2, 3, 10), LINE, [1, 1]),
    "replication_pad2d_backward.default": (torch.rand(2, 3, 10, 10), IMAGE, [1, 1, 1, 1]),
    "smooth_l1_loss_backward.default": (X, X, Y, 0, 1.0),
    "soft_margin_loss_backward.default": (X, X, Y, 0),
    "unfold_backward.default": (torch.rand(4, 3, 2), [4, 6], 1, 2, 2),
    "upsample_bicubic2d_backward.default": (*RESIZED[2], False),
    "upsample_bilinear2d_backward.default": (*RESIZED[2], False),
    "upsample_linear1d_backward.default": (*RESIZED[1], False),
    "upsample_nearest1d_backward.default": RESIZED[1],
    "upsample_nearest2d_backward.default": RESIZED[2],
    "upsample_nearest3d_backward.default": RESIZED_3D,
    "upsample_trilinear3d_backward.default": (*RESIZED_3D, False),
    "value_selecting_reduction_backward.default": (
        torch.rand(4), 1, torch.zeros(4, dtype=torch.int64), [4, 6], False,
    ),
}  # fmt: skip
