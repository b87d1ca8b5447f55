"""Mistakes, help and lists are answered before torch is imported, which takes seconds."""

import json
import subprocess
import sys

import pytest
import yaml

from lightning_n2uq.cli import help_pages, main, sources
from lightning_n2uq.cli.checkpoint_path import checkpoint_file
from lightning_n2uq.cli.configs import packaged_configs
from lightning_n2uq.cli.quick_checks import check
from lightning_n2uq.datamodules import ImageFolderDataModule
from lightning_n2uq.modules import QuantizedClassifier

DIGITS = ["--config", "digits/n2uq_w2a2.yaml"]
SCRIPT = """
import contextlib, io, json, sys
from lightning_n2uq.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    answers.append([code, out.getvalue(), err.getvalue()])
heavy = sorted({"torch", "lightning", "jsonargparse", "numpy"} & set(sys.modules))
print(json.dumps([answers, heavy]))
"""
MISTAKES = {
    "confg: unknown key; did you mean 'config'? allowed are config, ": ["fit", "--confg", "x.yaml"],
    "model.lrr: got '3', unknown key of QuantizedClassifier; did you mean 'lr'?": [
        "fit", *DIGITS, "--model.lrr", "3",
    ],
    "data.batchsize: got '3', unknown key of DigitsDataModule; did you mean 'batch_size'?": [
        "fit", *DIGITS, "--data.init_args.batchsize=3",
    ],
    "trainer.max_epoch: unknown key; did you mean 'max_epochs'?": [
        "fit", *DIGITS, "--trainer.max_epoch", "3",
    ],
    "config: got 'digits/n2uq_w2a3', allowed are existing files": ["fit", "--config", "digits/n2uq_w2a3"],
    "ckpt_path: no such file 'nope.ckpt'": ["test", "--ckpt_path", "nope.ckpt"],
    "ckpt_path: no such file 'gone.ckpt'": ["validate", "--ckpt=gone.ckpt"],
    "help: got 'NonFinitGuard', did you mean 'NonFiniteGuard'?": ["fit", "--help", "NonFinitGuard"],
    "completion: got 'ksh', allowed are bash, zsh, fish": ["completion", "ksh"],
    "configs: got 'nothing', which no name contains": ["configs", "nothing"],
    "command: got 'ftt', allowed are fit, ": ["ftt"],
}  # fmt: skip
PAGES = [["fit", "--help"], ["predict", "--help"], ["fit", "--help", "QuantizedClassifier"], ["configs"]]


def test_neither_mistakes_nor_help_import_torch(tmp_path):
    commands = [*MISTAKES.values(), *PAGES]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    answers, heavy = json.loads(done.stdout)
    for message, (code, out, err) in zip(MISTAKES, answers, strict=False):
        assert (code, out) == (2, ""), (message, err)
        assert err.startswith(f"n2uq: error: {message}"), err
        assert err.count("\n") == 1
    for words, (code, out, err) in zip(PAGES, answers[len(MISTAKES) :], strict=True):
        assert (code, err) == (0, ""), words
        assert out
    assert heavy == []


def test_what_is_read_from_the_source_is_what_python_sees():
    import inspect

    from lightning.pytorch import Trainer

    for cls in (QuantizedClassifier, ImageFolderDataModule, Trainer):
        read = sources.trainer() if cls is Trainer else sources.our_classes()[cls.__name__]
        assert [parameter.name for parameter in read.parameters] == list(inspect.signature(cls).parameters)
    ours = sources.our_classes()
    assert {
        "NonFiniteGuard",
        "QuantizeModel",
        "DigitsDataModule",
        "NUQSGDStrategy",
        "SemanticSegmenter",
    } <= ours.keys()
    assert ours["CIFAR10DataModule"].parameters is None  # inherits its constructor
    assert {cls.part for cls in ours.values()} == set(sources.PARTS)


@pytest.mark.parametrize("name", [name for name in packaged_configs() if not name.startswith("sweeps/")])
def test_no_packaged_config_is_refused(name):
    check("fit", ["--config", name, "--data.num_workers", "0", "--trainer.callbacks+=TorchCompile"])


def test_keys_of_a_users_config_are_looked_at_too(tmp_path):
    config = yaml.safe_load(packaged_configs()["digits/n2uq_w2a2"].read_text())
    path = tmp_path / "mine.yaml"
    for section, key in (("model", "wieght_bits"), ("data", "shfit")):
        changed = json.loads(json.dumps(config))
        changed[section]["init_args"][key] = 3
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match=rf"{section}\.{key}: got 3, unknown key of .* did you mean"):
            check("fit", ["--config", str(path)])
    path.write_text(yaml.safe_dump({**config, "modle": {}}))
    with pytest.raises(ValueError, match="modle: unknown key; did you mean 'model'"):
        check("fit", ["-c", str(path)])


