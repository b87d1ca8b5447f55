"""Accuracy studies: a list of runs worked off by `n2uq fit` itself, for as many hours as the machine has."""
