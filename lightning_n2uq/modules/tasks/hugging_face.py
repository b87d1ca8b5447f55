"""Networks of Hugging Face's transformers, from a config or from pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_n2uq.utils.extras import how_to_install


def build_transformer(
    kind: str, model_type: str | None, config: Mapping[str, Any], pretrained: str | None
) -> nn.Module:
    """Builds a network of transformers.

    Args:
        kind: The name of its factory, such as `AutoModelForCausalLM`.
        model_type: The family (`bert`, `gpt2`, `llama`, ...), for a network with random weights.
        config: The entries of the family's config; with `pretrained`, those that differ.
        pretrained: A folder, or a name on the Hugging Face Hub (cached or downloaded), to load weights from.

    Raises:
        ValueError: transformers is missing, the family is unknown or of another kind, an entry does not fit,
            or weights cannot be had; one line.
    """
    if (model_type is None) == (pretrained is None):
        raise ValueError(
            f"model_type: got {model_type!r} with pretrained {pretrained!r}, allowed is exactly one of both"
        )
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"model_type: got {model_type or pretrained!r}, which needs transformers: "
            f"{how_to_install('transformers')}"
        ) from error
    factory = getattr(transformers, kind)
    if pretrained is not None:
        return _loaded(factory, pretrained, config)
    known = transformers.CONFIG_MAPPING
    if model_type is None or model_type not in known:
        raise ValueError(f"model_type: got {model_type!r}, allowed are families of transformers, such as "
                         "bert, distilbert, gpt2 and llama")  # fmt: skip
    allowed = known[model_type]().to_dict()
    if unknown := sorted(set(config) - set(allowed) - {"num_labels"}):
        raise ValueError(f"config: got {', '.join(unknown)}, allowed are {', '.join(sorted(allowed))}")
    try:
        model: nn.Module = factory.from_config(known[model_type](**config))
    except Exception as error:  # each family checks its entries in its own way
        raise ValueError(f"config: {model_type} refuses {dict(config)} ({_line(error)})") from error
    return model


def _loaded(factory: Any, pretrained: str, config: Mapping[str, Any]) -> nn.Module:  # noqa: ANN401
    try:
        model: nn.Module = factory.from_pretrained(pretrained, **config)
    except Exception as error:  # transformers, the hub's client and the connection have their own errors
        raise ValueError(
            f"pretrained: got {pretrained!r}, allowed is a folder with weights of transformers, or a name on "
            f"the Hub that is cached or can be downloaded ({_line(error)})"
        ) from error
    return model.train()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