def test_of_several_configs_each_is_looked_at(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("trainer: {max_epochs: 1}\nmodel: {init_args: {lr: 0.1}}\n")
    for text, message in (
        ("trainer: {max_epoch: 2}", r"trainer\.max_epoch: unknown key; did you mean 'max_epochs'"),
        ("model: {init_args: {lrr: 1}}", r"model\.lrr: got 1, unknown key of QuantizedClassifier"),
        ("data: ImageFolderDataModule", r"data\.shift: got '2', unknown key of ImageFolderDataModule"),
    ):
        second.write_text(text)
        for order in ([first, second], [second, first]):
            more = [word for path in order for word in ("--config", str(path))]
            with pytest.raises(ValueError, match=message):
                check("fit", [*DIGITS, *more, "--data.init_args.shift", "2"])
    second.write_text("data: {class_path: ImageFolderDataModule, init_args: {root: photos}}")
    check("fit", [*DIGITS, "--config", str(second), "--data.init_args.val_fraction", "0.2"])


def test_what_is_not_known_for_certain_is_left_to_the_parser(tmp_path):
    own = ["--model", "mine.Net", "--model.anything", "1", "--data", "mine.Data", "--data.x", "2"]
    for words in (
        own,
        ["--model.help", "QuantizedClassifier"],
        ["--trainer.devices", "-1", "--print_config"],
    ):
        check("fit", words)
    for replaced in (
        ["--model", "mine.Net", "--model.lrr", "1"],
        ["--model", '{"class_path": "mine.Net"}', "--model.lrr", "1"],
        ["--data.shfit", "1", "--data", "ImageFolderDataModule", "--data.root", "photos"],
        ["--config", "https://example.org/model.yaml", "--model.lrr", "1"],
        ["--model.init_args", '{"lr": 1}', "--data.dict_kwargs", "{}", "--trainer.callbacks.every_n", "1"],
    ):
        check("fit", [*DIGITS, *replaced])
    (tmp_path / "list.yaml").write_text("- 1\n")
    check("fit", ["--config", str(tmp_path / "list.yaml")])


def test_a_folder_or_a_near_name_in_place_of_a_checkpoint_is_named(tmp_path):
    run = tmp_path / "runs" / "images" / "n2uq" / "20260101-000000"
    run.mkdir(parents=True)
    with pytest.raises(
        ValueError, match="which is a folder, allowed is a checkpoint file; and no checkpoint lies in"
    ):
        checkpoint_file(str(run), "ckpt_path")
    for name in ("last.ckpt", "best.ckpt"):
        (run / name).write_bytes(b"")
    assert checkpoint_file(str(run / "best.ckpt"), "ckpt_path") == str(run / "best.ckpt")
    (tmp_path / "shards.ckpt").mkdir()
    (tmp_path / "shards.ckpt" / "meta.pt").write_bytes(b"")
    assert checkpoint_file(str(tmp_path / "shards.ckpt"), "ckpt_path") == str(tmp_path / "shards.ckpt")
    for folder in (run, run.parent, tmp_path / "runs"):
        with pytest.raises(ValueError, match=r"did you mean .*20260101-000000/best\.ckpt\?"):
            checkpoint_file(str(folder), "ckpt_path")
    with pytest.raises(ValueError, match=r"no such file '.*bst\.ckpt'; there is .*best\.ckpt, .*last\.ckpt"):
        checkpoint_file(str(run / "bst.ckpt"), "ckpt_path")


def test_a_checkpoint_alone_needs_a_config(tmp_path, capsys):
    path = tmp_path / "converted.ckpt"
    path.write_bytes(b"x")
    reason = "has no config.yaml beside it that says which model and data it is of; give --config"
    assert main(["test", "--ckpt", str(path)]) == 2
    assert capsys.readouterr().err.rstrip().endswith(reason)
    assert main(["predict", "--ckpt", str(path)]) == 2
    assert f"{reason} (or --images, for which the checkpoint is enough)" in capsys.readouterr().err


def test_help_has_pages(capsys):
    assert main(["fit", "--help"]) == 0
    overview = capsys.readouterr().out
    assert len(overview.splitlines()) < 50
    for text in (
        "--config NAME|FILE",
        "--resume auto",
        "QuantizedClassifier",
        "ImageFolderDataModule",
        "--help all",
    ):
        assert text in overview
    assert main(["fit", "--help=ImageFolderDataModule"]) == 0
    page = capsys.readouterr().out
    assert "--data.val_fraction  float | null (default: None)\n      The share of a class" in page
    assert "--data.on_broken  error|skip (default: 'error')" in page
    assert main(["fit", "--help", "Trainer"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out
    assert main(["fit", "--help", "all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 500


def test_every_argument_of_every_class_is_explained():
    for name, cls in sources.our_classes().items():
        page = help_pages.page("fit", name)
        for parameter in cls.parameters or ():
            line = page.splitlines().index(
                next(row for row in page.splitlines() if row.startswith(f"  --{cls.part}.{parameter.name}  "))
            )
            assert page.splitlines()[line + 1].startswith("      "), (name, parameter.name)


def test_configs_are_a_table_that_says_what_each_is_for(capsys):
    assert main(["configs"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == list(packaged_configs())
    assert rows["images/n2uq_w4a4"].startswith("Your own images, one folder per class")
    assert max(map(len, rows.values())) <= 100
    assert main(["configs", "digits/", "w3"]) == 0
    assert capsys.readouterr().out.split()[0] == "digits/n2uq_w3a3"


def test_bash_completes_commands_configs_and_options(tmp_path):
    from lightning_n2uq.cli.completion import script

    (tmp_path / "complete.sh").write_text(script("bash"))

    def complete(*words):
        shell = f"source complete.sh; COMP_WORDS=(n2uq {' '.join(words)}); COMP_CWORD={len(words)}; "
        done = subprocess.run(
            ["bash", "-c", shell + "_n2uq; echo ${COMPREPLY[@]}"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.split()

    assert complete("pre") == ["predict"]
    assert complete("fit", "--config", "images/n2uq_w2") == [
        "images/n2uq_w2a2.yaml",
        "images/n2uq_w2a2_finetune.yaml",
    ]
    assert "--trainer.max_epochs" in complete("fit", "--trainer.m")
    assert complete("fit", "--help", "NonF") == ["NonFiniteGuard"]
    for shell in ("zsh", "fish"):
        assert "images/n2uq_w2a2.yaml" in script(shell)
