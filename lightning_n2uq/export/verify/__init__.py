"""Comparisons of engines with each other and with the trained network."""
