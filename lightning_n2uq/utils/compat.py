"""Private names of other packages, each behind one function here and with one test in `test_compat.py`.

A release that has moved or dropped such a name is answered with one line, at import or at the first call,
instead of an AttributeError somewhere inside. The releases in `TESTED` have every name, unless a comment says
otherwise. Nothing here imports Lightning before a function needs it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
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


# Lightning: strategies


def init_process_group(environment: Any, backend: str, store: Any, timeout: timedelta | None) -> None:  # noqa: ANN401
    """Joins the default process group through `store`, and leaves it at exit, as Lightning's own do."""
    connect = private("lightning.fabric.utilities.distributed", "_init_dist_connection")
    connect(environment, backend, store=store, timeout=timeout)


def process_group_backend(strategy: Any) -> str:  # noqa: ANN401
    """Returns the backend that a strategy uses: the chosen one, or the one that suits its device."""
    return str(private(strategy, "_get_process_group_backend")())


# Lightning: the trainer's loops


def validation_follows(trainer: Any) -> bool:  # noqa: ANN401
    """Returns whether the trainer validates after the batch that it has just trained on."""
    fetcher = private(trainer.fit_loop, "_data_fetcher")
    return bool(private(trainer.fit_loop.epoch_loop, "_should_check_val_fx")(fetcher))


def place_loaders(trainer: Any) -> None:  # noqa: ANN401
    """Tells the loaders of a resumed run where they stopped.

    Lightning forgets it if they were made before the restore, as they are where the module asks for
    `estimated_stepping_batches`.
    """
    loop = trainer.fit_loop
    loader, states = private(loop, "_combined_loader"), private(loop, "_combined_loader_states_to_load")
    if loader is not None and states:
        private(loader, "_load_state_dicts")(states)
        loop._combined_loader_states_to_load = []


def iterate_again(trainer: Any) -> None:  # noqa: ANN401
    """Makes the training loaders' iterators anew, as Lightning does at the start of an epoch.

    Those of a resumed run are made before its random numbers are restored, and draw an order from others.
    """
    fetcher = private(trainer.fit_loop, "_data_fetcher")
    if fetcher is not None:
        iter(fetcher)


def cluster_environment(trainer: Any) -> Any:  # noqa: ANN401
    """Returns what started the processes, also where the strategy is for one device and knows none."""
    return private(trainer, "_accelerator_connector").cluster_environment


def observe_children_with(observe: Callable[[Sequence[Any]], None]) -> None:
    """Makes Lightning's launcher hand the processes that it starts to `observe`, not to its own observer."""
    module = importlib.import_module("lightning.pytorch.strategies.launchers.subprocess_script")
    require(module, "_launch_process_observer")
    module._launch_process_observer = observe  # type: ignore[attr-defined]


def starts_children(trainer: Any) -> bool:  # noqa: ANN401
    """Returns whether the trainer starts the other processes of its machine by running the command again."""
    launcher = private(
        "lightning.pytorch.strategies.launchers.subprocess_script", "_SubprocessScriptLauncher"
    )
    return isinstance(trainer.strategy.launcher, launcher)


def hands_weights_back(trainer: Any) -> bool:  # noqa: ANN401
    """Returns whether ranks are forked or spawned, and the command's own module only gets their weights."""
    launcher = private("lightning.pytorch.strategies.launchers.multiprocessing", "_MultiProcessingLauncher")
    return isinstance(trainer.strategy.launcher, launcher)


def wrap_loading(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces, once, what `load_from_checkpoint` builds and loads an object with by `wrap` of it."""
    saving = importlib.import_module("lightning.pytorch.core.saving")
    load = private(saving, "_load_state")
    if not getattr(load, "converts", False):
        wrapped: Any = wrap(load)
        wrapped.converts = True
        saving._load_state = wrapped  # type: ignore[attr-defined]


def checkpoint_to_come(trainer: Any) -> str | None:  # noqa: ANN401
    """Returns the checkpoint that a run will begin with while it is set up, None without one.

    `trainer.ckpt_path` has it only once it is read; until then it is an argument of the Trainer's `_run`.
    """
    code = private(type(trainer), "_run").__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    path = trainer.ckpt_path if frame is None else frame.f_locals.get("ckpt_path")
    return None if path is None else str(path)


CHILD_WEIGHTS = ".temp.ckpt"
"""The file in which a process that `ddp_spawn` or `ddp_fork` started hands its weights to the command."""


def renew_last(callback: Any, trainer: Any, after_training: bool) -> None:  # noqa: ANN401
    """Writes a `ModelCheckpoint`'s `last.ckpt` at the end of an epoch, unless it has been at this step.

    Args:
        callback: The `ModelCheckpoint`; one that saves by steps or time is left alone.
        trainer: Its trainer.
        after_training: Whether training has ended the epoch, or its validation.
    """
    if not callback.save_last or private(callback, "_every_n_epochs") < 1:
        return
    if private(callback, "_should_skip_saving_checkpoint")(trainer):
        return
    if private(callback, "_should_save_on_train_epoch_end")(trainer) == after_training:
        candidates = private(callback, "_monitor_candidates")(trainer)
        private(callback, "_save_last_checkpoint")(trainer, candidates)


def last_is_saved(callback: Any, trainer: Any) -> None:  # noqa: ANN401
    """Tells a `ModelCheckpoint` that its `last.ckpt`, from which the run goes on, is of the present step."""
    for name, value in (
        ("_last_global_step_saved", trainer.global_step),
        ("_last_checkpoint_saved", trainer.ckpt_path),
    ):
        private(callback, name)
        setattr(callback, name, value)


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


def exits_early(finder: Any) -> bool:  # noqa: ANN401
    """Returns whether a finder of Lightning ends after its search, as a `Tuner` has it."""
    return bool(private(finder, "_early_exit"))
