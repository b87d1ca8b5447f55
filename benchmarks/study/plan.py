"""What a study runs: rows of its table, in order, each with its optimizer's source.

All networks of a study share data, augmentation, epochs and batch size; a quantized network starts from the
last weights of the float network of its seed. A method's optimizer is that of its paper (`Recipe.source`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Recipe:
    """How a method is optimized.

    Attributes:
        source: Where the values are from, for the table.
        settings: Options of `n2uq fit` without the leading dashes, and their values.
        weight_decay: By bit width, where the paper lowers it with the bits; else empty.
    """

    source: str
    settings: Mapping[str, str]
    weight_decay: Mapping[int, str] = field(default_factory=dict)


def run_name(row: str, seed: int) -> str:
    """Name of the folder and of the file of figures of a row's run."""
    return f"{re.sub('[^a-z0-9]+', '_', row.lower())}_seed{seed}"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        row: Name of the row in the table and, where `config` says nothing else, of the config in the study's
            folder of configs.
        seed: Seed of weights, order and augmentation.
        epochs: Length of the run.
        settings: Options of `n2uq fit` without the leading dashes, and their values; `{start}` in one stands
            for the checkpoint that the run starts from.
        source: Where the optimizer's values are from.
        start: Row whose last checkpoint of the same seed the run starts from; None for random weights.
        config: Name of the config, where several rows share one; else empty.
    """

    row: str
    seed: int
    epochs: int
    settings: tuple[tuple[str, str], ...]
    source: str
    start: str | None = None
    config: str = ""

    @property
    def name(self) -> str:
        """Name of the run's folder and of its file of figures."""
        return run_name(self.row, self.seed)

    def config_in(self, configs: Path) -> Path:
        """The run's config."""
        return configs / f"{self.config or self.row}.yaml"

    def identity(self, configs: Path) -> str:
        """Digest of what decides the run's outcome: values of the config, seed, length, settings, start."""
        config = yaml.safe_load(self.config_in(configs).read_text(encoding="utf-8"))
        parts = [config, self.seed, self.epochs, list(self.settings), self.start]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A list of runs over one data set.

    Attributes:
        name: Name of the study and, where `folder` says nothing else, of its folder of configs.
        runs: In the order in which they are worked off.
        data_options: Further options of `n2uq fit` for every run, without the leading dashes.
        folder: Name of the folder of configs, where it is not the study's.
    """

    name: str
    runs: tuple[Run, ...]
    data_options: tuple[tuple[str, str], ...] = ()
    folder: str = ""

    @property
    def configs(self) -> Path:
        """Folder of the configs that the rows name."""
        return CONFIGS / (self.folder or self.name)


_ADAM = {"optimizer": "adam", "lr": "1.25e-3", "schedule": "linear", "weight_decay": "0"}
_N2UQ = Recipe("N2UQ, section 4.1: Adam, 1.25e-3, linear to 0, no decay, quantizers at lr/10", _ADAM)
_SGD = {"optimizer": "sgd", "momentum": "0.9", "schedule": "cosine"}
_LSQ_DECAY = {2: "2.5e-5", 3: "5e-5", 4: "1e-4"}
_LSQ = Recipe(
    "LSQ, section 3: SGD 0.9, 0.01, cosine, decay 1e-4 at 4 bits, half at 3, a quarter at 2",
    {**_SGD, "lr": "0.01", "quantizer_lr_multiplier": "1"},
    _LSQ_DECAY,
)

RECIPES: dict[str, Recipe] = {
    "n2uq": _N2UQ,
    "n2uq_fixed": _N2UQ,
    "lsq": _LSQ,
    "lsq_plus": Recipe(f"as {_LSQ.source}", _LSQ.settings, _LSQ_DECAY),
    "pact": Recipe(
        "SGD 0.9, 0.1, decay 2e-4, cosine (not yet checked against PACT's paper)",
        {**_SGD, "lr": "0.1", "weight_decay": "2e-4", "quantizer_lr_multiplier": "1"},
    ),
    "apot": Recipe(
        "APoT's CIFAR-10 script: SGD 0.9, 0.04, decay 1e-4, 3e-5 at 2 bits, weights' clips at half the rate"
        " (two steps there, cosine here; activations' clips at 2.5 times the rate there, half here)",
        {**_SGD, "lr": "0.04", "quantizer_lr_multiplier": "0.5"},
        {2: "3e-5", 3: "1e-4", 4: "1e-4"},
    ),
    "dorefa": Recipe(
        "DoReFa-Net's script for SVHN: Adam, 1e-3 (halved every 100 epochs there, linear to 0 here)",
        {**_ADAM, "lr": "1e-3"},
    ),
}
FLOAT = Recipe(
    "He et al. 2016 with warm-up: SGD 0.9, 0.1, decay 5e-4, cosine",
    {**_SGD, "lr": "0.1", "weight_decay": "5e-4", "warmup_steps": "391"},
)


def _method_and_bits(row: str) -> tuple[str, int]:
    method, _, width = row.rpartition("_w")
    return method, int(width[0])


def _run(row: str, seed: int, epochs: int, float_epochs: int) -> Run:
    if row == "float":
        recipe, start, length, decay = FLOAT, None, float_epochs, {}
    else:
        method, bits = _method_and_bits(row)
        recipe, start, length = RECIPES[method], "float", epochs
        decay = {"weight_decay": recipe.weight_decay[bits]} if recipe.weight_decay else {}
    settings = {f"model.init_args.{name}": value for name, value in {**recipe.settings, **decay}.items()}
    return Run(row, seed, length, tuple(sorted(settings.items())), recipe.source, start)


_STAGES_OF_SMALL_IMAGES = [
    [1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]
]  # fmt: skip
"""MobileNetV2's (its table 2: expansion, channels, blocks, stride), the second stage without its stride."""
_MENDED = ", ranges from data, LSQ's optimizer"
"""What rows of `_mended` are called."""
_RANGES = {"trainer.callbacks+": "RangeInitialization"}
_FIXED = {"model.init_args.activation_quantizer": "n2uq_fixed"}


