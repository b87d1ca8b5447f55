"""Lightning strategies for data-parallel training that sends fewer bits.

Importing this package registers their names for `--trainer.strategy`. The exchange itself is in
`lightning_n2uq.distributed`; its public names are importable from here, too.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_n2uq.compression import CODECS
from lightning_n2uq.distributed import ExchangeConfig, LocalRounds, NUQSGDState, nuqsgd_hook
from lightning_n2uq.strategies.local import LOCAL, LocalNUQSGDStrategy
from lightning_n2uq.strategies.nuqsgd import NUQSGDStrategy
from lightning_n2uq.strategies.sharded import ShardedNUQSGDStrategy
from lightning_n2uq.strategies.torch_hooks import HOOKS, TorchHookStrategy

__all__ = [
    "ExchangeConfig",
    "LocalNUQSGDStrategy",
    "LocalRounds",
    "NUQSGDState",
    "NUQSGDStrategy",
    "ShardedNUQSGDStrategy",
    "TorchHookStrategy",
    "nuqsgd_hook",
    "register_strategies",
]


def register_strategies() -> None:
    """Registers every named variant; calling it again changes nothing."""
    for name, arguments in CODECS.items():
        if name not in StrategyRegistry:
            description = f"DDP with quantized gradients: {dict(arguments)}"
            StrategyRegistry.register(name, NUQSGDStrategy, description=description, **arguments)
    for name, arguments in LOCAL.items():
        if name not in StrategyRegistry:
            description = f"Ranks that train alone, an exchange every 10 steps: {dict(arguments)}"
            StrategyRegistry.register(name, LocalNUQSGDStrategy, description=description, **arguments)
    if "nuqsgd_fsdp" not in StrategyRegistry:
        description = "FSDP2 with quantized gradients"
        StrategyRegistry.register("nuqsgd_fsdp", ShardedNUQSGDStrategy, description=description)
    for hook in HOOKS:
        if f"ddp_{hook}" not in StrategyRegistry:
            description = f"DDP with torch's {hook} hook"
            StrategyRegistry.register(f"ddp_{hook}", TorchHookStrategy, description=description, hook=hook)


register_strategies()
