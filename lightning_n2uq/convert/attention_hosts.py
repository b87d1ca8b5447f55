"""Modules that compute attention, and their products quantized, whatever library they come from.

Torch's, timm's and Hugging Face's attention calls `scaled_dot_product_attention`. A converted module is of a
subclass of its own class; while its `forward` runs, that function is computed by the module's `products`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_n2uq.convert.attention import QuantMultiheadAttention
from lightning_n2uq.convert.attention_products import AttentionProducts, Redirection
from lightning_n2uq.convert.policy import Layer
from lightning_n2uq.convert.products_spec import ProductsSpec
from lightning_n2uq.convert.replace import obstacle, quantized
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.utils import compat

PRODUCTS = "products"
"""The name of the submodule that computes a host's products."""

TYPE = "products"
"""The word of `policy.TYPES`."""

_FUSED = "fused_attn"
"""The switch of timm's attention between the function and products written out."""

_CALLS = re.compile(r"\bscaled_dot_product_attention\(|\bALL_ATTENTION_FUNCTIONS\b")
_WRITTEN_OUT = re.compile(r"softmax\(|\bshifted_window_attention\(")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


class Host(NamedTuple):
    """A module that computes attention.

    Attributes:
        layer: The products as rules see them; the name is the module's with `products` behind it.
        module: The module.
    """

    layer: Layer
    module: nn.Module


def hosts(model: nn.Module, parts: Sequence[str] = ()) -> list[Host]:
    """Returns the modules of a model, or of parts of it, that compute attention, each once."""
    found: dict[nn.Module, str] = {}
    for part in parts or ("",):
        for name, module in model.get_submodule(part).named_modules():
            if _is_host(module):
                found.setdefault(module, ".".join(x for x in (part, name, PRODUCTS) if x))
    count = len(found)
    return [
        Host(Layer(name, (TYPE,), index, count, first=False, last=False), module)
        for index, (module, name) in enumerate(found.items())
    ]


def products_obstacle(module: nn.Module) -> str | None:
    """Returns why a host's products cannot be quantized, in words, or None."""
    if isinstance(module, QuantMultiheadAttention):
        return None if module.products is None else "they are quantized already"
    if isinstance(module, nn.MultiheadAttention):
        return obstacle(module, "", nn.Module())
    if getattr(module, PRODUCTS, None) is not None:
        return "they are quantized already"
    if "forward" in vars(module):
        return "its forward was replaced on this one module"
    if not _CALLS.search(_forward_source(_class_of(module))):
        return f"{type(module).__name__} writes them out, allowed is scaled_dot_product_attention"
    chosen = compat.attention_implementation(module)
    if chosen not in (None, "sdpa"):
        return f"attn_implementation is {chosen!r}, allowed is 'sdpa'"
    return None if head_numbers(module) else f"{type(module).__name__} does not tell its number of heads"


def head_numbers(module: nn.Module) -> tuple[int, int] | None:
    """Returns the number of heads of queries, and of keys and values; None where they are not told."""
    heads = _number(module, _HEADS)
    if heads is None:
        return None
    if "multiquery" in type(module).__name__.lower():
        return heads, 1
    groups = getattr(module, "num_key_value_groups", 0)
    of_keys = heads // groups if isinstance(groups, int) and groups else _number(module, _KEY_HEADS)
    return heads, of_keys or heads


def takes_products(module: nn.Module) -> nn.Module | None:
    """Returns what has to stand in a host's place for its products to be quantized: torch's own layer cannot.

    Projections stay in full precision; None says that the module itself will do.
    """
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, QuantMultiheadAttention):
        return quantized(module, QuantSpec(32, 32, "float", "float"))
    return None


def quantize_products(module: nn.Module, spec: ProductsSpec) -> None:
    """Quantizes the products of a host without `products_obstacle`, in place."""
    numbers = head_numbers(module)
    assert numbers is not None
    products = AttentionProducts(*numbers, spec)
    own = list(module.parameters())
    if own:
        products.to(own[0].device)
        if not any(parameter.requires_grad for parameter in own):
            products.requires_grad_(False)
    module.add_module(PRODUCTS, products.train(module.training))
    if isinstance(module, nn.MultiheadAttention):
        return
    if hasattr(module, _FUSED):
        setattr(module, _FUSED, True)
    module.__class__ = _redirected(_class_of(module))


def _class_of(module: nn.Module) -> Any:  # noqa: ANN401 -- `functools.cache` takes no class of modules
    return type(module)


@functools.cache
def _redirected(kind: Any) -> type:  # noqa: ANN401 -- a class of modules
    """Returns a subclass whose `forward` gets its products from the submodule `products`."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        redirection = Redirection(self.products)
        with redirection:
            output = kind.forward(self, *args, **kwargs)
        if not redirection.calls:
            raise ValueError(
                f"attention_bits: got {self.products.query.bits}, but {kind.__name__} has written its "
                "products out in this call, allowed is scaled_dot_product_attention (attn_implementation "
                "'sdpa')"
            )
        return output

    def reduce(self: Any, protocol: Any) -> Any:  # noqa: ANN401 -- of copies and pickles
        return _new, (kind,), *object.__reduce_ex__(self, protocol)[2:]

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made: type = type(kind.__name__, (kind,), {**names, "forward": forward, "__reduce_ex__": reduce})
    return made


def _new(kind: type) -> nn.Module:
    redirected: Any = _redirected(kind)
    new: nn.Module = redirected.__new__(redirected)
    return new


def _is_host(module: nn.Module) -> bool:
    """Returns whether a module computes attention itself, by its own `forward`."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if type(module).__module__.startswith("lightning_n2uq"):
        return False
    source = _forward_source(_class_of(module))
    if _CALLS.search(source):
        return True
    return re.search("atten|attn", type(module).__name__, re.IGNORECASE) is not None and (
        _WRITTEN_OUT.search(source) is not None
    )


@functools.cache
def _forward_source(kind: Any) -> str:  # noqa: ANN401 -- a class of modules
    """Returns the source of a class's `forward`."""
    try:
        return inspect.getsource(kind.forward)
    except (TypeError, OSError):  # not written in Python, or without a file
        return ""


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
