"""Integer-only networks in the fast engine: the plain engines' bits, nothing left uncompiled, few passes."""

import numpy as np
import pytest
import torch

from lightning_n2uq import backbones
from lightning_n2uq.export import ExactNetwork, FastNetwork, describe, with_normalization
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.runtime import torch_engine
from lightning_n2uq.export.runtime.engines import ENGINES
from lightning_n2uq.export.runtime.fast import loops
from lightning_n2uq.export.runtime.fast.grid_lines import grid_line
from lightning_n2uq.export.runtime.fast.grid_operations import grid_operation
from lightning_n2uq.export.runtime.fast.integer_maps import BytePool, sum_pool
from lightning_n2uq.export.runtime.fast.word_conv import WordConvolution
from lightning_n2uq.export.verify.sweep import sweep
from lightning_n2uq.utils import processor

needs_vectors = pytest.mark.skipif(not processor.has_vectors(), reason="the kernel is for AVX2 and AVX-512")


@pytest.fixture
def trained(perturb):
    def build(name, bits=2, size=32, **arguments):
        torch.manual_seed(0)
        small = {"width": 8} if name == "resnet20" else {}
        options = {"residual_bits": 8, "first_last_bits": 8, "num_classes": 10, **small, **arguments}
        model = backbones.build(name, weight_bits=bits, activation_bits=bits, **options).train()
        x = torch.randn(4, 3, size, size)
        model(x)
        perturb(model).train()(x)
        return model.eval()

    return build


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def assert_same_bits(description, x):
    """Compares all codes and the logits with the torch engine's; returns the network."""
    fast = FastNetwork(description)
    expected, found = ExactNetwork(description).run(x), fast.run(x)
    assert set(found) == {step.name for step in description.quantizers()} | {description.output}
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)
    return fast


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("resnet20", 2, {}),
        ("resnet20", 4, {}),
        ("resnet18", 4, {}),
        ("resnet50", 2, {}),
        ("mobilenet_v2", 4, {}),
        ("resnet20", 2, {"first_last_bits": None}),
        ("resnet20", 2, {"residual_bits": None}),
    ],
)
def test_networks_have_the_bits_of_the_plain_engine(trained, name, bits, options):
    assert_same_bits(describe(trained(name, bits, **options), (3, 32, 32)), images())


def test_logits_are_those_of_numpy(trained):
    description = describe(trained("resnet20"), (3, 32, 32))
    expected = ENGINES["numpy"](description)(images().numpy()).logits
    np.testing.assert_array_equal(FastNetwork(description)(images()).numpy(), expected)


def test_pixels_and_their_normalization_go_into_thresholds(trained):
    description = with_normalization(describe(trained("resnet20"), (3, 32, 32)), (0.5,) * 3, (0.2,) * 3)
    assert_same_bits(description, torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 0.0])
def test_odd_pixels_have_the_bits_of_the_plain_engine(trained, value):
    x = images()
    x[1, 0, 3, 4], x[2] = value, value
    assert_same_bits(describe(trained("resnet20"), (3, 32, 32)), x)


