"""Private names of other packages, each behind one function here and with one test in `test_compat.py`.

A release that has moved or dropped such a name is answered with one line, at import or at the first call,
instead of an AttributeError somewhere inside. The releases in `TESTED` have every name, unless a comment says
otherwise. Those of Lightning are in `compat_lightning`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

# Public in torch.distributed; type checkers know them under this name only.
from torch._C._distributed_c10d import GradBucket as GradBucket
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore as TCPStore
from torch.nn.parallel import DistributedDataParallel

TESTED = {
    "torch": ">=2.8,<2.15",
    "lightning": ">=2.5.5,<2.7",
    "wandb_workspaces": ">=0.1.12",
}
"""Releases in which every name below was seen, by package."""


class IncompatibleReleaseError(ImportError):
    """Another package's release lacks a name that this package needs; the message is one line."""


def private(owner: Any, name: str) -> Any:  # noqa: ANN401
    """Returns `owner.name`.

    Args:
        owner: A module, class or object of another package, or the import path of a module.
        name: An attribute that is not public there.

    Raises:
        IncompatibleReleaseError: The installed release has no such name.
    """
    try:
        return getattr(importlib.import_module(owner) if isinstance(owner, str) else owner, name)
    except (AttributeError, ModuleNotFoundError):
        pass
    kind = owner if isinstance(owner, (str, type)) or hasattr(owner, "__spec__") else type(owner)
    home = kind if isinstance(kind, str) else getattr(kind, "__module__", kind.__name__)
    package = home.partition(".")[0]
    place = home if isinstance(kind, str) or not isinstance(kind, type) else f"{home}.{kind.__qualname__}"
    raise IncompatibleReleaseError(
        f"{package}: got {_version(package)}, which has no {place}.{name}; allowed is "
        f"{package}{TESTED.get(package, '')}"
    )


def require(owner: Any, *names: str) -> None:  # noqa: ANN401
    """Raises `IncompatibleReleaseError` unless a class has the methods that a subclass overrides or calls."""
    for name in names:
        private(owner, name)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "an unknown version"


# torch: modules and layers

BatchNorm: type[nn.Module] = private(nn.modules.batchnorm, "_BatchNorm")
"""The base of all batch norms; torch names no public one."""

_EVERYWHERE = [
    private(nn.modules.module, f"_global_{kind}")
    for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
]
require(nn.Identity(), "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(*modules: nn.Module | None) -> bool:
    """Returns whether any hook would run if the modules were called, one for all modules included."""
    return any(_EVERYWHERE) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
        if m is not None
    )


def submodules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns children by name; one that has two names is there twice, other than in `named_children`."""
    children: dict[str, nn.Module | None] = private(module, "_modules")
    return children


CONV_FORWARD = "_conv_forward"
"""The method of convolutions that takes the weight as an argument and pads as the layer does."""


def convolve(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns what `layer` computes of `x` with another weight and bias."""
    y: Tensor = private(layer, CONV_FORWARD)(x, weight, bias)
    return y


