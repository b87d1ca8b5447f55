"""Knowledge distillation on soft labels, as in N2UQ's recipe (arXiv 2111.14826, section 4.1)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_n2uq.utils.torchvision_models import TORCHVISION, build_torchvision


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the mean cross-entropy between softened teacher and student distributions.

    `-T^2 * sum_c softmax(teacher/T)_c * log_softmax(student/T)_c`. It differs from the KL divergence by
    the teacher's entropy, a constant for the student. `T^2` keeps the gradient's size independent of the
    temperature (Hinton et al., arXiv 1503.02531); at 1, the published recipe, it is plain cross-entropy.

    Args:
        logits: The student's logits, `(batch, classes)`.
        teacher_logits: The teacher's logits, of the same shape; no gradient flows into them.
        temperature: What both logits are divided by; positive.
    """
    target = F.softmax(teacher_logits.detach() / temperature, dim=-1)
    return F.cross_entropy(logits / temperature, target) * temperature**2


def load_teacher(source: str, num_classes: int, from_checkpoint: Callable[..., Any]) -> nn.Module:
    """Loads a frozen teacher in eval mode.

    Args:
        source: `torchvision/<model>` (its default weights, from torch's cache or downloaded) or the path of
            a checkpoint written by this package.
        num_classes: The number of classes that the teacher has to have.
        from_checkpoint: `QuantizedClassifier.from_checkpoint`, which reads a path; the classifier imports
            this module and hands it in.

    Raises:
        ValueError: The teacher cannot be found or read, or has another number of classes.
    """
    if source.startswith(TORCHVISION):
        teacher, classes = build_torchvision(source, "teacher", pretrained=True)
    else:
        model = from_checkpoint(source, argument="teacher")
        teacher, classes = model.backbone, model.num_classes
    if classes != num_classes:
        raise ValueError(f"teacher: {source!r} has {classes} classes, the student has {num_classes}")
    return teacher.eval().requires_grad_(False)
