"""Lightning strategies for data-parallel training that sends fewer bits.

Importing this package registers the names for `--trainer.strategy`. The exchange itself is in
`lightning_n2uq.distributed`; its public names are importable from here, too.
"""

from lightning_n2uq.distributed import ExchangeConfig, NUQSGDState, nuqsgd_hook
from lightning_n2uq.strategies.nuqsgd import NUQSGDStrategy
from lightning_n2uq.strategies.registry import register_strategies
from lightning_n2uq.strategies.torch_hooks import TorchHookStrategy

__all__ = [
    "ExchangeConfig",
    "NUQSGDState",
    "NUQSGDStrategy",
    "TorchHookStrategy",
    "nuqsgd_hook",
    "register_strategies",
]
