"""Cross entropy of classes that ranks share: each has a softmax of its own, and a part in that of all."""

from __future__ import annotations

import pytest
import torch

from autopar.runtime.kernels import class_gradients, class_shares

RANKS, ROWS, OWN = 3, 7, 8


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_parts_are_the_whole_also_where_a_rank_has_only_masked_classes(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(ROWS, RANKS * OWN, generator=generator, dtype=torch.float64)).to(dtype)
    logits[:, 2 * OWN :] = -torch.inf
    labels = torch.randint(0, 2 * OWN, (ROWS,), generator=generator)
    labels[2] = -100
    whole = logits.double().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(whole, labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, whole)
    made = [class_shares(part) for part in logits.chunk(RANKS, 1)]
    log_sums = torch.stack([log_sum for _, log_sum in made])
    parts = log_sums.softmax(0)
    weight = (labels != -100).to(parts.dtype)
    gradients = []
    for rank, (shares, _) in enumerate(made):
        ids = labels - rank * OWN
        ids = torch.where((ids >= 0) & (ids < OWN) & (weight > 0), ids, -1)
        gradients.append(class_gradients(shares, weight * parts[rank], weight, ids, dtype))
    total = (weight * (log_sums.logsumexp(0) - logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1))).sum()
    assert total.item() == pytest.approx(loss.item(), rel=max(tolerance, 1e-6))
    torch.testing.assert_close(torch.cat(gradients, 1).double(), expected, rtol=tolerance, atol=tolerance)