def cifar10(epochs: int = 10, float_epochs: int = 30) -> Study:
    """ResNet-20 on the 50,000 training images: float, then every method from that float network.

    Rows of 2 bits that are trained for twice as long say whether the schedule is what holds them back.
    """
    first = ["float", "n2uq_w2a2", "lsq_w2a2", "n2uq_w4a4", "lsq_w4a4"]
    ours = {f"n2uq_w{bits}a{bits}{_MENDED}": _mended(bits) for bits in (2, 4)}
    ours[f"n2uq_w2a2{_MENDED}, fixed thresholds"] = _mended(2) | _FIXED
    ranges = {f"n2uq_w{bits}a{bits}, ranges from data": _RANGES for bits in (2, 4)}
    longer = [f"{method}_w2a2, {2 * epochs} epochs" for method in ("n2uq", "lsq")]
    others = ["n2uq_fixed_w2a2", "pact_w2a2", "lsq_plus_w2a2"]
    rest = ["n2uq_w3a3", "lsq_w3a3", "dorefa_w2a2", "apot_w2a2"]  # APoT takes twice the time
    order = [(row, 0) for row in [*first, *ours, *others, longer[0], *ranges, *rest, longer[1]]]
    order += [(row, seed) for seed in (1, 2) for row in first]
    # All 50,000 images are trained on; the test images, in place of a validation split, choose nothing.
    everything = (("data.init_args.val_fraction", "0"),)
    runs = tuple(
        _changed(
            row,
            seed,
            _faster(row) | (ours | ranges).get(row, {}),
            2 * epochs if row in longer else epochs,
            float_epochs,
        )
        for row, seed in order
    )
    return Study("cifar10", runs, everything)


