"""The fast engine's parts: a plan of operations, made once from a description, and its compiled loops."""
