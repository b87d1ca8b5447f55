"""Engines that execute a deployed network."""
