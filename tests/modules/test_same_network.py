"""A checkpoint is loaded into the network that it is of, and into no other whose shapes are the same."""

import pytest

from lightning_n2uq.modules import QuantizedClassifier

NETWORK = {"backbone": "resnet20", "backbone_args": {"width": 4}, "image_size": 8}


def checkpoint_of(**arguments):
    return {"hyper_parameters": dict(QuantizedClassifier(**NETWORK, **arguments).hparams)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_bits": 4}, "has weight_bits 2, but the model has weight_bits 4"),
        ({"activation_quantizer": "n2uq_fixed"}, "has activation_quantizer 'n2uq', but"),
        ({"weight_quantizer": "dorefa"}, "but the model has weight_quantizer 'dorefa'"),
        ({"quantize_downsample": False}, "has quantize_downsample True, but"),
        ({"threshold_comparison": ">="}, "has threshold_comparison '>', but"),
        ({"in_channels": 1, "num_classes": 5}, "has num_classes 10, in_channels 3, but"),
    ],
)
def test_every_argument_that_changes_the_function_is_compared(changed, message):
    saved = checkpoint_of()
    with pytest.raises(ValueError, match=r"^ckpt_path: the checkpoint's network has ") as error:
        QuantizedClassifier(**NETWORK, **changed).on_load_checkpoint(saved)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_arguments_of_the_training_are_not_compared():
    training = {"lr": 0.5, "optimizer": "sgd", "weight_gradient": "straight_through", "warmup_steps": 3}
    QuantizedClassifier(**NETWORK, **training).on_load_checkpoint(checkpoint_of())


def test_a_checkpoint_that_lacks_an_argument_had_its_default():
    saved = checkpoint_of()
    del saved["hyper_parameters"]["threshold_comparison"]
    QuantizedClassifier(**NETWORK).on_load_checkpoint(saved)
    with pytest.raises(ValueError, match="threshold_comparison '>', but"):
        QuantizedClassifier(**NETWORK, threshold_comparison=">=").on_load_checkpoint(saved)


def test_no_keywords_and_none_are_one_and_the_same():
    saved = checkpoint_of()
    saved["hyper_parameters"]["backbone_args"] = None
    arguments = {**NETWORK, "backbone_args": {}}
    QuantizedClassifier(**arguments).on_load_checkpoint(saved)


def test_a_checkpoint_without_hyperparameters_is_left_to_its_shapes():
    QuantizedClassifier(**NETWORK).on_load_checkpoint({"state_dict": {}})
