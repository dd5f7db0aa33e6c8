"""The public Cluster: shipped or written files, matrices, or this machine."""

from __future__ import annotations

from typing import Self

from cost_model.cluster import Cluster as PricedCluster


class Cluster(PricedCluster):
    """A cluster to plan for and run on: ``load``, ``from_matrix``, or ``local``."""

    @classmethod
    def local(cls, num_devices: int) -> Self:
        """This machine as ``num_devices`` ranks, measured once and kept in the user's cache.

        Ranks are CUDA devices on nccl where there are enough, else processes of one thread on gloo.
        """
        from autopar.calibrate import local_cluster

        found = local_cluster(num_devices)
        return cls(found.name, found.devices, found.levels, found.backend, found.network, crowding=found.crowding)
