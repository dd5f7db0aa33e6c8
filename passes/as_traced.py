"""As traced: all that stands in for calls of torch's own while a model is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from passes.adaptive_softmax import clusters_of_all_rows
from passes.alignment_vocabulary import alignments_of_samples
from passes.counts import counts_of_given_length
from passes.covariances import covariances_as_sums
from passes.functions import Functions
from passes.settled import settled_reads
from passes.trace_errors import quiet
from passes.watch import casts_of_modules, gradients_as_written, own_backwards


@contextmanager
def as_traced(functions: Functions) -> Iterator[None]:
    with own_backwards(functions), casts_of_modules(), gradients_as_written(), counts_of_given_length():
        with covariances_as_sums(), alignments_of_samples(), settled_reads(), clusters_of_all_rows(), quiet():
            yield
