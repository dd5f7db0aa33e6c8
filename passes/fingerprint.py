"""Fingerprint: ties a plan to the graph it was made for."""

from __future__ import annotations

import hashlib

from passes.graph import ModelGraph


def fingerprint(model: ModelGraph) -> str:
    """16 hex digits over calls, arguments, shapes and the names of parameters; equal for equal models and batches."""
    lines = [f"{i.kind} {i.target} {i.trainable} {model.metas[i.node]}" for i in model.inputs]
    lines += [f"{n.name} {n.target} {n.args} {dict(n.kwargs)} {model.metas[n.name]}" for n in model.nodes()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
