import pytest

from lightning_n2uq.cli import main

CONFIG = """trainer:
  callbacks:
  - class_path: EarlyStopping
    init_args: {{monitor: val/acc}}
  - class_path: {}
    init_args:
      {}
"""


@pytest.mark.parametrize(
    ("name", "argument", "named"),
    [
        ("NonFiniteGuard", "loss: ignore", ["callbacks.loss", "got 'ignore'", "stop, skip, warn, off"]),
        ("lightning_n2uq.callbacks.NonFiniteGuard", "max_skips: many", ["max_skips", "'many'", "int"]),
        ("NonFiniteGuard", "max_skips: 0", ["max_skips", "got 0", "from 1"]),
        ("ModelCheckpoint", "save_top_k: x", ["callbacks.save_top_k", "'x'", "int"]),
        ("NonFiniteGuard", "los: stop", ["callbacks.los", "got 'stop'", "'loss'"]),
    ],
)
def test_a_wrong_value_inside_a_callback_is_named(name, argument, named, in_empty_folder, capsys):
    (in_empty_folder / "mine.yaml").write_text(CONFIG.format(name, argument))
    assert main(["fit", "--config", "digits/n2uq_w2a2", "--config", "mine.yaml"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [text for text in named if text not in line] == [], line
    assert "class path" not in line
