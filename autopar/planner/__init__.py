"""The solver of the planner: it knows factors, chains and stages, and nothing of torch, ops or tensors.

``factor_graph`` states the problem of one segment, ``segment`` solves it for given prices of memory,
``chain`` puts segments in a row, ``columns`` prices every range of the row, ``paths`` tiles the row
with ranges, ``bounds`` proves what no plan can beat, ``ilp`` makes the exact choice among columns,
``configuration`` runs these for one mesh, and ``search`` looks over meshes, microbatch sizes and labels
of shared variables.
"""
