"""What the search takes for gradients that are summed: the price of one message as large as all of them."""

from __future__ import annotations

import pytest
from models import example_gpt
from parity import cpu_cluster

from autopar.options import Options
from autopar.planning import Job
from cost_model.placement import REPLICATE


def test_gradients_of_equal_layers_share_one_message() -> None:
    """Without an optimizer a step is its reduction, latency counted once however many parameters there are."""
    model, batch = example_gpt(n_layer=4)
    cluster = cpu_cluster(2)
    job = Job.of(model, cluster, batch, Options.of(None, None, None, None, None, None))
    prices, metas = job.space.mesh_prices(2, (1,)), list(job.parameters.values())
    summed = sum(prices.parameter_step_s(meta, (REPLICATE,)) for meta in metas)
    whole = cluster.collective_time_s("all_reduce", sum(meta.nbytes for meta in metas), (0, 1))
    assert summed == pytest.approx(whole)
