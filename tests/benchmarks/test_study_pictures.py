"""The pictures of studies: what is drawn, from which rows, and where."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import pictures, plan, results


def _figures(accuracy: float, sent: float | None = None, config: str = "float") -> dict[str, Any]:
    return {
        "test_acc": accuracy,
        "config": config,
        "sent_bytes": sent,
        "epochs": 1,
        "start": None,
        "curves": {"val/acc": [accuracy]},
    }


def test_points_of_the_pictures_are_those_of_the_rows(tmp_path: Path) -> None:
    bits = pictures.by_bits(
        {
            "float": [_figures(0.9)],
            "lsq_w4a4": [_figures(0.8)],
            "n2uq_w2a2, ranges from data": [_figures(0.7)],
            "lsq_w2a2": [_figures(0.5), _figures(0.7)],
        }
    )
    assert bits.keys() == {"lsq", "n2uq, ranges from data"}
    assert bits["lsq"] == [(2.0, pytest.approx(60.0), pytest.approx(10.0)), (4.0, pytest.approx(80.0), 0.0)]
    sent = pictures.by_bytes(
        {
            "float, ddp": [_figures(0.9, 4e6)],
            "float, qsgd, 4 bits": [_figures(0.8, 1e6)],
            "float, qsgd, 2 bits": [_figures(0.7, 5e5)],
            "n2uq_w2a2, rotated, 1 bit": [_figures(0.6, 3e5, "n2uq_w2a2")],
            "4 bits, rotated": [_figures(0.6, 3e5)],
            "n2uq_w2a2": [_figures(0.6)],
        }
    )
    assert [(name, list(points)) for name, points in sent.items()] == [
        ("float", ["ddp", "qsgd"]),
        ("n2uq_w2a2", ["rotated"]),
    ]
    assert [place for place, _, _ in sent["float"]["qsgd"]] == [0.5, 1.0]


def test_pictures_are_drawn_where_rows_have_what_they_show(tmp_path: Path) -> None:
    study = plan.cifar10_codecs(epochs=1, quantized_epochs=1)
    place = tmp_path / "run"
    place.mkdir()
    (place / "metrics.csv").write_text("epoch,val/acc,comm/sent_bytes\n0,0.5,1e6\n")
    for entry in study.runs[:14]:
        results.save(tmp_path, study, entry, results.collect(entry, study, place, 1.0))
    made = pictures.draw_all(study, tmp_path, tmp_path)
    assert [path.name for path in made] == ["study_cifar10_codecs.svg", "study_cifar10_codecs_bytes.svg"]
    assert all("qsgd_inf" in path.read_text() for path in made)


def test_accuracy_by_bits_is_drawn_beside_that_of_float(tmp_path: Path) -> None:
    study = plan.cifar10_ablation(epochs=1, float_epochs=1)
    place = tmp_path / "run"
    place.mkdir()
    (place / "metrics.csv").write_text("epoch,val/acc\n0,0.5\n")
    for entry in study.runs:
        results.save(tmp_path, study, entry, results.collect(entry, study, place, 1.0))
    _, bits = pictures.draw_all(study, tmp_path, tmp_path)
    assert bits.name == "study_cifar10_ablation_bits.svg"
    assert bits.read_text().count("<!-- float -->") == 1


def test_curves_stand_behind_those_of_the_row_they_start_from() -> None:
    curve = {"epochs": 2, "curves": {"val/acc": [0.5, 0.6]}}
    first = _figures(0.9) | curve
    rows = {
        "float": [first],
        "lsq_w4a4": [_figures(0.7) | {"start": "float"}, _figures(0.9) | {"start": "float"}],
    }
    found = pictures.by_epoch(rows)
    assert found["float"] == [(1, pytest.approx(50.0)), (2, pytest.approx(60.0))]
    assert found["lsq_w4a4"] == [(3, pytest.approx(80.0))]
    assert pictures.by_epoch({"lsq_w4a4": rows["lsq_w4a4"]})["lsq_w4a4"][0][0] == 1


def test_curves_have_a_panel_per_bit_width_and_a_line_of_its_own_per_row(tmp_path: Path) -> None:
    rows = ["n2uq_w4a4", "float", "lsq_w2a2, ranges from data", "lsq_w4a4"]
    assert list(pictures.by_width(rows).items()) == [
        ("float", ["float"]),
        ("2 bits", ["lsq_w2a2, ranges from data"]),
        ("4 bits", ["n2uq_w4a4", "lsq_w4a4"]),
    ]
    assert pictures.by_width(["ddp", "4 bits"]) == {"float": ["ddp", "4 bits"]}
    study = plan.cifar10(epochs=1, float_epochs=1)
    place = tmp_path / "run"
    place.mkdir()
    (place / "metrics.csv").write_text("epoch,val/acc\n0,0.5\n1,0.6\n")
    rows = [entry for entry in study.runs if entry.seed == 0]
    for entry in rows:
        figures = results.collect(replace(entry, epochs=2), study, place, 1.0)
        identity = entry.identity(study.configs)
        results.save(tmp_path, study, entry, figures | {"epochs": entry.epochs, "identity": identity})
    curves = pictures.draw_all(study, tmp_path, tmp_path)[0].read_text()
    assert [f"<!-- {title} -->" in curves for title in ("2 bits", "3 bits", "4 bits")] == [True] * 3
    legend = re.findall(r'<g id="legend_1">.*?(?=<g id="axes_)', curves, re.S)[0]
    styles = re.findall(r'style="(fill: none; stroke: #[^"]*|fill: none; stroke-dash[^"]*)"', legend)
    assert len(rows) > 10
    assert len(set(styles)) == len(styles) == len(rows)
