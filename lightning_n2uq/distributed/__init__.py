"""The compressed gradient exchange, for plain PyTorch and for the Lightning strategies.

Reading order: `exchange` (the story) -> `phases` -> `collectives` -> `partition` -> `pipeline` -> `hook`.
Training in rounds: `agreed_weights` -> `agreed_buffers` -> `local_rounds`.
All ranks in one process: `simulation`.
"""

from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.hook import NUQSGDState, nuqsgd_hook
from lightning_n2uq.distributed.local_rounds import LocalRounds
from lightning_n2uq.distributed.simulation import SimulatedExchange

__all__ = ["ExchangeConfig", "LocalRounds", "NUQSGDState", "SimulatedExchange", "nuqsgd_hook"]
