"""The LightningModule that trains a low-bit image classifier."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from typing_extensions import Self

from lightning_n2uq import backbones
from lightning_n2uq.backbones.integer import INTEGER_OPTIONS
from lightning_n2uq.backbones.own import OFFERED
from lightning_n2uq.backbones.pretrained import load_pretrained
from lightning_n2uq.checkpointing.identity import other_version
from lightning_n2uq.modules.checkpoints import load_matching, read_checkpoint
from lightning_n2uq.modules.distillation import load_teacher, soft_cross_entropy
from lightning_n2uq.modules.example_input import ModuleWithExampleInput
from lightning_n2uq.modules.finders import refuse_finders
from lightning_n2uq.modules.first_look import FirstLook
from lightning_n2uq.modules.integer_evaluation import CHOICES, WATCHED, IntegerEvaluation
from lightning_n2uq.modules.memory_format import MEMORY_FORMATS, in_format
from lightning_n2uq.modules.optimizers import OPTIMIZERS, build_optimizer, parameter_groups
from lightning_n2uq.modules.published import (
    published_parameter_groups,
    published_schedule_factor,
    set_numerics,
)
from lightning_n2uq.modules.same_network import check_same_network
from lightning_n2uq.modules.schedules import SCHEDULES, schedule_factor
from lightning_n2uq.modules.sharding import ShardedByStrategy
from lightning_n2uq.modules.void_choices import void_choices
from lightning_n2uq.quantizers.looks import is_look, looking
from lightning_n2uq.utils.state_dicts import named_like
from lightning_n2uq.utils.torchvision_models import TORCHVISION
from lightning_n2uq.utils.validation import check, check_choice, check_integer, check_number

if TYPE_CHECKING:
    from lightning_n2uq.export.runtime.fast_engine import FastNetwork

Stage = Literal["train", "val", "test"]


class QuantizedClassifier(ShardedByStrategy, ModuleWithExampleInput):
    """Image classifier with a quantized backbone, trained on labels or on a teacher's soft labels.

    Every argument is a plain value, so that a YAML file or the command line can set it and a checkpoint that
    holds it loads with `weights_only=True`. A trained model is an ordinary `nn.Module`::

        model = QuantizedClassifier.load_from_checkpoint("best.ckpt").eval()
        logits = model(images)  # (batch, in_channels, height, width) -> (batch, num_classes)

    Logged: `train/loss`, `train/acc`, and `loss`, `acc`, `acc5` (with more than 5 classes) under
    `val/` and `test/`. `metrics["val_confusion"]` and `metrics["test_confusion"]` hold the last
    epoch's confusion matrix (`.compute()`: `(num_classes, num_classes)`, rows are true classes).

    Args:
        backbone: The network: a name in `lightning_n2uq.backbones`, `torchvision/<model>` or `timm/<model>`.
        num_classes: The number of classes; the command line takes it from the data.
        in_channels: The channels of an image; the command line takes them from the data.
        image_size: The height and width of the images, for `example_input_array`; also from the data.
        weight_bits: The bits of quantized weights, 2 to 8; 1 with `binary`, 2 with the ternary
            methods, 32 with `float`.
        activation_bits: The bits of quantized activations, 2 to 8; 32 with the quantizer `float`.
        weight_quantizer: The method for weights, a name in `lightning_n2uq.quantizers.WEIGHT_QUANTIZERS`.
        activation_quantizer: The method for activations, a name in `ACTIVATION_QUANTIZERS`.
        quantize_downsample: Whether 1x1 convolutions in shortcuts are quantized too.
        residual_bits: 8 puts the maps between blocks, and both branches of every sum, on learned 8-bit grids;
            null leaves them real numbers. The networks of this package only.
        first_last_bits: 8 quantizes weights and inputs of the first and the last layer; null leaves them in
            full precision. With both options a network computes with integers only (docs/deployment.md).
        backbone_args: Further keywords of the backbone, for example `{"width": 32}`; `policy`, `pretrained`
            and the network's own for one of another library.
        label_smoothing: The smoothing of the cross-entropy on labels while training, 0 to 1.
        teacher: `torchvision/<model>` or the path of a checkpoint of this package; the loss is then the
            cross-entropy against its probabilities. The teacher is neither trained nor saved.
        temperature: The temperature of both softmaxes in distillation.
        hard_label_weight: The share of the label loss beside a teacher, 0 (the paper's recipe) to 1.
        optimizer: `adam`, `adamw` or `sgd` (Nesterov momentum).
        lr: The learning rate at the start.
        weight_decay: The decay of weights with two or more dimensions; quantizers, biases and norms never
            decay.
        momentum: The momentum of sgd.
        betas: The decay rates of adam's and adamw's averages.
        schedule: `linear` (to 0 after the last step), `cosine` or `constant`, per optimizer step;
            `published` (as the published N2UQ code: linear per epoch, the last epoch at 0; no warm-up).
        warmup_steps: Optimizer steps of linear warm-up.
        quantizer_lr_multiplier: The factor on `lr` for quantizer parameters.
        parameter_groups: `all` (every quantizer parameter has that factor) or `published`: a tenth for
            those that the published N2UQ code finds by name; the paper's networks only.
        threshold_comparison: `>` (the published code) or `>=`, where an input at a threshold gets the
            upper code.
        weight_gradient: The gradient of N2UQ's weights: `scaled` (the published code's `1/S`) or
            `straight_through`.
        pact_gradient: The gradient of PACT's clip: `paper`, or `published` as in the published MobileNetV2.
        integer_evaluation: `auto` (in evaluation mode on the CPU, the integer network that would be exported
            runs, where there is one) or `off` (always the plain modules).
        init_from: `torchvision/<model>` (its real-valued weights), a checkpoint of this package, or a file of
            weights from elsewhere (`load_matching`). A new run starts from those weights that fit, whatever
            their bit widths, and reports the rest.
        memory_format: The order of maps in memory, `contiguous` or `channels_last`: a choice of speed, which
            depends on the processor and the precision; it does not change what the network computes.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    sharded = "backbone"

    def __init__(
        self,
        backbone: str = "resnet20",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        weight_bits: int = 2,
        activation_bits: int = 2,
        weight_quantizer: str = "n2uq",
        activation_quantizer: str = "n2uq",
        quantize_downsample: bool = True,
        residual_bits: int | None = None,
        first_last_bits: int | None = None,
        backbone_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        teacher: str | None = None,
        temperature: float = 1.0,
        hard_label_weight: float = 0.0,
        optimizer: Literal["adam", "adamw", "sgd"] = "adam",
        lr: float = 1.25e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        betas: Sequence[float] = (0.9, 0.999),
        schedule: Literal["linear", "cosine", "constant", "published"] = "linear",
        warmup_steps: int = 0,
        quantizer_lr_multiplier: float = 0.1,
        parameter_groups: Literal["all", "published"] = "all",
        threshold_comparison: Literal[">", ">="] = ">",
        weight_gradient: Literal["scaled", "straight_through"] = "scaled",
        pact_gradient: Literal["paper", "published"] = "paper",
        integer_evaluation: Literal["auto", "off"] = "auto",
        init_from: str | None = None,
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
    ) -> None:
        super().__init__()
        betas = [float(beta) for beta in betas]  # a tuple would be no plain YAML in loggers' files
        self.save_hyperparameters()
        self._check_arguments()
        self.num_classes = num_classes
        self.backbone = self._build_backbone().to(memory_format=MEMORY_FORMATS[memory_format])
        set_numerics(self.backbone, threshold_comparison, weight_gradient, pact_gradient)
        self.example_input_array = torch.zeros(2, in_channels, image_size, image_size)
        self.metrics = self._build_metrics()
        # In a tuple, out of nn.Module's sight: neither in state_dict nor in parameters().
        self._teacher: tuple[nn.Module, ...] = ()
        self._initialised = False
        self._integer = IntegerEvaluation(integer_evaluation)
        self._reported: str | None = None
        self._first_look = FirstLook()

    def _check_arguments(self) -> None:
        hp: Any = self.hparams
        check_integer("num_classes", hp.num_classes, 2)
        check_integer("in_channels", hp.in_channels, 1)
        check_integer("image_size", hp.image_size, 1)
        check_choice("optimizer", hp.optimizer, OPTIMIZERS)
        check_choice("schedule", hp.schedule, (*SCHEDULES, "published"))
        check_choice("parameter_groups", hp.parameter_groups, ("all", "published"))
        check_choice("memory_format", hp.memory_format, MEMORY_FORMATS)
        check_choice("integer_evaluation", hp.integer_evaluation, CHOICES)
        check_integer("warmup_steps", hp.warmup_steps, 0)
        check_number("lr", hp.lr, 0.0, above=True)
        check_number("temperature", hp.temperature, 0.0, above=True)
        for name in ("weight_decay", "quantizer_lr_multiplier"):
            check_number(name, hp[name], 0.0)
        for name in ("label_smoothing", "hard_label_weight", "momentum"):
            check_number(name, hp[name], 0.0, 1.0)
        fits = len(hp.betas) == 2 and all(0 <= beta < 1 for beta in hp.betas)
        check(fits, "betas", hp.betas, "are two numbers from 0 to below 1")

    def _build_backbone(self) -> nn.Module:
        hp: Any = self.hparams
        extra = hp.backbone_args or {}
        if doubled := sorted(extra.keys() & set(OFFERED)):
            raise ValueError(
                f"backbone_args: got {', '.join(doubled)}, set this as an argument of the model instead"
            )
        # Converted networks do not know the options: they are handed on only where they are set.
        arguments = {name: hp[name] for name in OFFERED if name not in INTEGER_OPTIONS or hp[name]}
        return backbones.build(hp.backbone, **arguments, **extra)

    def _build_metrics(self) -> nn.ModuleDict:
        """Returns `<stage>_scores` for every stage, `val_confusion` and `test_confusion`."""
        # Labels are checked by the loss; torchmetrics' own checks cost more than the update.
        options: dict[str, Any] = {"num_classes": self.num_classes, "validate_args": False}
        metrics = nn.ModuleDict()
        for stage in ("train", "val", "test"):
            scores: dict[str, Metric | MetricCollection] = {
                "acc": MulticlassAccuracy(average="micro", **options)
            }
            if stage != "train":
                metrics[f"{stage}_confusion"] = MulticlassConfusionMatrix(**options)
                if self.num_classes > 5:
                    scores["acc5"] = MulticlassAccuracy(top_k=5, average="micro", **options)
            # No compute groups: a first batch without errors makes both look alike, and they would be merged.
            metrics[f"{stage}_scores"] = MetricCollection(scores, prefix=f"{stage}/", compute_groups=False)
        return metrics

    @classmethod
    def from_checkpoint(cls, path: str, argument: str = "path") -> Self:
        """Returns a trained model on the CPU, without running any code from the file.

        Raises:
            ValueError: The file is missing, damaged or of another kind; the message begins with `argument`.
        """
        checkpoint = read_checkpoint(path, argument)
        try:
            model = cls(**checkpoint["hyper_parameters"])
            model.load_state_dict(checkpoint["state_dict"])
        except (TypeError, RuntimeError) as error:
            reason = other_version(checkpoint) or " ".join(str(error).split())[:300]
            raise ValueError(
                f"{argument}: {path!r} is no {cls.__name__} of this version ({reason})"
            ) from error
        return model

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `(batch, num_classes)` of images `(batch, in_channels, height, width)`."""
        if not self.training:
            logits = self._integer.logits(self.backbone, images)
            self._report_evaluation()
            if logits is not None:
                return logits
        if self._first_look.is_look(self.backbone, images, self.example_input_array):
            with looking():
                return cast(Tensor, self.backbone(in_format(images, self.hparams["memory_format"])))
        return cast(Tensor, self.backbone(in_format(images, self.hparams["memory_format"])))

    def deployed(self, images: Tensor) -> "FastNetwork | None":
        """Returns the integer network that evaluates these images; None if the plain modules do."""
        return self._integer.network(self.backbone, images)

    def evaluation(self) -> str:
        """Returns in words what evaluation on the CPU runs: the integer network, or plain modules and why."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval().deployed(cast(Tensor, self.example_input_array))
        for module, mode in modes:
            module.training = mode
        return self._integer.describe()

    def _report_evaluation(self) -> None:
        """Logs what runs in evaluation, whenever it is another than before; a summary or a look is none.

        An obstacle before training may be that steps have not been fitted: it is told once it lasts.
        """
        if self._trainer is None or is_look() or self._integer.obstacle in (self._reported, WATCHED):
            return
        if self._integer.obstacle and self._trainer.sanity_checking:
            return
        self._reported = self._integer.obstacle
        rank_zero_info(f"evaluation: {self._integer.describe()}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another network, whose weights may fit all the same.

        Names may be those of a compiled network on either side.

        Raises:
            ValueError: An argument differs that changes what the network computes.
        """
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if saved is not None:
            check_same_network(QuantizedClassifier, self.hparams, saved, "ckpt_path")
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = named_like(checkpoint["state_dict"], self.state_dict())

    def setup(self, stage: str) -> None:
        """Loads the teacher before a fit, and initial weights unless the run is resumed."""
        if stage != "fit":
            return
        hp: Any = self.hparams
        if self._trainer is not None:
            refuse_finders(self.trainer.callbacks)  # type: ignore[attr-defined]
        for line in void_choices(QuantizedClassifier, hp):
            rank_zero_warn(line)
        if hp.teacher is not None:
            teacher = load_teacher(hp.teacher, self.num_classes, QuantizedClassifier.from_checkpoint)
            self._teacher = (teacher.to(memory_format=MEMORY_FORMATS[hp.memory_format]),)
        # A second fit of the same object continues; it must not fall back to the initial weights.
        if hp.init_from is not None and self.trainer.ckpt_path is None and not self._initialised:
            rank_zero_info(self._load_initial_weights(hp.init_from))
        self._initialised = True

    def _load_initial_weights(self, source: str) -> str:
        published = source.startswith(TORCHVISION)
        report = load_pretrained(self.backbone, source) if published else load_matching(self, source)
        return f"init_from {report.summary()}"

    def on_fit_start(self) -> None:
        """Moves the teacher to the device: Lightning does not see it."""
        for teacher in self._teacher:
            teacher.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the training loss of one batch."""
        return self._shared_step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._shared_step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Updates the test metrics."""
        self._shared_step(batch, "test")

    def predict_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        """Returns `probabilities` `(batch, num_classes)` and predicted `labels` `(batch,)`."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        probabilities = self(images).softmax(dim=-1)
        return {"probabilities": probabilities, "labels": probabilities.argmax(dim=-1)}

    def on_validation_start(self) -> None:
        """Looks at the weights anew, however they were changed."""
        self._integer.forget()

    def on_test_start(self) -> None:
        """Looks at the weights anew."""
        self._integer.forget()

    def on_predict_start(self) -> None:
        """Looks at the weights anew."""
        self._integer.forget()

    def on_validation_epoch_start(self) -> None:
        """Starts a new confusion matrix; the last one stays readable until here."""
        cast(Metric, self.metrics["val_confusion"]).reset()

    def on_test_epoch_start(self) -> None:
        """Starts a new confusion matrix."""
        cast(Metric, self.metrics["test_confusion"]).reset()

    def _shared_step(self, batch: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
        images, labels = batch
        logits = self(images)
        training = stage == "train"
        loss = self._training_loss(images, logits, labels) if training else F.cross_entropy(logits, labels)
        scores = cast(MetricCollection, self.metrics[f"{stage}_scores"])
        scores.update(logits, labels)
        if not training:
            cast(Metric, self.metrics[f"{stage}_confusion"]).update(logits, labels)
        self.log(
            f"{stage}/loss", loss, on_step=training, on_epoch=not training, prog_bar=True,
            batch_size=len(labels), sync_dist=not training,
        )  # fmt: skip
        self.log_dict(scores, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def _training_loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        hp: Any = self.hparams
        share = hp.hard_label_weight if self._teacher else 1.0
        loss = logits.new_zeros(())
        if share > 0:
            loss = loss + share * F.cross_entropy(logits, labels, label_smoothing=hp.label_smoothing)
        if share < 1:
            with torch.no_grad():
                teacher_logits = self._teacher[0](in_format(images, hp.memory_format))
            loss = loss + (1 - share) * soft_cross_entropy(logits, teacher_logits, hp.temperature)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns an optimizer over the parameter groups, and a schedule per optimizer step."""
        hp: Any = self.hparams
        if hp.parameter_groups == "published":
            groups = published_parameter_groups(self.backbone, hp.lr, hp.weight_decay)
        else:
            groups = parameter_groups(self.backbone, hp.lr, hp.weight_decay, hp.quantizer_lr_multiplier)
        betas = (hp.betas[0], hp.betas[1])
        optimizer = build_optimizer(hp.optimizer, groups, lr=hp.lr, momentum=hp.momentum, betas=betas)
        # A fast_dev_run has fewer steps than most warm-ups.
        warmup = 0 if getattr(self.trainer, "fast_dev_run", False) else hp.warmup_steps
        steps = self.trainer.estimated_stepping_batches
        if hp.schedule == "published":
            factor = published_schedule_factor(steps, self.trainer.max_epochs)
        else:
            factor = schedule_factor(hp.schedule, steps, warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
