"""Files that revision 0514abc wrote, with the logits that it computed for them (`tests/data/export`)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors", reason="safetensors is not installed (extra 'export')")

from lightning_n2uq.export import ExactNetwork, load_safetensors, run_numpy, save_safetensors
from lightning_n2uq.export.runtime.engines import chosen_engines, session
from lightning_n2uq.export.verify.parity import compare

FILES = Path(__file__).parents[1] / "data" / "export"
CASES = [("n2uq_w2a2", "images"), ("lsq_w4a4_pixels", "pixels")]
WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "torchmetrics", "lightning", "onnx"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
from lightning_n2uq import export
from lightning_n2uq.export.runtime.numpy_engine import run_numpy

answers = np.load(sys.argv[1] + "/answers.npz")
for name, images in (("n2uq_w2a2", "images"), ("lsq_w4a4_pixels", "pixels")):
    description = export.load_safetensors(f"{sys.argv[1]}/{name}.safetensors")
    values = run_numpy(description, answers[images])
    print(name, np.array_equal(values[description.output], answers[name]))
try:
    export.ExactNetwork
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def answers():
    return np.load(FILES / "answers.npz")


@pytest.mark.parametrize(("name", "images"), CASES)
def test_safetensors_files_give_the_same_bits_and_are_written_as_they_were(answers, tmp_path, name, images):
    from safetensors.numpy import load_file

    path = FILES / f"{name}.safetensors"
    description = load_safetensors(path)
    assert description.metadata["best_score"] == "val/acc=0.9"
    x, expected = answers[images], answers[name]
    np.testing.assert_array_equal(run_numpy(description, x)[description.output], expected)
    np.testing.assert_array_equal(ExactNetwork(description)(torch.from_numpy(x)).numpy(), expected)
    save_safetensors(description, tmp_path / "again.safetensors")
    before, again = load_file(path), load_file(tmp_path / "again.safetensors")
    assert before.keys() == again.keys()
    for key, array in before.items():
        assert array.dtype == again[key].dtype, key
        np.testing.assert_array_equal(array, again[key], key)


def test_onnx_files_give_the_same_bits_and_verify(answers):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
    model = (FILES / "n2uq_w2a2.onnx").read_bytes()
    (logits,) = session(model).run(None, {"images": answers["images"]})
    np.testing.assert_array_equal(logits, answers["n2uq_w2a2"])
    description = load_safetensors(FILES / "n2uq_w2a2.safetensors")
    engines = chosen_engines(["torch", "numpy", "onnxruntime"], description, model)
    report = compare(engines, [(answers["images"], None)])
    assert report.ok, report.table()
    assert {name: tally.logits for name, tally in report.engines.items()} == {"numpy": 0, "onnxruntime": 0}


def test_qonnx_files_give_the_same_bits_and_verify(answers):
    pytest.importorskip("qonnx", reason="qonnx is not installed (extra 'export')")
    model = (FILES / "n2uq_w2a2.qonnx.onnx").read_bytes()
    description = load_safetensors(FILES / "n2uq_w2a2.safetensors")
    engines = chosen_engines(["torch", "qonnx"], description, model, "qonnx")
    np.testing.assert_array_equal(engines["qonnx"](answers["images"]).logits, answers["n2uq_w2a2"])
    report = compare(engines, [(answers["images"], None)])
    assert report.ok, report.table()


def test_files_are_loaded_and_run_in_numpy_where_torch_cannot_be_imported():
    command = [sys.executable, "-c", WITHOUT_TORCH, str(FILES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["n2uq_w2a2 True", "lsq_w4a4_pixels True", "torch is blocked"]
