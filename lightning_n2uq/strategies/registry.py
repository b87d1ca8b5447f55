"""Names for ``--trainer.strategy``; registered when ``lightning_n2uq.strategies`` is imported."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_n2uq.compression import CODECS
from lightning_n2uq.strategies.nuqsgd import NUQSGDStrategy
from lightning_n2uq.strategies.torch_hooks import HOOKS, TorchHookStrategy


def register_strategies() -> None:
    """Register every named variant; calling it again changes nothing."""
    for name, arguments in CODECS.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(
                name,
                NUQSGDStrategy,
                description=f"DDP with quantized gradients: {dict(arguments)}",
                **arguments,
            )
    for hook in HOOKS:
        if f"ddp_{hook}" not in StrategyRegistry:
            StrategyRegistry.register(
                f"ddp_{hook}", TorchHookStrategy, description=f"DDP with torch's {hook} hook", hook=hook
            )


register_strategies()
