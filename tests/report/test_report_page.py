import json
import math
import re
import sys

import pytest
from run_folders import write_run

from lightning_n2uq.report import main, write_report
from lightning_n2uq.report.figure import plain
from lightning_n2uq.report.layer_plots import layer_plots
from lightning_n2uq.report.layer_record import ActivationRecord
from lightning_n2uq.report.plot_data import staircase_points, surrogate_points
from lightning_n2uq.report.run_data import Series, read_runs, runs_below, unique_names
from lightning_n2uq.utils.nested import flatten

pytest.importorskip("plotly", reason="plotly (extra `report`) is not installed: the page embeds its script")


def page(tmp_path, *folders):
    return write_report(folders, tmp_path / "page.html").read_text()


def data_of(text):
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL).group(1)
    return json.loads(block)["figures"]


def test_one_run_has_every_section_and_every_plot_has_data(tmp_path):
    text = page(tmp_path, write_run(tmp_path / "a", traffic=True))
    sections = re.findall(r'<section id="(\w+)"', text)
    assert sections == ["runs", "curves", "layers", "entropy", "confusion", "traffic", "config"]
    figures = data_of(text)
    keys = re.findall(r'data-figure="([^"]+)"', text)
    assert sorted(keys) == sorted(figures)
    assert len(set(keys)) == len(keys)
    for key, figure in figures.items():
        for trace in figure["data"]:
            values = trace.get("z") or trace["y"]
            assert any(v is not None for v in values), key


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = page(tmp_path, write_run(tmp_path / "a"))
    own = text[: text.index("plotly.js v")] + text[text.rindex("</script>") - 4000 :]
    assert not re.search(r'(src|href)="(?!#|data:)', own)
    assert "url(" not in own
    assert "@@" not in own


def test_names_of_a_run_cannot_break_the_page(tmp_path):
    folder = write_run(tmp_path / "<b>&x", layers=("</script><i>",))
    text = page(tmp_path, folder)
    assert "<b>&x" not in text
    assert "</script><i>" not in text
    assert any("</script><i>" in key for key in data_of(text))


HOSTILE = "\"'></option></pre><script>alert(1)</script><img src=x onerror=alert(1)>"


