"""Groups of neighbouring replicas in one region: gradients are summed in them first, and a part crosses regions."""

from __future__ import annotations

from cost_model.cluster import Cluster
from cost_model.plan import Plan

MOST_SIZES = 2


def group_sizes(plan: Plan, cluster: Cluster) -> list[int]:
    """Of groups such that none spans two regions in any stage, the largest; none where all replicas lie in one."""
    network, mesh = cluster.network, plan.mesh(0)
    if network is None or plan.meshes_differ or mesh.dp < 2:
        return []
    rows = network.regions_by_device[list(plan.placement)].reshape(plan.pp, mesh.dp, mesh.tp)
    if (rows == rows[:, :1]).all():
        return []
    sizes = [size for size in range(2, mesh.dp) if mesh.dp % size == 0]
    grids = {size: rows.reshape(plan.pp, -1, size, mesh.tp) for size in sizes}
    inside = [size for size, grid in grids.items() if (grid == grid[:, :, :1]).all()]
    return inside[::-1][:MOST_SIZES]
