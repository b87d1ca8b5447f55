"""Data-parallel training that sends fewer bits.

Reading order: ``layout`` -> ``wire`` -> ``legs`` -> ``chain`` -> ``pipeline`` -> ``engine`` -> ``state``
-> ``hook``.
Importing this package registers the names for ``--trainer.strategy``.
"""

from lightning_n2uq.strategies.config import ExchangeConfig
from lightning_n2uq.strategies.hook import nuqsgd_hook
from lightning_n2uq.strategies.nuqsgd import NUQSGDStrategy
from lightning_n2uq.strategies.registry import register_strategies
from lightning_n2uq.strategies.state import NUQSGDState
from lightning_n2uq.strategies.torch_hooks import TorchHookStrategy

__all__ = [
    "ExchangeConfig",
    "NUQSGDState",
    "NUQSGDStrategy",
    "TorchHookStrategy",
    "nuqsgd_hook",
    "register_strategies",
]
