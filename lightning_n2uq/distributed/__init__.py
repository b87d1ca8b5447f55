"""The compressed gradient exchange, for plain PyTorch and for the Lightning strategies.

Reading order: `exchange` (the story) -> `phases` -> `collectives` -> `partition` -> `pipeline` -> `hook`.
"""

from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.hook import NUQSGDState, nuqsgd_hook

__all__ = ["ExchangeConfig", "NUQSGDState", "nuqsgd_hook"]