def leaves(value, path=()):
    """Yields the paths of all plain values of parsed JSON, dictionaries' keys included."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key), True
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value[:1]):
            yield from leaves(part, (*path, i))
    else:
        yield path, False


def with_hostile(value, path, as_key):
    copy = json.loads(json.dumps(value))
    place = copy
    for step in path[:-1]:
        place = place[step]
    if as_key:
        place[HOSTILE] = place.pop(path[-1])
    else:
        place[path[-1]] = HOSTILE
    return copy


def hostile_runs(tmp_path):
    """Yields run folders in which one value each, of every field of every file, is a script."""
    for name in ("quantization.jsonl", "confusion.json"):
        text = (write_run(tmp_path / "model" / name) / name).read_text()
        first, *rest = text.splitlines() if name.endswith("jsonl") else [text]
        for i, (path, as_key) in enumerate(leaves(json.loads(first))):
            folder = write_run(tmp_path / f"{name}-{i}")
            changed = json.dumps(with_hostile(json.loads(first), path, as_key))
            (folder / name).write_text("\n".join([changed, *rest]))
            yield folder
    for name, old in {"metrics.csv": "val/acc", "config.yaml": "lr"}.items():
        folder = write_run(tmp_path / f"in-{name}")
        file = folder / name
        file.write_text(file.read_text().replace(old, HOSTILE.replace('"', "")))
        yield folder


@pytest.mark.integration
def test_no_field_of_any_file_can_put_html_into_the_page(tmp_path):
    pages = 0
    for folder in hostile_runs(tmp_path):
        try:
            text = page(tmp_path, folder)
        except ValueError:  # a number that is none: one line, no page
            continue
        pages += 1
        assert "<script>alert" not in text, folder
        assert "<img src=x" not in text, folder
    assert pages > 20  # most fields are only shown


def test_bits_that_are_html_are_shown_as_text(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = (folder / "quantization.jsonl").read_text().replace('"bits": 2', '"bits": "<script>x</script>"')
    (folder / "quantization.jsonl").write_text(lines)
    text = page(tmp_path, folder)
    assert "&lt;script&gt;x&lt;/script&gt;/&lt;script&gt;" in text
    assert "<script>x" not in text


def test_two_runs_stand_side_by_side_and_their_configs_are_compared(tmp_path):
    first = write_run(tmp_path / "a" / "run", lr=0.002)
    second = write_run(tmp_path / "b" / "run", seed=1, lr=0.001)
    text = page(tmp_path, first, second)
    names = {trace["name"] for trace in data_of(text)["curve-val/acc"]["data"]}
    assert names == {"a/run", "b/run"}
    assert "model.init_args.lr" in text
    assert "model.init_args.bits</th>" not in text
    assert len(re.findall(r'data-figure="staircase-\d-layer1.0.conv1"', text)) == 2


def test_a_dead_level_is_marked_in_words(tmp_path):
    text = page(tmp_path, write_run(tmp_path / "a"))
    assert text.count('<strong class="alarm">1 (look)</strong>') == 1
    assert "1 dead levels" in text


def test_sections_without_data_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    for name in ("quantization.jsonl", "confusion.json", "config.yaml"):
        (folder / name).unlink()
    text = page(tmp_path, folder)
    assert 'id="traffic"' not in text
    assert 'id="confusion"' not in text
    assert "add the callback <code>QuantizationMonitor</code>" in text
    assert "kept no config.yaml" in text


def test_runs_with_different_layers_share_a_page(tmp_path):
    runs = [write_run(tmp_path / "a", layers=("x",)), write_run(tmp_path / "b", layers=("y",))]
    text = page(tmp_path, *runs)
    assert re.findall(r"<option>(\w+)</option>", text) == ["x", "y"]
    assert [figure.layer for figure in layer_plots(read_runs(runs), "x")] == ["x"] * 4


def test_staircase_and_surrogate_corners():
    record = ActivationRecord(
        1, [1, 1], 0, 0, -1, 3, [1], start=0, widths=[2.0], thresholds=[1.0], scale_out=0.5
    )
    assert staircase_points(record) == ([-1, 1.0, 1.0, 3], [0.0, 0.0, 1.0, 1.0])
    assert surrogate_points(record) == ([-1, 0, 2.0, 3], [0.0, 0.0, 1.0, 1.0])


def test_main_writes_into_the_run_and_says_where(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    assert main([str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert str(folder / "report.html") in capsys.readouterr().out


def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def broken(tmp_path):
    folder = write_run(tmp_path / "broken")
    (folder / "quantization.jsonl").write_text('{"step"\n{"step": 1, "layers": []}\n')
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: tmp / "none", "run_dir: no such folder '.*none'"),
        (empty, "run_dir: '.*empty' holds no run, expected metrics.csv"),
        (broken, "run_dir: cannot read the files of '.*broken'"),
    ],
)
def test_a_wrong_folder_gives_one_clear_line(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as error:
        write_report([make(tmp_path)])
    assert "\n" not in str(error.value)


def test_without_plotly_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ValueError, match="plotly is not installed, install it with pip install"):
        write_report([write_run(tmp_path / "a")])


def test_a_last_line_cut_short_is_left_out_and_repeated_steps_take_the_later(tmp_path):
    folder = write_run(tmp_path / "a")
    path = folder / "quantization.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 99, "epoch": 7, "layers": []}) + '\n{"step": 1')
    (run,) = read_runs([folder])
    assert [(s.step, s.epoch) for s in run.snapshots] == [(49, 0), (99, 7)]


def test_small_helpers(tmp_path):
    series = Series(list(range(10001)), [float(i) for i in range(10001)])
    assert len(series.thinned(1000).steps) <= 1001
    assert series.thinned(1000).steps[-1] == 10000
    assert plain([math.nan, 1.23456789, {"a": (1,)}]) == [None, 1.23457, {"a": [1]}]
    assert unique_names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert unique_names([tmp_path, tmp_path]) == [f"{tmp_path.name} (1)", f"{tmp_path.name} (2)"]
    assert flatten({"a": [{"b": 1}], "c": None}) == {"a.0.b": 1, "c": None}


RECORD = {
    "version": "1.2.3",
    "revision": "0123456789ab",
    "ranks": 2,
    "parameters": 275106,
    "packed_bytes": 88664,
    "float_bytes": 1100424,
    "layers": [
        {
            "weight_method": "n2uq",
            "weight_bits": 2,
            "activation_method": "n2uq",
            "activation_bits": 2,
            "count": 20,
        },
        {
            "weight_method": "float",
            "weight_bits": 32,
            "activation_method": "float",
            "activation_bits": 32,
            "count": 2,
        },
    ],
    "data": "ImageFolderDataModule",
    "root": "birds",
    "num_classes": 4,
    "class_names": ["crow", "gull", "owl", "wren"],
    "samples": {"train": 1437, "val": 180},
    "seconds": 3725.4,
}


def with_record(folder):
    (folder / "run.json").write_text(json.dumps(RECORD))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"{text}seed_everything: 7\n")
    rows = (folder / "metrics.csv").read_text().splitlines()
    names = [*rows[0].split(","), "test/acc", "test/loss"]
    ended = ["2", "100", *[""] * (len(names) - 4), "0.9722", "0.0995"]
    kept = [f"{row},," for row in rows[1:]]
    (folder / "metrics.csv").write_text("\n".join([",".join(names), *kept, ",".join(ended)]) + "\n")
    return folder


def facts(text):
    found = re.findall(r'<tr><th scope="row">([^<]*)</th>((?:<td>[^<]*</td>)+)</tr>', text)
    return {name: re.findall(r"<td>([^<]*)</td>", cells) for name, cells in found}


def test_the_headline_says_what_was_trained_and_how_well_it_does(tmp_path):
    found = facts(page(tmp_path, with_record(write_run(tmp_path / "a")), write_run(tmp_path / "b")))
    wanted = {
        "Method": "n2uq",
        "Bits": "W2A2: 20 layers; float: 2 layers",
        "Parameters": "275,106",
        "Size, packed": "88.7 kB, 8.1% of 1.1 MB in float32",
        "Data": "ImageFolderDataModule, birds, 1,437 train, 180 val",
        "Classes": "4: crow, gull, owl, wren",
        "Seed": "7",
        "Epochs": "2, 91 steps",
        "Training took": "1 h 2 min on 2 devices",
        "Version": "1.2.3 (0123456789ab)",
        "Best validation accuracy": "86.00% (epoch 2, step 90)",
        "Test accuracy": "97.22%",
        "Test loss": "0.0995",
    }
    assert {name: found[name][0] for name in wanted} == wanted
    assert found["Test accuracy"][1] == found["Parameters"][1] == "-"


def test_test_metrics_are_numbers_and_zero_counts_a_line_of_text(tmp_path):
    folder = with_record(write_run(tmp_path / "a"))
    csv = (
        (folder / "metrics.csv")
        .read_text()
        .replace("quant/mean_weight_entropy", "quant/total_widths_at_floor")
    )
    (folder / "metrics.csv").write_text(csv.replace("1.98", "0.0"))
    text = page(tmp_path, folder)
    assert not any("test/" in key or "widths_at_floor" in key for key in data_of(text))
    assert "Zero throughout: widths at the floor." in text


def test_classes_have_their_names_and_an_accuracy_each(tmp_path):
    text = page(tmp_path, with_record(write_run(tmp_path / "a")))
    assert facts(text)["owl"] == ["90.0% of 10"]
    assert facts(text)["wren"] == ["100.0% of 9"]
    assert "most often owl was taken for wren, once" in text
    assert data_of(text)["confusion-val-0"]["data"][0]["x"] == ["crow", "gull", "owl", "wren"]


def test_names_beside_the_matrices_come_first(tmp_path):
    folder = with_record(write_run(tmp_path / "a"))
    confusion = json.loads((folder / "confusion.json").read_text())
    (folder / "confusion.json").write_text(json.dumps({**confusion, "class_names": ["a", "b", "c", "d"]}))
    (run,) = read_runs([folder])
    assert run.class_names == ["a", "b", "c", "d"]
    assert list(run.confusion) == ["val"]


def test_axes_are_titled_in_words_and_shares_are_percentages(tmp_path):
    figures = data_of(page(tmp_path, write_run(tmp_path / "a", traffic=True)))
    accuracy = figures["curve-val/acc"]["layout"]["yaxis"]
    assert accuracy["title"]["text"] == "Validation accuracy"
    assert accuracy["tickformat"].endswith("%")
    titles = [
        axis["title"]["text"]
        for f in figures.values()
        for axis in f["layout"].values()
        if "title" in str(axis)
    ]
    assert titles
    assert not [title for title in titles if "/" in title or "_" in title]


def test_a_folder_stands_for_the_runs_below_it(tmp_path):
    kept = [write_run(tmp_path / "runs" / name / "1") for name in ("a", "b")]
    write_run(tmp_path / "runs" / "a" / "1-test")
    assert runs_below(tmp_path / "runs") == kept
    assert runs_below(kept[0]) == [kept[0]]
    assert {
        trace["name"] for trace in data_of(page(tmp_path, tmp_path / "runs"))["curve-val/acc"]["data"]
    } == {
        "a/1",
        "b/1",
    }


def test_more_runs_than_a_page_shows_are_refused(tmp_path):
    for i in range(41):
        (tmp_path / "runs" / str(i)).mkdir(parents=True)
        (tmp_path / "runs" / str(i) / "metrics.csv").write_text("step,epoch\n")
    with pytest.raises(ValueError, match=r"run_dir: got '.*runs' with 41 runs below it, allowed are 40"):
        write_report([tmp_path / "runs"], tmp_path / "page.html")