@pytest.mark.integration
def test_results_do_not_depend_on_batch_size_threads_or_memory_layout(trained):
    network = FastNetwork(describe(trained("resnet18", size=64), (3, 64, 64)))
    x = images(5, 64)
    expected = network(x)
    assert torch.equal(torch.cat([network(piece) for piece in x.split(2)]), expected)
    assert torch.equal(network(x.to(memory_format=torch.channels_last)), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(network(x), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.integration
def test_one_pass_lies_between_two_convolutions_and_nothing_runs_as_in_the_plain_engine(trained):
    description = describe(trained("resnet18"), (3, 32, 32))
    plan = FastNetwork(description).plan
    assert plan.alone == ["flatten"]
    layers = [step for step in description.steps if isinstance(step, s.IntConv)]
    shortcuts = [step.name for step in layers if "downsample" in step.name]
    passes = [operation for operation in plan.operations if operation.kind == "pass"]
    # A pass in front of every layer but the shortcuts'; one in front of each pooling, one for the logits.
    assert len(passes) == len(layers) - len(shortcuts) + 2 + 1
    assert not any(operation.kind in ("int_add", "grid_codes", "codes") for operation in plan.operations)


def test_nothing_is_kept_that_nobody_asked_for(trained):
    network = FastNetwork(describe(trained("resnet20"), (3, 32, 32)))
    assert set(network.run(images(), ())) == {network.description.output}
    freed = {name for operation in network.plan.operations for name in operation.frees}
    assert {step.name for step in network.description.quantizers()} <= freed


@pytest.mark.integration
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_every_quantizer_is_swept(trained, name):
    for step in describe(trained(name), (3, 32, 32)).quantizers()[:12]:
        assert sweep(step, 3000, ("torch", "fast"))["fast"] == 0, step.name


def grid(thresholds, low=0, sign=None):
    table = np.atleast_2d(thresholds)
    return GridCodes("y", ("x",), table, None if sign is None else np.asarray(sign, table.dtype), low)


def even(slope, shift, levels=254):
    """Integer thresholds of a rounded line."""
    return np.floor((np.arange(levels) + 0.5 - shift) / slope).astype(np.int32)


def limits(channels, bound):
    return np.full(channels, -bound), np.full(channels, bound)


def middle_of(table, index):
    """A range of few integers with a threshold inside."""
    return np.array([table[index] - 500]), np.array([table[index] + 500])


@pytest.mark.parametrize("slope", [0.003, 0.28, 0.9, 3.0])
def test_even_thresholds_become_a_line(slope):
    step = grid(even(slope, 126.3), -127)
    line = grid_line(step, 1, limits(1, 60000))
    assert line is not None
    x = np.arange(-60000, 60001)
    expected = torch_engine.run_step(step, torch_engine.tensors(step), False, torch.from_numpy(x[None, None]))
    np.testing.assert_array_equal(line(x[None])[0], expected.numpy()[0, 0])


@pytest.mark.parametrize("moved", [3, 126, 250])
def test_a_threshold_out_of_line_makes_a_search(moved):
    table = even(0.01, 126.3)
    table[moved] += 9
    assert grid_line(grid(table), 1, limits(1, 60000)) is None
    assert grid_operation(grid(table), 1, limits(1, 60000), 512)[0] == loops.GRID_SEARCH
    assert grid_operation(grid(table), 1, middle_of(table, moved), 512)[0] == loops.GRID_TABLE


def test_finely_spaced_floats_take_a_line_in_double_precision():
    exact = (np.arange(254) - 126.5) * 0.0363251
    single = exact.astype(np.float32)
    step = grid(np.where(single < exact, single, np.nextafter(single, np.float32(-np.inf))), -127)
    assert grid_operation(step, 1, None, 512)[0] == loops.GRID_DOUBLE


@pytest.mark.parametrize("kind", ["line", "search", "table", "flat", "sign"])
def test_codes_of_sums_by_every_operation(kind):
    rng = np.random.default_rng(0)
    weight = rng.integers(-3, 4, (4, 3, 3, 3)).astype(np.int16)
    table = np.stack([even(slope, 126.3) for slope in (0.6, 0.7, 1.5, 2.5)])
    if kind in ("search", "table"):
        table = np.sort(rng.integers(-200, 200, table.shape), 1).astype(np.int32)
    if kind == "flat":
        table[:2] = [[-(2**20)], [2**20]]
    sign = [1, -1, 1, -1] if kind == "sign" else None
    codes = s.Codes("codes", ("x",), np.linspace(-2, 2, 3 if kind == "table" else 15, dtype=np.float32)[None])
    conv = s.IntConv("conv", ("codes",), weight, 3, False, codes.levels)
    step = GridCodes("y", ("conv",), table, None if sign is None else np.array(sign, np.int32), -127)
    assert_same_bits(Description((s.Input("x", (), (3, 9, 8)), codes, conv, step)), images(2, 9)[:, :, :, :8])


def test_a_sum_that_others_read_too_and_a_grid_that_only_a_sum_reads():
    x = s.Input("x", (), (3, 8, 8))
    left = GridCodes("left", ("x",), np.linspace(-2, 2, 254, dtype=np.float32)[None], None, -127)
    right = GridCodes("right", ("x",), np.linspace(-1, 3, 254, dtype=np.float32)[None], None, -127)
    total = IntAdd("sum", ("left", "right"))
    codes = s.Codes("codes", ("sum",), np.array([[-9, 0, 7]], np.int32))
    pool = SumPool("pool", ("left",))
    alone = GridCodes("alone", ("sum",), np.arange(-100, 154, dtype=np.int32)[None], None, -127)
    out = s.Affine("y", ("sum",), np.full(3, 0.5, np.float32))
    assert_same_bits(Description((x, left, right, total, codes, pool, alone, out)), images(2, 8))


@needs_vectors
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("outputs", "channels", "kernel", "window"),
    [
        (64, 3, (7, 7), s.Window((2, 2), (3, 3, 3, 3))),
        (7, 5, (3, 3), s.Window((2, 1), (0, 1, 2, 1))),
        (17, 1, (1, 5), s.Window((1, 3))),
        (8, 16, (2, 3), s.Window((1, 1), (1, 0, 1, 0), (3, 1))),
    ],
)
def test_a_convolution_of_words_is_exact(outputs, channels, kernel, window, signed):
    rng = np.random.default_rng(0)
    weight = rng.choice([-127, 127, 5], (outputs, channels, *kernel)).astype(np.int16)
    low, high = (-127, 127) if signed else (0, 255)
    codes = torch.from_numpy(
        rng.choice([low, high, 3], (3, channels, 13, 11)).astype("i1" if signed else "u1")
    )
    codes = codes.contiguous(memory_format=torch.channels_last)
    step = s.IntConv("conv", ("x",), weight, 8, False, high, window)
    assert WordConvolution.takes(step)
    found, expected = (
        WordConvolution(step)(codes),
        torch_engine.run_step(step, torch_engine.tensors(step), False, codes),
    )
    assert torch.equal(found.int(), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 1, 2, 0), (2, 2, 2, 2)])
def test_pooling_of_bytes(pads):
    x = torch.randint(0, 256, (2, 5, 9, 8), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    step = IntMaxPool("y", ("x",), (3, 2), s.Window((2, 1), pads, (1, 2)))
    assert torch.equal(BytePool(step)(x), torch_engine.run_step(step, {}, False, x))
    for values in (x, x.view(torch.int8)):
        expected = torch_engine.run_step(SumPool("y", ("x",)), {}, False, values)
        assert torch.equal(sum_pool(values).int(), expected)
