"""Networks of torchvision, timm and transformers, small enough for a processor, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Case:
    """A network and what to call it with.

    Attributes:
        model: The network in full precision.
        arguments: Inputs by position, two examples.
        keywords: Inputs by name.
        targets: What it takes beside the images in training, if it returns losses itself.
    """

    model: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    targets: list[dict[str, Tensor]] | None = None


def _images(size: int, *leading: int) -> Tensor:
    return torch.randn(2, *(leading or (3,)), size, size)


def _torchvision(name: str, size: int = 64, **arguments: Any) -> Callable[[], Case]:
    def build() -> Case:
        from torchvision import models

        return Case(models.get_model(name, weights=None, **arguments), (_images(size),))

    return build


def small_vit(size: int, patch: int, depth: int, heads: int) -> nn.Module:
    """Returns torchvision's vision transformer, 64 wide, for ten classes of images `[3, size, size]`."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(size, patch, depth, heads, 64, 128, num_classes=10)


def _own_vit() -> Case:
    return Case(small_vit(32, 8, 2, 2), (_images(32),))


def _segmentation(name: str) -> Callable[[], Case]:
    def build() -> Case:
        from torchvision import models

        none = {"weights": None, "weights_backbone": None}
        return Case(models.get_model(name, num_classes=5, **none), (_images(64),))

    return build


def _detection(name: str) -> Callable[[], Case]:
    def build() -> Case:
        from torchvision import models

        none = {"weights": None, "weights_backbone": None}
        model = models.get_model(name, num_classes=3, **none)
        boxes = torch.tensor([[20.0, 30.0, 160.0, 200.0]])
        targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(2)]
        return Case(model, (list(torch.rand(2, 3, 320, 320)),), targets=targets)

    return build


def _video(name: str) -> Callable[[], Case]:
    def build() -> Case:
        from torchvision import models

        return Case(models.get_model(name, weights=None, num_classes=5), (_images(32, 3, 8),))

    return build


def _timm(name: str, size: int = 64, **arguments: Any) -> Callable[[], Case]:
    def build() -> Case:
        import timm

        return Case(timm.create_model(name, num_classes=10, **arguments), (_images(size),))

    return build


_SMALL = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {**_SMALL, "intermediate_size": 128}


def _transformers(model: str, config: str, **values: Any) -> Callable[[], Case]:
    def build() -> Case:
        import transformers

        network = getattr(transformers, model)(getattr(transformers, config)(**values))
        tokens = torch.randint(3, 100, (2, 16))
        if config == "ViTConfig":
            return Case(network, (_images(32),))
        if config == "T5Config":
            keywords = {"input_ids": tokens, "decoder_input_ids": tokens[:, :8], "use_cache": False}
            return Case(network, (), keywords)
        return Case(network, (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})

    return build


NETWORKS: dict[str, Callable[[], Case]] = {
    "torchvision resnet18": _torchvision("resnet18"),
    "torchvision vgg11_bn": _torchvision("vgg11_bn", 32),
    "torchvision mobilenet_v2": _torchvision("mobilenet_v2"),
    "torchvision mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "torchvision densenet121": _torchvision("densenet121"),
    "torchvision inception_v3": _torchvision("inception_v3", 96, aux_logits=False, init_weights=False),
    "torchvision efficientnet_b0": _torchvision("efficientnet_b0"),
    "torchvision regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "torchvision shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "torchvision convnext_tiny": _torchvision("convnext_tiny"),
    "torchvision vision transformer": _own_vit,
    "torchvision lraspp (segmentation)": _segmentation("lraspp_mobilenet_v3_large"),
    "torchvision deeplabv3 (segmentation)": _segmentation("deeplabv3_mobilenet_v3_large"),
    "torchvision ssdlite320 (detection)": _detection("ssdlite320_mobilenet_v3_large"),
    "torchvision fasterrcnn (detection)": _detection("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "torchvision r3d_18 (video)": _video("r3d_18"),
    "timm resnet10t": _timm("resnet10t"),
    "timm repvgg_a0": _timm("repvgg_a0"),
    "timm mobilenetv4_conv_small": _timm("mobilenetv4_conv_small"),
    "timm lcnet_050": _timm("lcnet_050"),
    "timm tinynet_e": _timm("tinynet_e"),
    "timm ghostnet_050": _timm("ghostnet_050"),
    "timm regnetx_002": _timm("regnetx_002"),
    "timm rexnet_100": _timm("rexnet_100"),
    "timm hgnetv2_b0": _timm("hgnetv2_b0"),
    "timm convnext_atto": _timm("convnext_atto"),
    "timm edgenext_xx_small": _timm("edgenext_xx_small"),
    "timm mobilevit_xxs": _timm("mobilevit_xxs"),
    "timm fastvit_t8": _timm("fastvit_t8"),
    "timm poolformer_s12": _timm("poolformer_s12"),
    "timm pvt_v2_b0": _timm("pvt_v2_b0"),
    "timm mixer_s32_224": _timm("mixer_s32_224", img_size=64),
    "timm deit_tiny (2 blocks)": _timm("deit_tiny_patch16_224", img_size=64, depth=2),
    "timm swin_tiny (4 blocks)": _timm("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(1, 1, 1, 1)),
    "timm xcit_nano": _timm("xcit_nano_12_p16_224", img_size=64),
    "transformers BERT": _transformers("BertForSequenceClassification", "BertConfig", **_ENCODER),
    "transformers RoBERTa": _transformers("RobertaForSequenceClassification", "RobertaConfig", **_ENCODER),
    "transformers ELECTRA": _transformers("ElectraForSequenceClassification", "ElectraConfig", **_ENCODER),
    "transformers ALBERT": _transformers("AlbertForSequenceClassification", "AlbertConfig", **_ENCODER),
    "transformers DistilBERT": _transformers(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=100,
        dim=64,
        n_layers=2,
        n_heads=2,
        hidden_dim=128,
    ),
    "transformers GPT-2": _transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=100,
        n_embd=64,
        n_layer=2,
        n_head=2,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "transformers OPT": _transformers(
        "OPTForCausalLM",
        "OPTConfig",
        **_SMALL,
        ffn_dim=128,
        word_embed_proj_dim=64,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "transformers Llama": _transformers(
        "LlamaForCausalLM", "LlamaConfig", **_ENCODER, use_cache=False, bos_token_id=1, eos_token_id=2
    ),
    "transformers T5": _transformers(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=100,
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
    ),
    "transformers ViT": _transformers(
        "ViTForImageClassification",
        "ViTConfig",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=10,
    ),
}
"""Networks by name."""
