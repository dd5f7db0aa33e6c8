"""Notes on a model, before anything is planned."""

from __future__ import annotations

from collections import ChainMap

from torch import nn

from autopar.weights import ModelValues
from cost_model.precision import Precision
from passes.batch import BatchAnalysis
from passes.constant import check_constant
from passes.graph import ModelGraph
from passes.random_vocabulary import DRAWING, DROPOUT
from passes.replicas import exchange_between_replicas, exchange_notes
from passes.trace import Traced


def analysed(traced: Traced, model: nn.Module) -> tuple[Traced, BatchAnalysis, tuple[str, ...]]:
    """The model with what replicas exchange, and how the batch splits, with what was assumed about ambient values
    checked."""
    traced, analysis = exchange_between_replicas(traced)
    known = ChainMap(dict(traced.constants), ModelValues(model))  # type: ignore[arg-type]
    analysis, notes = check_constant(traced, analysis, known)
    if analysis.reason is not None:
        notes = (*notes, f"the batch stays whole (dp=1, one microbatch): {analysis.reason}")
    notes = (*notes, *exchange_notes(traced.global_graph, analysis.synchronised))
    return traced, analysis, notes


def scaling_notes(precision: Precision) -> tuple[str, ...]:
    if not precision.scales_loss:
        return ()
    return ("gradients pass through fp16: the loss is scaled, and an update with an infinite gradient is skipped",)


def random_notes(model: ModelGraph, seed: int) -> tuple[str, ...]:
    """That random numbers are autopar's own, and attention that is computed otherwise for their sake."""
    calls = sum(n.target in DRAWING for n in model.nodes())
    attentions = sum(n.target is DROPOUT and "softmax" in str(n.args[0]) for n in model.nodes())
    if not calls:
        return ()
    drawn = f"{calls} random calls draw from seed {seed}: the same numbers under every plan, other than torch's own"
    if not attentions:
        return (drawn,)
    return drawn, f"{attentions} attentions with dropout are not fused: their weights are kept in memory"
