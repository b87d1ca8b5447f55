"""Export of the newer methods: codes are those of evaluation where levels are even, else a line says why."""

import numpy as np
import pytest
import torch

from lightning_n2uq import backbones
from lightning_n2uq.convert import quantize_model
from lightning_n2uq.export import ExactNetwork, describe, load_safetensors, save_safetensors
from lightning_n2uq.export.runtime.engines import ENGINES
from lightning_n2uq.export.verify.parity import compare, float_engine

EVEN = {"ewgs": 2, "statsq": 2, "least_error": 4, "seq": 2, "seq_ternary": 2, "ternary": 2, "binary": 1}


def network(perturb, weights, bits, activations="lsq", **options):
    torch.manual_seed(0)
    model = backbones.resnet20(
        weight_bits=bits, activation_bits=2, weight_quantizer=weights, activation_quantizer=activations,
        num_classes=10, width=8, **options,
    ).train()  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    model(x)
    perturb(model).train()(x)
    return model.eval()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("weights", "activations"), [*((name, "lsq") for name in EVEN), ("statsq", "ewgs"), ("ewgs", "ewgs")]
)
def test_integer_only_networks_have_the_codes_of_evaluation(perturb, weights, activations):
    model = network(perturb, weights, EVEN[weights], activations, residual_bits=8, first_last_bits=8)
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    description = describe(model, images.shape[1:])
    found = {name: ENGINES[name](description) for name in ("torch", "numpy", "onnxruntime")}
    report = compare(found, [(images, None)], float_engine(model, None))
    assert report.ok, report.table()
    assert not any(report.floating.codes.values()), report.table()
    assert report.floating.logits < 1e-6


@pytest.mark.parametrize("weights", EVEN)
def test_files_keep_the_weights(perturb, tmp_path, weights):
    model = network(perturb, weights, EVEN[weights])
    description = describe(model, (3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ExactNetwork(description)(x), model(x), rtol=2e-2, atol=2e-2)
    save_safetensors(description, tmp_path / "a.safetensors")
    read = load_safetensors(tmp_path / "a.safetensors")
    assert torch.equal(ExactNetwork(read)(x), ExactNetwork(description)(x))


@pytest.mark.parametrize("name", ["nulsq", "lcq"])
def test_uneven_levels_are_refused_in_one_line(perturb, name):
    with pytest.raises(ValueError, match=f"activation quantizer '{name}' has no evenly spaced levels"):
        describe(network(perturb, "n2uq", 2, name), (3, 16, 16))
    with pytest.raises(ValueError, match=f"weight quantizer '{name}' has no integer levels; exportable are"):
        describe(network(perturb, name, 2, "n2uq"), (3, 16, 16))
    with pytest.raises(ValueError, match=f"quantizer: got '{name}', allowed with residual_bits 8 are"):
        backbones.resnet20(weight_quantizer=name, residual_bits=8)


def test_an_interval_without_data_is_refused():
    with pytest.raises(ValueError, match="its interval was never initialised; train the network first"):
        describe(backbones.resnet20(activation_quantizer="ewgs").eval(), (3, 16, 16))


@pytest.mark.parametrize("method", ["ewgs", "nulsq", "lcq"])
def test_converted_networks_take_any_range(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
    x = torch.randn(256, 32) * 5 - 2
    wanted = model(x).detach()
    policy = {
        "weight_bits": 6,
        "activation_bits": 6,
        "weight_quantizer": method,
        "activation_quantizer": method,
    }
    quantize_model(model, policy, [x])
    for mode in (True, False):
        error = (model.train(mode)(x) - wanted).square().mean() / wanted.square().mean()
        assert error < 0.02