def cifar10_ranks(ranks: int = 4, epochs: int = 4, share: float = 0.3) -> Study:
    """The float ResNet-20 on several ranks whose gradients travel in 32, 4, 2 and 1 bits, and in rounds.

    The ranks share a batch of 128. The schedule is one that two cores end in minutes, a step of all methods
    sees the same images.
    """
    strategies = {
        "ddp": "ddp",
        "4 bits": "nuqsgd",
        "4 bits, rotated": "nuqsgd_rotated",
        "2 bits, rotated": "nuqsgd_rotated_2bit",
        "1 bit, rotated": "nuqsgd_rotated_1bit",
        "rounds of 10 steps, 4 bits": "nuqsgd_local",
        "powersgd": "ddp_powersgd",
    }
    settings = {f"model.init_args.{name}": value for name, value in FLOAT.settings.items()}
    settings |= {"model.init_args.warmup_steps": "58", "data.init_args.batch_size": str(128 // ranks)}
    settings |= {"trainer.devices": str(ranks), "data.init_args.train_fraction": str(share)}
    options = (("data.init_args.val_fraction", "0"), ("trainer.callbacks+", "CommunicationMonitor"))

    def run(row: str, seed: int) -> Run:
        chosen = settings | {"trainer.strategy": strategies[row]}
        return Run(row, seed, epochs, tuple(sorted(chosen.items())), FLOAT.source, config="float")

    runs = tuple(run(row, seed) for seed in (0, 1) for row in strategies)
    return Study("cifar10_ranks", runs, options, folder="cifar10")


def cifar10_codecs(ranks: int = 4, epochs: int = 4, quantized_epochs: int = 3, share: float = 0.3) -> Study:
    """What codecs and their bits do to accuracy: float ResNet-20, then W2A2 from it, on simulated ranks.

    As in `cifar10_ranks` the ranks share a batch of 128. They are simulated in one process, whose exchange is
    that of real ranks bit for bit, so that a row takes one core.
    """
    codecs = {"ddp": {"strategy": "ddp"}}
    for method in ("nuqsgd", "qsgd", "qsgd_inf"):
        for bits in (4, 3, 2):
            codecs[f"{method}, {bits} bits"] = {"strategy": method, "settings": json.dumps({"bits": bits})}
    rotated = {"4 bits": "", "2 bits": "_2bit", "1 bit": "_1bit"}
    codecs |= {f"rotated, {bits}": {"strategy": f"nuqsgd_rotated{name}"} for bits, name in rotated.items()}
    few = {"data.init_args.batch_size": str(128 // ranks), "data.init_args.train_fraction": str(share)}

    def run(network: str, codec: str, seed: int) -> Run:
        base = _run(network, seed, quantized_epochs, epochs)
        settings = dict(base.settings) | few | {"trainer.callbacks+": "SimulatedRanks"}
        if network == "float":
            settings["model.init_args.warmup_steps"] = "58"
        options = {"ranks": str(ranks), **codecs[codec]}
        settings |= {f"trainer.callbacks.{name}": value for name, value in options.items()}
        kept = tuple(sorted(settings.items()))  # a callback comes before its arguments
        start = base.start and "float, ddp"
        return Run(f"{network}, {codec}", seed, base.epochs, kept, base.source, start, network)

    runs = tuple(
        run(net, codec, seed) for seed in (0, 1) for net in ("float", "n2uq_w2a2") for codec in codecs
    )
    return Study("cifar10_codecs", runs, (("data.init_args.val_fraction", "0"),), folder="cifar10")


def cifar10_ablation(epochs: int = 3, float_epochs: int = 6, share: float = 0.3) -> Study:
    """What N2UQ's recipe owes its parts, on a schedule of minutes: each row changes one thing.

    The rows' names are those of the table; all but `float` start from the float network of their seed. An
    empty value leaves a recipe's setting out.
    """
    model = "model.init_args."
    of_lsq = _optimizer_of_lsq(4)
    of_n2uq = {f"{model}{name}": value for name, value in _N2UQ.settings.items()}
    multiplier = f"{model}quantizer_lr_multiplier"
    through = {f"{model}weight_gradient": "straight_through"}
    callback = "trainer.callbacks+"
    rows: dict[str, dict[str, str]] = {
        "float": {f"{model}warmup_steps": "58"},
        "n2uq_w4a4": {},
        "lsq_w4a4": {},
        "n2uq_w4a4, LSQ's optimizer": of_lsq,
        "n2uq_w4a4, LSQ's optimizer, straight-through": of_lsq | through,
        "n2uq_w4a4, straight-through": through,
        "n2uq_w4a4, a teacher": {f"{model}teacher": "{start}"},
        "n2uq_w4a4, four times the lr": {f"{model}lr": "5e-3"},
        "lsq_w4a4, N2UQ's optimizer": of_n2uq | {f"{model}momentum": "", multiplier: "0.1"},
        "n2uq_w4a4, ranges from data": _RANGES,
        "lsq_w4a4, ten times the lr": {f"{model}lr": "0.1"},
        "n2uq_w4a4, ranges from data, weights of least error": _RANGES
        | {f"{model}weight_quantizer": "least_error"},
        f"n2uq_w4a4{_MENDED}": _mended(4),
        "n2uq_w2a2": {},
        "n2uq_w2a2, ranges from data": _RANGES,
        "lsq_w2a2": {},
        "lsq_w2a2, N2UQ's optimizer": of_n2uq | {f"{model}momentum": "", multiplier: "0.1"},
        "lsq_w2a2, ten times the lr": {f"{model}lr": "0.1"},
        "n2uq_w2a2, LSQ's optimizer": _optimizer_of_lsq(2),
        f"n2uq_w2a2{_MENDED}": _mended(2),
        f"n2uq_w2a2{_MENDED}, fixed thresholds": _mended(2) | _FIXED,
        f"n2uq_w4a4{_MENDED}, fixed thresholds": _mended(4) | _FIXED,
        "n2uq_w4a4, quantizers at lr": {multiplier: "1"},
        "n2uq_w4a4, weights of least error": {f"{model}weight_quantizer": "least_error"},
        "n2uq_w4a4, fixed thresholds": _FIXED,
        "n2uq_w4a4, LSQ's weights": {f"{model}weight_quantizer": "lsq"},
        "n2uq_w4a4, LSQ's activations": {f"{model}activation_quantizer": "lsq"},
        "n2uq_w4a4, norms re-estimated": {callback: "BatchNormReestimation"},
        "n2uq_w4a4, oscillation frozen": {
            callback: "OscillationControl",
            "trainer.callbacks.momentum": "0.005",
        },
        "n2uq_w4a4, quantizers at lr/100": {multiplier: "0.01"},
    }

    runs = tuple(_changed(row, 0, changes, epochs, float_epochs) for row, changes in rows.items())
    return Study("cifar10_ablation", runs, _few_images(share), folder="cifar10")


def cifar10_oscillation(epochs: int = 4, float_epochs: int = 15, share: float = 0.5) -> Study:
    """MobileNetV2, whose depthwise weights oscillate most, at 4 bits: what the remedies bring.

    The network is torchvision's at half the width and with one stride less, so that maps of 32 x 32 pixels
    end at 2 x 2 (at 1 x 1 it learns little). Every quantized row but those whose norms are re-estimated
    counts oscillations, also where nothing is done about them.
    """
    shape = {"width_mult": 0.5, "inverted_residual_setting": _STAGES_OF_SMALL_IMAGES}
    backbone = {
        "model.init_args.backbone": "torchvision/mobilenet_v2",
        "model.init_args.backbone_args": json.dumps({"model_args": shape}),
        "model.init_args.memory_format": "channels_last",
    }
    callbacks = "trainer.callbacks"
    counted = {f"{callbacks}+": "OscillationControl", f"{callbacks}.momentum": "0.005"}
    frozen = counted | {f"{callbacks}.freeze_above": "0.1"}
    counted |= {f"{callbacks}.freeze_above": "null"}
    rows: dict[str, dict[str, str]] = {
        "float": {"model.init_args.warmup_steps": "195"},
        "n2uq_w4a4": counted,
        "n2uq_w4a4, norms re-estimated": {f"{callbacks}+": "BatchNormReestimation"},
        "n2uq_w4a4, frozen": frozen,
        "n2uq_w4a4, dampened": counted | {f"{callbacks}.dampening": "0.01"},
        "lsq_w4a4": counted,
        "lsq_w4a4, norms re-estimated": {f"{callbacks}+": "BatchNormReestimation"},
        "lsq_w4a4, frozen": frozen,
        "lsq_w4a4, dampened": counted | {f"{callbacks}.dampening": "0.01"},
    }
    runs = tuple(
        _changed(row, seed, backbone | changes, epochs, float_epochs)
        for seed in (0, 1)
        for row, changes in rows.items()
    )
    return Study("cifar10_oscillation", runs, _few_images(share), folder="cifar10")


def _faster(row: str) -> dict[str, str]:
    """The order of maps in memory that takes an eighth less time; only the order of sums differs."""
    return {} if row == "float" else {"model.init_args.memory_format": "channels_last"}


def _mended(bits: int) -> dict[str, str]:
    """N2UQ as the ablation leaves it: ranges from the first batch, and a rate at which thresholds move."""
    return _optimizer_of_lsq(bits) | _RANGES


def _optimizer_of_lsq(bits: int) -> dict[str, str]:
    settings = dict(_LSQ.settings) | {"weight_decay": _LSQ_DECAY[bits]}
    return {f"model.init_args.{name}": value for name, value in settings.items()}


def _few_images(share: float) -> tuple[tuple[str, str], ...]:
    """Options of studies in minutes: a share of the training images, and none of them for validation."""
    return (("data.init_args.val_fraction", "0"), ("data.init_args.train_fraction", str(share)))


def _changed(row: str, seed: int, changes: Mapping[str, str], epochs: int, float_epochs: int) -> Run:
    """A row `BASE, what is changed`: that of `BASE` with other settings; an empty value leaves one out."""
    base = _run(row.split(",")[0], seed, epochs, float_epochs)
    settings = dict(base.settings) | changes
    kept = tuple(sorted((name, value) for name, value in settings.items() if value != ""))
    other = {"LSQ's optimizer": _LSQ, "N2UQ's optimizer": _N2UQ}
    source = next((recipe.source for name, recipe in other.items() if name in row), base.source)
    return Run(row, seed, base.epochs, kept, source, base.start, base.row)


_ALL = (cifar10, cifar10_ranks, cifar10_codecs, cifar10_ablation, cifar10_oscillation)
STUDIES = {study.__name__: study for study in _ALL}


def runs_by_row(study: Study) -> Iterator[tuple[str, list[Run]]]:
    """Rows of the table in the order of their first run, each with the runs of all seeds."""
    rows: dict[str, list[Run]] = {}
    for run in study.runs:
        rows.setdefault(run.row, []).append(run)
    yield from rows.items()
