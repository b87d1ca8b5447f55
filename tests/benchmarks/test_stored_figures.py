"""Tables have one source; nothing replaces tracked figures unless it is told to."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import callback_study, callback_tables, digits_table, signed_inputs
from benchmarks.netlab import accuracy
from benchmarks.netlab.table import render
from benchmarks.networks.catalog import NETWORKS
from benchmarks.networks.table import table
from benchmarks.study.__main__ import RESULTS
from benchmarks.study.plan import cifar10, cifar10_ablation, cifar10_oscillation, cifar10_ranks
from benchmarks.study.table import finished, markdown

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_the_digits_is_the_stored_one(capsys, monkeypatch):
    monkeypatch.setattr(digits_table, "run", lambda *_: pytest.fail("nothing is trained"))
    digits_table.main([])
    shown = capsys.readouterr().out
    assert "stored results of" in shown
    rows = re.findall(r"^\| `digits/.*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    assert [row for row in rows if row not in shown] == []


def test_a_run_added_keeps_its_machine_and_the_others(tmp_path, monkeypatch):
    kept = json.loads(digits_table.OUTPUT.read_text())
    path = tmp_path / "digits.json"
    path.write_text(json.dumps(kept))

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, _, name, config, seed):
            future = digits_table.concurrent.futures.Future()
            digest = digits_table._digest(config)
            values = {"test_acc": 0.5, "best_val_acc": 0.5, "last_val_acc": 0.5, "seconds": 1.0}
            future.set_result({"config": name, "seed": seed, "config_sha256": digest, **values})
            return future

    monkeypatch.setattr(digits_table, "workers", Pool)
    options = ["--output", str(path), "--configs", "float", "--seeds", "0", "99"]
    digits_table.main([*options, "--add"])
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == len(kept["runs"]) + 1
    assert [r["processor"] for r in runs if r["seed"] == 99]
    digits_table.main([*options, "--rerun"])
    runs = json.loads(path.read_text())["runs"]
    assert [r["test_acc"] for r in runs if r["config"] == "float" and r["seed"] in (0, 99)] == [0.5, 0.5]


@pytest.mark.parametrize("argv", [[], ["--quick"], ["codec"], ["--quick", "steps", "codec"]])
def test_tracked_figures_are_replaced_by_keep_alone(argv):
    chosen = bench.arguments(argv)
    assert chosen.output != bench.KEPT
    assert chosen.plots != bench.FIGURES
    assert "build" in chosen.output.relative_to(ROOT).parts
    assert bench.arguments(["codec", "--keep"]).output == bench.KEPT


@pytest.mark.parametrize("more", [["--quick"], ["--output", "x.json"], ["--plots", "x"]])
def test_keep_and_another_place_exclude_each_other(more, capsys):
    with pytest.raises(SystemExit):
        bench.arguments(["--keep", *more])
    assert "keep: got --keep with" in capsys.readouterr().err


def test_the_tables_of_the_callbacks_are_the_stored_ones():
    page = (ROOT / "docs" / "callbacks.md").read_text()
    runs = callback_tables.stored()
    for head, rows_of in callback_tables.TABLES.items():
        table = page.partition(f"\n{head}\n")[2].partition("\n\n")[0].splitlines()
        assert table[1:] == rows_of(runs), head
    assert {variant for data, variant in runs if data == "shipped"} == set(callback_study.SHIPPED)
    assert {variant for data, variant in runs if data != "shipped"} == (
        callback_study.VARIANTS.keys() - {callback_study.RANGES}  # in a file of their own
    )


def test_the_table_of_signed_inputs_is_the_stored_one():
    stored = json.loads((ROOT / "benchmarks/results/signed_inputs.json").read_text())
    text = (ROOT / "docs/any_model.md").read_text()
    assert {row["variant"] for row in stored["rows"]} == set(signed_inputs.VARIANTS)
    for row in stored["rows"]:
        assert f"| {row['variant']} | {signed_inputs._shown(row['accuracies'])} |" in text
    assert f"reaches {signed_inputs._shown(stored['float'])}" in text
    options = [f"--{key} {value}" for key, value in stored["options"].items() if key != "bits"]
    assert f"--bits {stored['options']['bits'][0]} {' '.join(options)}" in text


def test_the_table_of_networks_is_the_stored_one_and_has_all_of_the_catalog():
    stored = json.loads((ROOT / "benchmarks/results/networks.json").read_text())
    page = (ROOT / "docs/any_model.md").read_text()
    assert stored.keys() == set(NETWORKS)
    *rows, _, total = table({name: stored[name] for name in NETWORKS}).splitlines()
    assert "\n".join(rows) in page
    assert f"\n{total}\n" in page


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name
)
def test_stored_figures_are_strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{path.name} holds {constant}")

    json.loads(path.read_text(), parse_constant=refuse)


def test_the_spread_over_seeds_is_that_of_the_stored_runs():
    lines = (ROOT / "benchmarks/results/callbacks.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    found = [100 * run["accuracy"] for run in runs if run["variant"] == "`digits/n2uq_w2a2`"]
    mean, deviation = statistics.mean(found), statistics.stdev(found)
    said = (
        f"{len(found)} seeds of `n2uq_w2a2` lie between {min(found):.2f} and {max(found):.2f}, "
        f"with a mean of {mean:.2f}, a standard deviation of {deviation:.2f} and a standard error of "
        f"{deviation / len(found) ** 0.5:.2f}"
    )
    assert said in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("mbit", [100, 1000])
def test_the_tables_of_all_methods_on_slow_links_are_the_stored_ones(mbit):
    stored = json.loads((ROOT / "benchmarks/results/netlab_methods.json").read_text())
    rows = [row for row in stored if row["mbit"] == mbit]
    assert render(rows).split("\n", 2)[2] in (ROOT / "docs/communication.md").read_text()


def test_the_front_pages_table_of_slow_links_is_of_the_stored_figures():
    stored = json.loads((ROOT / "benchmarks/results/netlab_methods.json").read_text())
    rows = {row["method"]: row for row in stored if row["mbit"] == 100}
    seconds = {name: min(row["seconds"]) for name, row in rows.items()}
    page = (ROOT / "README.md").read_text()
    shown = page[page.index("| method | seconds per step |") :].split("\n\n")[0].splitlines()[2:]
    assert len(shown) > 5
    for line in shown:
        name = re.match(r"\| `(\w+)`", line)[1]
        ratios = " | ".join(f"{seconds[other] / seconds[name]:.2f}" for other in ("ddp", "ddp_fp16"))
        assert line.endswith(f" | {seconds[name]:.3f} | {ratios} | {rows[name]['bytes'] / 1e6:.2f} |")


def test_the_table_of_the_ranks_is_the_stored_one():
    stored = finished(cifar10_ranks(), RESULTS)
    text = (ROOT / "docs" / "results.md").read_text()
    text = text[text.index("### CIFAR-10 images, four ranks") :]
    cells = [row.strip("| ").split("|") for row in re.findall(r"^\| `.*\|$", text, re.MULTILINE)]
    shown = {cell[0].split("`")[1]: [value.strip() for value in cell[1:]] for cell in cells}
    assert len(shown) == len(stored) == 7
    base = 100 * stored["ddp"][0]["test_acc"]
    for runs in stored.values():
        (run,) = runs
        accuracy, against, megabytes = shown[run["settings"]["trainer.strategy"]]
        assert accuracy == f"{100 * run['test_acc']:.2f}"
        assert against == ("" if run["row"] == "ddp" else f"{100 * run['test_acc'] - base:+.2f}")
        if run["sent_bytes"]:
            assert megabytes.split(",")[0] == f"{run['sent_bytes'] / 1e6:.3f}"


def test_the_table_of_the_ablation_is_the_stored_one():
    stored = {row: 100 * runs[0]["test_acc"] for row, runs in finished(cifar10_ablation(), RESULTS).items()}
    text = (ROOT / "docs" / "results.md").read_text()
    text = text[text.index("### Why N2UQ falls behind") : text.index("benchmarks.study cifar10_ablation")]
    shown = {}
    for line in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        row, accuracy, against = (cell.strip() for cell in line.strip("|").split("|"))
        shown[row.replace("`", "")] = (accuracy, against)
    assert len(stored) == 30
    assert shown.keys() == stored.keys()
    for row, accuracy in stored.items():
        assert shown[row][0] == f"{accuracy:.2f}"
        if row == "float" or (row.startswith("n2uq") and "," not in row):
            assert shown[row][1] == ""
        else:
            base = stored["n2uq_w4a4" if "w4a4" in row else "n2uq_w2a2"]
            assert shown[row][1] == f"{accuracy - base:+.2f}"


@pytest.mark.parametrize(
    ("study", "rows"),
    [
        (cifar10(), {"float", "n2uq_w2a2", "lsq_w2a2", "n2uq_w4a4", "lsq_w4a4", "n2uq_fixed_w2a2"}),
        (cifar10_oscillation(), {"float", "n2uq_w4a4", "n2uq_w4a4, frozen", "n2uq_w4a4, dampened"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_tables_of_the_studies_are_the_stored_ones(study, rows):
    assert rows <= finished(study, RESULTS).keys()
    assert f"\n{markdown(study, RESULTS)}\n\n" in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize(("network", "file"), [("W2A2 (`n2uq`)", "w2a2"), ("float", "float")])
def test_rows_of_forty_epochs_with_compressed_gradients_are_the_stored_ones(network, file):
    runs = json.loads((RESULTS / f"netlab_accuracy_{file}.json").read_text())
    text = (ROOT / "docs" / "results.md").read_text()
    rows = re.findall(
        rf"^\| {re.escape(network)} \| 40 \| `(\w+)`.*\| 10 to 15 \| (.*) \| (.*) \|$", text, re.M
    )
    assert {row[0] for row in rows} == {run["method"] for run in runs}
    for method, by_seed, mean in rows:
        own = sorted((run for run in runs if run["method"] == method), key=lambda run: run["seed"])
        assert [run["seed"] for run in own] == list(range(10, 16))
        last = [run["curve"][-1][1] for run in own]
        assert by_seed == ", ".join(f"{value:.2f}" for value in last)
        assert mean == f"{statistics.mean(last):.2f}"


def test_the_table_of_accuracy_against_time_is_the_stored_one():
    runs = json.loads((RESULTS / "netlab_accuracy.json").read_text())
    table = accuracy.render(runs)
    assert len(table.splitlines()) == 2 + 16
    assert table in (ROOT / "docs" / "communication.md").read_text()
