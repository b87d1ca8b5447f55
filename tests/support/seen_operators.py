"""Which operators a piece of code runs, as torch's dispatcher sees them."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class SeenOperators(TorchDispatchMode):
    """Collects the operators' names; custom operators do not pass by the dispatcher while it looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("lightning_n2uq::"))
        return func(*args, **(kwargs or {}))
