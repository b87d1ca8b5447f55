"""Compiled packages. One small network is compiled always; what compiles more is marked slow."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import cpp_extension

from lightning_n2uq.export import ExactNetwork, command, describe
from lightning_n2uq.export.formats.pt2_file import compiler, load_pt2, save_pt2
from lightning_n2uq.export.runtime.engines import pt2_engine, torch_engine
from lightning_n2uq.export.verify.parity import compare
from lightning_n2uq.layers import QuantConv2d, QuantSpec
from lightning_n2uq.modules import QuantizedClassifier

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    settings = {"in_channels": 1, "image_size": 8, "backbone_args": {"width": 4}, "weight_bits": 2}
    model = QuantizedClassifier(**settings)
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return str(path)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A network of one quantized layer, compiled once."""
    torch.manual_seed(0)
    layer = QuantConv2d(3, 8, 3, padding=1, spec=QuantSpec(4, 4))
    model = torch.nn.Sequential(layer, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    description = describe(model, (3, 16, 16), {"backbone": "one layer"})
    path = tmp_path_factory.mktemp("package") / "net.pt2"
    save_pt2(description, path)
    return description, path


@pytest.mark.integration
def test_a_package_gives_the_same_bits_for_any_batch_and_carries_what_is_known(package):
    description, path = package
    network = load_pt2(path)
    assert network.metadata["backbone"] == "one layer"
    x = torch.randn(5, 3, 16, 16)
    x[1], x[2, 0, 0, 0], x[3, 1, 2, 3] = 0, float("nan"), float("inf")
    expected = ExactNetwork(description)(x)
    for batch in (1, 2, 5):
        assert torch.equal(network(x[:batch]), expected[:batch])
    assert torch.equal(network(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.slow
def test_the_documented_program_runs_it_without_python(package, tmp_path):
    description, path = package
    source = tmp_path / "run.cpp"
    source.write_text(PAGE.read_text().split("```cpp\n")[1].split("```")[0].replace("224", "16"))
    program = tmp_path / "run"
    folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    (libraries,) = cpp_extension.library_paths()
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command_line = [compiler(), "-std=c++20", str(source), "-o", str(program), *folders, *link]
    subprocess.run(command_line, check=True, timeout=500, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(program), str(path)], capture_output=True, text=True, timeout=100, env=environment, check=True
    )
    logits = ExactNetwork(description)(torch.ones(1, 3, 16, 16))
    assert int(done.stdout) == int(logits.argmax())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_codes_and_logits_have_the_same_bits(small_network, tmp_path, bits):
    description = describe(small_network(bits, bits, imagenet_stem=True, width=8), (2, 32, 32))
    save_pt2(description, tmp_path / "net.pt2")
    images = np.random.default_rng(0).standard_normal((5, 2, 32, 32)).astype(np.float32)
    images[1, 0, 0, 0] = np.nan
    images[2] = 0
    engines = {"torch": torch_engine(description), "pt2": pt2_engine(description, tmp_path / "net.pt2")}
    report = compare(engines, [(images, None)])
    assert report.ok, report.table()
    assert report.engines["pt2"].logits == 0


@pytest.mark.slow
def test_the_command_writes_and_verifies_a_package(checkpoint, tmp_path, capsys):
    arguments = ["--format", "pt2", "--verify", "random:4", "--sweep", "100", "--engines", "torch,pt2"]
    assert command.main(["--ckpt", checkpoint, "-o", str(tmp_path / "net.pt2"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "parity: all engines agree" in printed
    assert "pt2: left out of the sweep" in printed


def test_without_a_compiler_nothing_is_read_or_written(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"^format: pt2 needs a C\+\+ compiler, and 'no-such-compiler' is"
    ) as e:
        command.main(["--ckpt", "missing.ckpt", "--format", "pt2", "-o", str(tmp_path / "net.pt2")])
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_the_name_must_be_one_that_loads(tmp_path):
    with pytest.raises(ValueError, match=r"output: got .*net\.bin', allowed is a name that ends in \.pt2"):
        command.main(["--ckpt", "missing.ckpt", "--format", "pt2", "-o", str(tmp_path / "net.bin")])


def test_a_damaged_package_is_one_line(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"no package")
    with pytest.raises(ValueError, match=r"^path: cannot load .* as a pt2 package \([^\n]*\)$"):
        load_pt2(tmp_path / "net.pt2")
