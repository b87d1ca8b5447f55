"""Bodies of the multi-process tests of the gradient exchange; spawned processes import them from here."""
