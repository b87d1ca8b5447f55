import pytest

from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.modules.void_choices import void_choices

SMALL = {
    "backbone": "resnet20",
    "num_classes": 10,
    "in_channels": 1,
    "image_size": 8,
    "backbone_args": {"width": 4},
}
CASES = {
    "temperature": ({"temperature": 4.0}, "temperature: got 4.0, which has no effect without a teacher"),
    "hard labels": ({"hard_label_weight": 0.3}, "hard_label_weight: got 0.3, .* without a teacher"),
    "momentum, adam": ({"momentum": 0.5}, "momentum: got 0.5, .* with optimizer adam"),
    "momentum, adamw": ({"momentum": 0.5, "optimizer": "adamw"}, "momentum: got 0.5, .* optimizer adamw"),
    "betas": ({"betas": [0.8, 0.9], "optimizer": "sgd"}, r"betas: got \[0.8, 0.9\], .* with optimizer sgd"),
    "pact": ({"pact_gradient": "published"}, "pact_gradient: got 'published', .* activation_quantizer pact"),
    "warm-up": ({"warmup_steps": 5, "schedule": "published"}, "warmup_steps: got 5, .* schedule published"),
    "rate": (
        {"quantizer_lr_multiplier": 1.0, "parameter_groups": "published"},
        "quantizer_lr_multiplier: got 1.0, .* parameter_groups published",
    ),
    "smoothing": ({"label_smoothing": 0.1, "teacher": "a.ckpt"}, "label_smoothing: got 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_choice_without_effect_is_named(case):
    chosen, line = CASES[case]
    model = QuantizedClassifier(**SMALL, **chosen)
    if "teacher" in chosen:
        assert len(void_choices(QuantizedClassifier, model.hparams)) == 1
        return
    with pytest.warns(UserWarning, match=line) as caught:
        model.setup("fit")
    assert len(caught) == 1


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.5},
        {"optimizer": "adamw", "betas": [0.8, 0.9]},
        {"activation_quantizer": "pact", "weight_quantizer": "dorefa", "pact_gradient": "published"},
        {"backbone": "mobilenet_v2", "pact_gradient": "published", "weight_bits": 4, "activation_bits": 4},
        {"label_smoothing": 0.1, "warmup_steps": 5, "quantizer_lr_multiplier": 1.0},
        {"teacher": "a.ckpt", "temperature": 4.0, "hard_label_weight": 0.3, "label_smoothing": 0.1},
    ],
)
def test_choices_with_an_effect_and_defaults_pass(chosen):
    settings = {**SMALL, **chosen}
    if "backbone" in chosen:
        del settings["backbone_args"]
    model = QuantizedClassifier(**settings)
    assert void_choices(QuantizedClassifier, model.hparams) == []
