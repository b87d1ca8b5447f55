"""``python -m lightning_n2uq``, the same as the ``n2uq`` command."""

import sys

from lightning_n2uq.cli import main

if __name__ == "__main__":
    sys.exit(main())
