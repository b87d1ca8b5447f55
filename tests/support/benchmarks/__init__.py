"""The `benchmarks` of the repository's root, without the root on `sys.path`.

There, `callbacks` and `datamodules` could be imported a second time, beside `lightning_n2uq.callbacks`.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[3] / "benchmarks")]
