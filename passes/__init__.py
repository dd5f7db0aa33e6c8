"""torch.fx from trace to code: each pass is one file and leaves a valid graph.

trace -> clean -> specialise -> analyse the batch -> segment -> cut stages -> shard -> joint -> split -> lower -> code
"""

PACKAGE = "autopar"
