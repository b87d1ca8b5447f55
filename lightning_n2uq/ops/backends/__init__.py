"""The implementations behind the custom operators: plain torch, CPU (numba), CUDA (Triton).

The same file names, functions and signatures in `reference`, `numba` and `triton`; what several share is
in `common`. `lightning_n2uq.ops.dispatch` selects one and imports it at its first use.
"""
