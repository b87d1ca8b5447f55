"""The compressed gradient exchange, for plain PyTorch and for the Lightning strategies.

Reading order: `partition` -> `collectives` -> `phases` -> `chain` -> `pipeline` -> `exchange` -> `state`
-> `hook`.
"""

from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.hook import nuqsgd_hook
from lightning_n2uq.distributed.state import NUQSGDState

__all__ = ["ExchangeConfig", "NUQSGDState", "nuqsgd_hook"]
