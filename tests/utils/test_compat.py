"""One test for every private name: what it does today, and in which releases it was seen to do it."""

import pytest
import torch
from torch import nn

from lightning_n2uq.utils import compat


def test_a_missing_name_is_one_line_with_release_and_what_to_install():
    release = torch.__version__.partition("+")[0]
    line = rf"^torch: got {release}.*, which has no torch\S*Linear\._gone; allowed is torch>="
    with pytest.raises(compat.IncompatibleReleaseError, match=line):
        compat.private(nn.Linear(1, 1), "_gone")
    with pytest.raises(compat.IncompatibleReleaseError, match=r"which has no torch\._gone\.name; allowed"):
        compat.private("torch._gone", "name")
    with pytest.raises(compat.IncompatibleReleaseError, match=r"no torch\S*Linear\._gone; "):
        compat.require(nn.Linear, "forward", "_gone")


def test_batch_norm_is_the_base_of_all_batch_norms():  # torch 2.8, 2.14
    for norm in (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)):
        assert isinstance(norm, compat.BatchNorm)
    assert not isinstance(nn.GroupNorm(1, 2), compat.BatchNorm)


def test_the_mark_of_a_constant_in_graphs_is_torchs_own():  # torch 2.8, 2.14
    theirs, ours = (lambda: 1), (lambda: 1)
    torch.compiler.assume_constant_result(theirs)
    assert vars(compat.constant_in_graphs(ours)) == vars(theirs) != {}


def _nothing(*_):
    return None


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(_nothing),
        lambda m: m.register_forward_pre_hook(_nothing),
        lambda m: m.register_full_backward_hook(_nothing),
        lambda m: m.register_full_backward_pre_hook(_nothing),
        lambda m: nn.modules.module.register_module_forward_hook(_nothing),
        lambda m: nn.modules.module.register_module_forward_pre_hook(_nothing),
        lambda m: nn.modules.module.register_module_full_backward_hook(_nothing),
        lambda m: nn.modules.module.register_module_full_backward_pre_hook(_nothing),
    ],
    ids=["own forward", "own forward pre", "own backward", "own backward pre",
         "any forward", "any forward pre", "any backward", "any backward pre"],
)  # fmt: skip
def test_hooks_of_every_kind_are_seen(register):  # torch 2.8, 2.14
    module = nn.Linear(1, 1)
    assert not compat.has_hooks(module, None)
    handle = register(module)
    assert compat.has_hooks(module, None)
    handle.remove()
    assert not compat.has_hooks(module, None)


def test_a_child_with_two_names_is_listed_twice():  # torch 2.8, 2.14
    module, child = nn.Module(), nn.ReLU()
    module.one = module.two = child
    assert list(compat.submodules(module).items()) == [("one", child), ("two", child)]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_convolution_with_another_weight_pads_as_the_layer_does(mode):  # torch 2.8, 2.14
    layer = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode)
    other = nn.Conv2d(2, 3, 3, padding=(1, 2))
    compat.copy_padding(other, layer)
    x = torch.rand(1, 2, 5, 6)
    assert torch.equal(compat.convolve(other, x, layer.weight, layer.bias), layer(x))
    assert callable(getattr(layer, compat.CONV_FORWARD))


@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_padding_of_all_sides_is_what_pad_takes(padding):  # torch 2.8, 2.14
    layer = nn.Conv2d(2, 3, (3, 5), padding=padding)
    x = torch.rand(1, 2, 5, 6)
    padded = nn.functional.pad(x, compat.padding_of_sides(layer))
    assert torch.equal(nn.functional.conv2d(padded, layer.weight, layer.bias), layer(x))


def test_attention_of_one_width():  # torch 2.8, 2.14
    assert compat.one_width(nn.MultiheadAttention(4, 2))
    assert not compat.one_width(nn.MultiheadAttention(4, 2, kdim=3))


def test_a_compiled_call_is_put_in_and_taken_out():  # torch 2.8, 2.14
    module, x = nn.Linear(1, 1), torch.ones(1, 1)
    plain = module(x)
    compat.set_compiled_call(module, lambda value: compat.uncompiled_call(module)(value) + 1)
    assert torch.equal(module(x), plain + 1)
    assert compat.runs_compiled(module)
    compat.set_compiled_call(module, None)
    assert torch.equal(module(x), plain)
    assert not compat.runs_compiled(module)


