"""Random configs and command lines: a run of one step, or one line and exit code 2."""

import contextlib
import copy
import io
import logging
import math
import os
import warnings
from pathlib import Path

import pytest
import yaml
from fuzz_bounds import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_n2uq.configs
from lightning_n2uq.cli import main

DIGITS = sorted(Path(next(iter(lightning_n2uq.configs.__path__)), "digits").glob("*.yaml"))
# One step on the CPU of a tiny network, in this process; what is given here wins over the config.
BOUND = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1",
    "--trainer.strategy", "auto", "--trainer.fast_dev_run", "1", "--trainer.logger", "false",
    "--wandb", "disabled",
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 3, 10**12, -(10**30), 1e308, -0.0, math.nan, math.inf, -math.inf,
    "", "x", "auto", "1", "nan", "ünï ☃", "a\0b", "a\nb", "{", "[1, ", "%s {0}", "x" * 5000, "none.ckpt",
    [], {}, [1, 2], [[[]]], ["x"], {"a": {"b": {}}}, {"class_path": "os.system"}, {"class_path": ""},
    {"class_path": "QuantizedClassifier"}, {"class_path": "EarlyStopping", "init_args": {"monitor": 3}},
    {"class_path": "ThresholdAnnealing", "init_args": {"x": 1}}, {"init_args": {}}, "os.system",
    "torch.nn.ReLU",
]  # fmt: skip
TEXTS = [
    b"\xff\xfe\x00", b"\t", b"\n- ", b": ", b"{", b"[", b"&a ", b"*a", b"!!python/name:os.system ", b"\0",
    b"\n---\n", b"%YAML 9\n", b"'", b"<<: *x\n", b"? ",
]  # fmt: skip
FLAGS = [
    "--model.lr", "--model.weight_bits", "--model.backbone_args", "--model.optimizer", "--data.batch_size",
    "--data.shift", "--trainer.max_epochs", "--trainer.precision", "--trainer.callbacks", "--ckpt_path",
    "--resume", "--test_after_fit", "--checkpoint.monitor", "--guard.floor", "--seed_everything", "--model",
    "--data", "--trainer", "--config", "-c", "--", "--modle.x", "--trainer.max_epochs+", "--data.init_args",
    "--model.init_from", "--model.teacher", "--lr_monitor.logging_interval", "--unknown", "-", "--model.",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run in a folder of its own; Lightning's log goes nowhere."""
    before, place = os.getcwd(), tmp_path_factory.mktemp("fuzz")
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    handlers = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [logging.NullHandler()]
    os.chdir(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.delenv("N2UQ_DEBUG", raising=False)
        yield place
    os.chdir(before)
    for logger, old in zip(loggers, handlers, strict=True):
        logger.handlers = old


def run(arguments):
    """Exit code and what was written to stderr; an exception here is a traceback for the user."""
    error = io.StringIO()
    with (
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(io.StringIO()),
        bounded(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        code = main(arguments)
    return code, error.getvalue()


def check(arguments):
    code, error = run(arguments)
    assert code in (0, 2), code
    assert "Traceback" not in error
    if code:
        lines = [line for line in error.splitlines() if line.startswith("n2uq: error: ")]
        assert len(lines) == 1, error
        assert len("n2uq: error: ") < len(lines[0]) <= 800
    return code


def every_key():
    """The config of the command with every key that it takes, its defaults filled in."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["fit", "--config", "digits/n2uq_w2a2", "--print_config"]) == 0
    return yaml.safe_load(text.getvalue())


def paths(tree, above=()):
    """Paths of all entries of nested mappings."""
    found = []
    for key, value in tree.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += paths(value, (*above, key))
    return found


def place(tree, path):
    """The mapping that holds the entry, made on the way where something else is there."""
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    return tree


def mutate(draw, tree, known):
    path = draw(st.sampled_from(known))
    kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename", "wrap"]))
    parent, key = place(tree, path), path[-1]
    if kind == "delete":
        parent.pop(key, None)
    elif kind == "rename":
        parent[draw(st.sampled_from(["", "x", key.upper(), f"{key}s", key[:-1], 3, None]))] = parent.pop(
            key, None
        )
    elif kind == "wrap":
        parent[key] = draw(
            st.sampled_from([[parent.get(key)], {key: parent.get(key)}, {"class_path": parent.get(key)}])
        )
    else:
        parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))


@st.composite
def cases(draw, known):
    """Bytes of a config and further arguments."""
    tree = yaml.safe_load(draw(st.sampled_from(DIGITS)).read_text())
    tree["model"]["init_args"]["backbone_args"] = {"width": 2}
    for _ in range(draw(st.integers(1, 3))):
        mutate(draw, tree, known)
    data = yaml.safe_dump(tree, allow_unicode=True).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["insert", "cut", "double", "random"]))
        if kind == "insert":
            data = data[:at] + draw(st.sampled_from(TEXTS)) + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "double":
            data += data[at:]
        else:
            data = draw(st.binary(max_size=60))
    flags = []
    if draw(st.integers(0, 2)) == 0:
        flags = [draw(st.sampled_from(FLAGS))]
        value = draw(st.sampled_from(VALUES))
        if draw(st.booleans()):
            flags.append(str(value) if draw(st.booleans()) else yaml.safe_dump(value).strip())
    return data, flags


@pytest.fixture(scope="module")
def known(folder):
    """Every key; kernels are compiled before, which a bound on the time of a run does not mean."""
    for precision in ("32", "bf16-mixed"):
        options = ["--model.backbone_args", "{width: 2}", "--trainer.precision", precision]
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            assert main(["fit", "--config", "digits/n2uq_w2a2", *options, *BOUND]) == 0
    return paths(every_key())


def fuzz(folder, known, examples):
    codes = []

    @settings(max_examples=examples)
    @given(cases(known))
    def attempt(case):
        data, flags = case
        (folder / "case.yaml").write_bytes(data)
        codes.append(check(["fit", "--config", "case.yaml", *flags, *BOUND]))

    attempt()
    return codes


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:.*")
def test_random_configs_end_in_a_step_or_in_one_line(folder, known):
    codes = fuzz(folder, known, 30)
    assert len(codes) >= 20
    assert {0, 2} == set(codes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_a_thousand_random_configs_end_in_a_step_or_in_one_line(folder, known):
    assert len(fuzz(folder, known, 1000)) >= 900


# What random search found, and what it must not try: values that would start processes.
FOUND = {
    "a long value": ({"lr_monitor": {"logging_interval": "x" * 5000}}, "lr_monitor.logging_interval"),
    "a list for a class of the parser's": ({"progress_bar": {"theme": [{"a": 1}]}}, "--debug shows where"),
    "keywords that a callback passes on": ({"progress_bar": {"console_kwargs": {"x": 1}}}, "--debug shows"),
    "no devices": ({"trainer": {"devices": 0}}, "devices"),
    "a negative number of devices": ({"trainer": {"devices": -3}}, "devices"),
    "no nodes": ({"trainer": {"num_nodes": 0}}, "num_nodes"),
}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_is_one_line(folder, case):
    change, word = FOUND[case]
    tree = yaml.safe_load((DIGITS[0].parent / "n2uq_w2a2.yaml").read_text())
    for key, values in change.items():
        tree[key] = {**tree.get(key, {}), **values}
    (folder / "case.yaml").write_text(yaml.safe_dump(tree))
    bound = [] if "trainer" in change else BOUND
    code, error = run(["fit", "--config", "case.yaml", *bound])
    assert code == 2
    assert error.count("n2uq: error: ") == 1
    assert word in error
    assert len(error.splitlines()[-1]) < 800
