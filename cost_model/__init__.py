"""Nouns and prices: hardware, tensors, placements, ops, programs, plans, estimates.

Imports nothing but the standard library and numpy; never torch, never a solver.
"""

PACKAGE = "autopar"
