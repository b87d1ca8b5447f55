"""The comparison of mixed with uniform bits: its runs, and the table in the docs."""

import json

import pytest

from benchmarks import mixed_bits


def figures(seed, mixed, uniform):
    return {"data": "digits", "bits": 3, "seed": seed, "float": 99.0, "mixed": mixed, "uniform": uniform}


def test_the_table_has_the_mean_difference_with_its_error():
    runs = [figures(0, 98.0, 97.0), figures(1, 99.0, 96.0)]
    assert mixed_bits.table(runs).splitlines()[2] == (
        "| digits, 3 | 2 | 98.50 | 96.50 | +2.00 +- 1.00 | 99.00 |"
    )
    assert mixed_bits.table(runs[:1]).splitlines()[2].endswith(" | +1.00 | 99.00 |")


def test_the_docs_table_is_of_the_stored_figures():
    stored = json.loads(mixed_bits.OUTPUT.read_text())
    assert mixed_bits.table(stored) in (mixed_bits.ROOT / "docs/bit_allocation.md").read_text()
    assert all(run["bitops"]["mixed"] <= run["bitops"]["uniform"] for run in stored)


def test_runs_of_another_length_are_trained_anew_and_replace_the_figures(tmp_path, monkeypatch):
    places = []

    def run(seed, options):
        places.append(mixed_bits.place_of(seed, options))
        return figures(seed, 98.0, 97.0) | {
            "float_epochs": 40,
            "epochs": options.epochs,
            "train_fraction": 1.0,
        }

    monkeypatch.setattr(mixed_bits, "run", run)
    output = tmp_path / "figures.json"
    for epochs in ("40", "40", "2"):
        mixed_bits.main(["digits", "--seeds", "0", "1", "--epochs", epochs, "--output", str(output)])
    assert len(places) == len(set(places)) == 4
    assert [(old["seed"], old["epochs"]) for old in json.loads(output.read_text())] == [(0, 2), (1, 2)]


def test_cifar10_needs_its_images(capsys):
    with pytest.raises(SystemExit):
        mixed_bits.main(["cifar10"])
    assert "root: got none, needed for cifar10" in capsys.readouterr().err


@pytest.mark.slow
def test_a_seed_is_trained_by_the_commands_and_kept(tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ["digits", "--seeds", "0", "--float_epochs", "1", "--epochs", "1"]
    arguments += ["--folder", str(tmp_path / "runs"), "--output", str(output)]
    mixed_bits.main(arguments)
    (kept,) = json.loads(output.read_text())
    assert kept["bitops"]["mixed"] <= kept["bitops"]["uniform"]
    assert len(kept["widths"]) > 1
    assert 0 < kept["mixed"] < 100
    assert capsys.readouterr().out.endswith(mixed_bits.table([kept]) + "\n")

    before = output.read_text()
    mixed_bits.main(arguments)
    assert output.read_text() == before