def test_many_tensors_are_copied_at_once():  # torch 2.8, 2.14
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.rand(2), torch.rand(3)]
    compat.copy_each(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_the_compiler_of_inductor_is_looked_for(monkeypatch):  # torch 2.8, 2.14
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert not compat.cpp_compiler_found()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    assert compat.cpp_compiler_found()


def test_dispatch_modes_are_counted():  # torch 2.8, 2.14
    from torch.utils._python_dispatch import TorchDispatchMode

    before = compat.dispatch_modes()
    with TorchDispatchMode():
        assert compat.dispatch_modes() == before + 1


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")  # what sets the state, all the same
def test_tracing_is_seen():  # torch 2.8, 2.14
    seen = []

    def function(x):
        seen.append(compat.tracing_state() is not None)
        return x + 1

    function(torch.ones(1))
    torch.jit.trace(function, torch.ones(1), check_trace=False)
    assert seen == [False, True]


def test_a_custom_operator_gives_its_function_and_name():  # torch 2.8, 2.14
    @torch.library.custom_op("n2uq_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert compat.operator_name(twice) == "twice"
    assert compat.operator_function(twice)(torch.ones(1)).item() == 2.0


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_integer_operators_of_onednn():  # torch 2.8, 2.14
    operators = compat.integer_operators()
    assert operators is not None
    codes, levels = (
        torch.full((1, 2, 3, 3), 3, dtype=torch.uint8),
        torch.full((4, 2, 1, 1), -5, dtype=torch.int8),
    )
    scale, zeros, plain = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int64), ("none", [], "")
    geometry = [1, 1], [0, 0], [1, 1], 1
    packed = operators.pack_conv(levels, scale, 1.0, 0, *geometry)
    given = codes, 1.0, 0, packed, scale, zeros, None, *geometry, 1.0, 0, torch.float32, *plain
    assert (operators.conv(*given) == -15).all()
    packed = operators.pack_linear(levels.flatten(1), None)
    given = codes[0, :, 0].T.contiguous(), 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, *plain
    assert (operators.linear(*given) == -15).all()


def test_a_build_without_the_integer_operators_is_seen(monkeypatch):
    monkeypatch.setattr(compat.torch.ops, "onednn", object())
    assert compat.integer_operators.__wrapped__() is None


def test_buckets_are_rebuilt_once_and_before_the_second_step(one_rank):  # torch 2.8, 2.14
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    model(torch.ones(1, 2)).sum().backward()
    buckets = compat.rebuild_buckets(model)
    assert buckets is not None
    assert sorted(p.numel() for bucket in buckets for p in bucket.parameters()) == [1, 3, 3, 6]
    assert compat.rebuild_buckets(model) is None
    model(torch.ones(1, 2)).sum().backward()


def test_the_default_store_is_the_one_of_the_process_group(one_rank):  # torch 2.8, 2.14
    store = compat.default_store()
    assert isinstance(store, compat.Store)
    other = compat.PrefixStore("ours", store.clone())  # with a connection of its own
    other.set("key", "value")
    assert compat.PrefixStore("ours", store).get("key") == b"value"
    assert isinstance(other, compat.Store)
    assert issubclass(compat.TCPStore, compat.Store)


def test_classes_of_torch_distributed_are_the_public_ones():  # torch 2.8, 2.14
    for name in ("GradBucket", "PrefixStore", "Store", "TCPStore"):
        assert getattr(compat, name) is getattr(torch.distributed, name)


def test_packing_of_weights_can_be_traced_and_programs_compiled(monkeypatch):  # torch 2.14
    compat.trace_packed_weights()
    compat.trace_packed_weights()
    operators = compat.integer_operators()
    assert operators is not None
    weight, geometry = torch.empty(4, 3, 1, 1, dtype=torch.int8, device="meta"), ([1, 1], [0, 0], [1, 1])
    assert operators.pack_conv(weight, torch.empty(4), 1.0, 0, *geometry, 1).shape == weight.shape
    calls = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: calls.append(path))
    compat.compile_package("program", "file", {"freezing": True})
    compat.load_package("net.pt2")
    assert calls == [
        (("program",), {"package_path": "file", "inductor_configs": {"freezing": True}}),
        "net.pt2",
    ]


def test_a_workspace_shows_what_it_would_send():  # wandb_workspaces 0.1.12
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    workspace = workspaces.Workspace(entity="e", project="p", sections=[])
    assert compat.workspace_model(workspace).entity == "e"


def test_where_numba_keeps_what_it_compiles(tmp_path):  # numba 0.68
    import numba
    from numba.core.caching import FunctionCache

    function = numba.njit(lambda x: x)
    cache = FunctionCache(test_where_numba_keeps_what_it_compiles)
    folder, name, stamp = compat.kernel_place(cache)
    assert "test_where_numba" in name
    assert folder
    assert stamp
    compat.set_kernel_cache(function, cache)
    assert function._cache is cache


def test_trees_of_tensors_are_mapped_and_listed():  # torch 2.14
    tree = {"a": [1, (2, 3)], "b": None}
    assert compat.tree_map(lambda x: x and x + 1, tree) == {"a": [2, (3, 4)], "b": None}
    assert compat.tree_leaves(tree) == [1, 2, 3, None]


def test_the_attention_of_hugging_face_networks_is_known():
    """Seen in transformers 5.24."""
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=9, **sizes)
    for name in ("sdpa", "eager"):
        model = transformers.BertModel._from_config(config, attn_implementation=name)
        assert compat.attention_implementation(model.encoder.layer[0].attention.self) == name
    assert compat.attention_implementation(nn.Linear(2, 2)) is None
