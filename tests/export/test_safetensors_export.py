import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("safetensors", reason="safetensors is not installed (extra 'export')")

from lightning_n2uq.export import (
    ExactNetwork,
    describe,
    load_safetensors,
    run_numpy,
    save_safetensors,
    with_normalization,
)
from lightning_n2uq.export.ir.packing import pack, unpack


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_packing_is_a_round_trip_at_every_length(bits, values):
    codes = np.array(values, np.uint8) & (2**bits - 1)
    data = pack(codes, bits)
    assert data.size == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack(data, bits, codes.size), codes)


def test_packing_puts_the_first_value_into_the_lowest_bits():
    assert pack(np.array([1, 2, 3, 0, 1], np.uint8), 2).tolist() == [0b00111001, 0b01]
    assert pack(np.array([5, 6, 7], np.uint8), 3).tolist() == [0b11110101, 0b1]


def test_codes_that_do_not_fit_and_data_of_another_length_are_refused():
    with pytest.raises(ValueError, match="codes: got 4, allowed is 0 to 3"):
        pack(np.array([4], np.uint8), 2)
    with pytest.raises(ValueError, match=r"data: got uint8 \[1\], allowed is uint8 \[2\]"):
        unpack(np.zeros(1, np.uint8), 4, 3)
    with pytest.raises(ValueError, match="bits: got 9, allowed is 1 to 8"):
        unpack(np.zeros(1, np.uint8), 9, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_saved_network_comes_back_bit_for_bit(small_network, tmp_path, bits):
    model = small_network(bits, bits, quantize_downsample=bits != 3)
    description = describe(model, (2, 16, 16), {"best_score": "val/acc=0.9"})
    save_safetensors(description, tmp_path / "net.safetensors")
    loaded = load_safetensors(tmp_path / "net.safetensors")
    x = torch.randn(3, 2, 16, 16)
    expected = ExactNetwork(description)(x)
    assert torch.equal(ExactNetwork(loaded)(x), expected)
    np.testing.assert_array_equal(run_numpy(loaded, x.numpy())[loaded.output], expected.numpy())
    assert loaded.metadata == {"best_score": "val/acc=0.9"}


def test_weights_take_as_many_bits_as_they_have(small_network, tmp_path):
    sizes = {}
    for bits in (2, 4):
        path = tmp_path / f"{bits}.safetensors"
        save_safetensors(describe(small_network(bits, 2, width=32), (2, 16, 16)), path)
        sizes[bits] = path.stat().st_size
    weights = 32 * 32 * 9 * 2 + 32 * 64 * 9 + 64 * 64 * 9 + 32 * 64
    assert sizes[4] - sizes[2] == weights * 2 // 8


def test_baselines_and_normalization_survive(small_network, tmp_path):
    model = small_network(4, 4, "lsq", "lsq_plus")
    description = with_normalization(describe(model, (2, 16, 16)), (0.3, 0.4), (0.2, 0.3))
    save_safetensors(description, tmp_path / "net.safetensors")
    pixels = torch.randint(0, 256, (3, 2, 16, 16), dtype=torch.uint8)
    loaded = load_safetensors(tmp_path / "net.safetensors")
    assert torch.equal(ExactNetwork(loaded)(pixels), ExactNetwork(description)(pixels))


@pytest.fixture(scope="module")
def saved():
    """A network's file, as an earlier revision wrote it."""
    return Path(__file__).parents[1] / "data" / "export" / "n2uq_w2a2.safetensors"


def rewrite_header(path, change):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format="other"), "is no network of this package"),
        (lambda meta: meta.update(version="2"), "has file version '2', this package reads '1'"),
        (lambda meta: meta.update(steps="[1]"), "damaged list of steps"),
        (lambda meta: meta.update(steps=meta["steps"].replace("int_conv", "new_op")), "unknown"),
        (lambda meta: meta.update(steps=meta["steps"].replace('"bits": 2', '"bits": 3')), "data: got"),
    ],
)
def test_files_that_are_not_ours_are_refused_in_one_line(saved, tmp_path, change, message):
    path = tmp_path / "net.safetensors"
    shutil.copy(saved, path)
    rewrite_header(path, change)
    with pytest.raises(ValueError, match=message):
        load_safetensors(path)


def test_cut_short_and_missing_files_are_refused(saved, tmp_path):
    path = tmp_path / "net.safetensors"
    shutil.copy(saved, path)
    data = path.read_bytes()
    for length in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="path: cannot read"):
            load_safetensors(path)
    with pytest.raises(ValueError, match="path: cannot read"):
        load_safetensors(tmp_path / "nowhere.safetensors")


def test_a_header_that_the_library_would_quote_whole_is_one_short_line(tmp_path):
    text = json.dumps({"__metadata__": 3, "x" * 5000 + "\n": "y"}).encode()
    wrong = json.dumps({"weight": "long\n" * 2000}).encode()
    for header in (text, wrong):
        path = tmp_path / "net.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(ValueError, match="path: cannot read") as error:
            load_safetensors(path)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 800