def output_padding(layer: nn.Module, x: Tensor, output_size: list[int] | None) -> list[int]:
    """Returns the padding that gives a transposed convolution the wanted output size, its own without one."""
    dims = len(layer.kernel_size)  # type: ignore[arg-type]
    geometry = (layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
    found: list[int] = private(layer, "_output_padding")(x, output_size, *geometry)
    return found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the parameters of a module itself by name, also those that are None."""
    parameters: dict[str, nn.Parameter | None] = private(module, "_parameters")
    return parameters


def copy_padding(target: nn.Conv2d, source: nn.Conv2d) -> None:
    """Gives `target` the padding and its mode of `source`, which keeps a derived form beside them."""
    target.padding_mode = source.padding_mode
    target._reversed_padding_repeated_twice = private(source, "_reversed_padding_repeated_twice")


def padding_of_sides(layer: nn.Module) -> list[int]:
    """Returns a convolution's padding: both sides of each axis, the last axis first, as `F.pad` takes it."""
    return [int(side) for side in private(layer, "_reversed_padding_repeated_twice")]


def one_width(attention: nn.MultiheadAttention) -> bool:
    """Returns whether queries, keys and values have one width, so that their projections are one matrix."""
    return bool(private(attention, "_qkv_same_embed_dim"))


def uncompiled_call(module: nn.Module) -> Callable[..., Any]:
    """Returns a module's call with its hooks, whatever was compiled."""
    call: Callable[..., Any] = private(module, "_call_impl")
    return call


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Makes `call` what a module's call runs, as `Module.compile` does; None takes it out again."""
    require(module, "_compiled_call_impl")
    module._compiled_call_impl = call


def runs_compiled(module: nn.Module) -> bool:
    """Returns whether calling a module in evaluation mode runs what `Module.compile` has put in."""
    call = private(module, "_compiled_call_impl")
    return call is not None and not getattr(call, "compiles_training_only", False)


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies many small tensors in one call."""
    private(torch, "_foreach_copy_")(targets, sources)


def cpp_compiler_found() -> bool:
    """Returns whether the compiler that TorchInductor needs on the CPU is there."""
    try:
        private("torch._inductor.cpp_builder", "get_cpp_compiler")()
    except private("torch._inductor.exc", "InvalidCxxCompiler"):
        return False
    return True


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Marks a function whose answer `torch.compile` takes once and keeps in the graph.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


tree_map: Callable[[Callable[[Any], Any], Any], Any] = private("torch.utils._pytree", "tree_map")
"""Returns nested lists, tuples and mappings with a function applied to every leaf."""

tree_leaves: Callable[[Any], list[Any]] = private("torch.utils._pytree", "tree_leaves")
"""Returns the leaves of nested lists, tuples and mappings."""

# torch: custom operators

dispatch_modes: Callable[[], int] = private(torch._C, "_len_torch_dispatch_stack")
"""Returns how many `__torch_dispatch__` modes are active."""

tracing_state: Callable[[], object | None] = private(torch._C, "_get_tracing_state")
"""Returns the state of `torch.jit.trace`, None when nothing is traced; `torch.jit.is_tracing` is slower."""


def operator_function(operator: Any) -> Callable[..., Any]:  # noqa: ANN401  # CustomOpDef is not public
    """Returns the Python function that a custom operator was made of."""
    function: Callable[..., Any] = private(operator, "_init_fn")
    return function


def operator_name(operator: Any) -> str:  # noqa: ANN401
    """Returns a custom operator's name without its namespace."""
    return str(private(operator, "_name"))


# torch: oneDNN's operators on integers


class IntegerOperators(NamedTuple):
    """Convolution and linear layer of uint8 times int8, and what packs their weights."""

    pack_conv: Callable[..., Tensor]
    conv: Callable[..., Tensor]
    pack_linear: Callable[..., Tensor]
    linear: Callable[..., Tensor]


@functools.cache
def integer_operators() -> IntegerOperators | None:
    """Returns the operators of `torch.ops.onednn`, None where a build of torch has not all of them."""
    try:
        library = torch.ops.onednn
        conv = getattr(library, "qconv_pointwise", None) or library.qconv2d_pointwise
        return IntegerOperators(
            library.qconv_prepack.default,
            conv.default,
            library.qlinear_prepack.default,
            library.qlinear_pointwise.default,
        )
    except AttributeError:
        return None


def trace_packed_weights() -> None:
    """Lets `torch.export` trace the packing of a convolution's weight, which torch 2.8 to 2.14 cannot."""
    name = "onednn::qconv_prepack"
    if not private(torch._C, "_dispatch_has_kernel_for_dispatch_key")(name, "Meta"):
        _LIBRARIES.append(library := torch.library.Library("onednn", "IMPL", "Meta"))
        library.impl("qconv_prepack", lambda weight, *_: weight.new_empty(weight.shape))


_LIBRARIES: list[torch.library.Library] = []  # a registration lasts as long as its library


def compile_package(program: Any, file: Any, settings: dict[str, Any]) -> None:  # noqa: ANN401
    """Compiles an exported program with AOTInductor and writes the package into a binary file."""
    compiler = private("torch._inductor", "aoti_compile_and_package")
    compiler(program, package_path=file, inductor_configs=settings)


def load_package(path: str) -> Any:  # noqa: ANN401 -- torch's class is private
    """Returns a package of AOTInductor as a callable that also has `get_metadata`."""
    return private("torch._inductor", "aoti_load_package")(path)


# torch: DistributedDataParallel


def rebuild_buckets(model: DistributedDataParallel) -> list[Any] | None:
    """Lays DDP's buckets out anew, which DDP itself does before its second step.

    Returns:
        The new buckets, filled with zeros; None where they were rebuilt already or never will be.
    """
    reducer = model.reducer
    if not private(reducer, "_rebuild_buckets")():
        return None
    require(model, "_has_rebuilt_buckets")
    model._has_rebuilt_buckets = True
    return list(private(reducer, "_get_zeros_like_grad_buckets")())


def default_store() -> Any:  # noqa: ANN401
    """Returns the store at which the default process group met."""
    return private("torch.distributed.distributed_c10d", "_get_default_store")()


# numba


def kernel_place(cache: Any) -> tuple[str, str, object]:  # noqa: ANN401
    """Returns of a numba cache: its folder, what its files' names begin with, its source's stamp."""
    implementation = private(cache, "_impl")
    path: str = private(cache, "_cache_path")
    return path, implementation.filename_base, implementation.locator.get_source_stamp()


def set_kernel_cache(function: Any, cache: object) -> None:  # noqa: ANN401
    """Gives a function made by `numba.njit` another cache of what it compiles."""
    private(function, "_cache")
    function._cache = cache


# wandb_workspaces


def workspace_model(workspace: Any) -> Any:  # noqa: ANN401
    """Returns what a workspace would send; the package has no public way to see it without sending it."""
    return private(workspace, "_to_model")()


def attention_implementation(module: nn.Module) -> str | None:
    """Returns which attention a module of Hugging Face's `transformers` runs, such as `sdpa`; else None."""
    chosen: str | None = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return chosen
