"""Knowledge distillation on soft labels, as in N2UQ's recipe (arXiv 2111.14826, section 4.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TORCHVISION = "torchvision/"


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy between softened teacher and student distributions.

    `-T^2 * sum_c softmax(teacher/T)_c * log_softmax(student/T)_c`. It differs from the KL divergence by
    the teacher's entropy, a constant for the student. `T^2` keeps the gradient's size independent of the
    temperature (Hinton et al., arXiv 1503.02531); at 1, the published recipe, it is plain cross-entropy.

    Args:
        logits: Student, `(batch, classes)`.
        teacher_logits: Teacher, same shape; no gradient flows into it.
        temperature: Positive.
    """
    target = F.softmax(teacher_logits.detach() / temperature, dim=-1)
    return F.cross_entropy(logits / temperature, target) * temperature**2


def load_teacher(source: str, num_classes: int) -> nn.Module:
    """Loads a frozen teacher in eval mode.

    Args:
        source: `torchvision/<model>` (its default weights, from torch's cache or downloaded) or the path of
            a checkpoint written by this package.
        num_classes: Classes that the teacher has to have.

    Raises:
        ValueError: If the teacher cannot be found or read, or has another number of classes.
    """
    classes, teacher = (
        _from_torchvision(source) if source.startswith(TORCHVISION) else _from_checkpoint(source)
    )
    if classes != num_classes:
        raise ValueError(f"teacher: {source!r} has {classes} classes, the student has {num_classes}")
    return teacher.eval().requires_grad_(False)


def _from_torchvision(source: str) -> tuple[int, nn.Module]:
    from torchvision import models  # only where a torchvision teacher is asked for

    name = source.removeprefix(TORCHVISION)
    if name not in models.list_models(models):
        raise ValueError(f"teacher: got {source!r}, torchvision has no classification model {name!r}")
    try:
        teacher = models.get_model(name, weights="DEFAULT")
    except OSError as error:  # urllib's errors are OSErrors
        raise ValueError(
            f"teacher: weights of {source!r} are neither in {torch.hub.get_dir()!r} "
            f"nor could be downloaded ({error})"
        ) from error
    return len(models.get_model_weights(name).DEFAULT.meta["categories"]), teacher


def _from_checkpoint(path: str) -> tuple[int, nn.Module]:
    from lightning_n2uq.modules.classifier import QuantizedClassifier  # the classifier imports this module

    teacher = QuantizedClassifier.from_checkpoint(path, argument="teacher")
    return teacher.num_classes, teacher.backbone
