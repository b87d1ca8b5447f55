"""The monitor's pictures show what the report's plots show."""

import pytest

from lightning_n2uq.report.layer_record import ActivationRecord, LayerRecord, WeightRecord

pytest.importorskip("matplotlib", reason="extra `figures`")

from lightning_n2uq.callbacks._monitor import figures
from lightning_n2uq.report import layer_plots, plot_data, run_data

ACTIVATION = ActivationRecord(
    2, [10, 20, 30, 40], 0.1, 0.4, -1.0, 4.0, [1.0, 2.0, 3.0, 4.0], -0.5, 1.2, 0.9,
    [1.0, 1e-5, 2.0], [0.0, 0.5005, 1.501], 1,
)  # fmt: skip
CURVED = ActivationRecord(1, [3, 1], 0.0, 0.0, 0.0, 2.0, [2.0, 2.0], curve=[0.0, 0.5, 1.0])


def layer(activation):
    return LayerRecord("conv", WeightRecord(2, 100, [25] * 4, 0.5, None, 0.1), activation)


@pytest.mark.parametrize("activation", [ACTIVATION, CURVED], ids=["thresholds", "curve"])
def test_picture_and_plot_of_a_layer_have_the_same_points(tmp_path, activation):
    upper, lower = figures.staircase_figure("conv", activation).axes
    run = run_data.Run(tmp_path, "run", snapshots=[run_data.Snapshot(7, 0, {"conv": layer(activation)})])
    traces = {trace["name"]: trace for trace in layer_plots.layer_plots([run], "conv")[0].traces}
    lines = {line.get_label(): line.get_xydata().tolist() for line in upper.lines}
    for name in {"staircase", "surrogate"} & (lines.keys() | traces.keys()):
        assert lines[name] == [
            list(point) for point in zip(traces[name]["x"], traces[name]["y"], strict=True)
        ]
    assert ("surrogate" in lines) == bool(activation.widths)
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in lower.patches]
    inputs = traces["inputs"]
    assert bars == [pytest.approx(pair) for pair in zip(inputs["x"], inputs["y"], strict=True)]


def test_thresholds_lie_in_the_middle_of_segments_and_widths_have_a_floor():
    assert plot_data.knots(-0.5, [1.0, 1e-5, 2.0]) == pytest.approx([-0.5, 0.5, 0.501, 2.501])
    assert plot_data.thresholds(-0.5, [1.0, 1e-5, 2.0]) == pytest.approx([0.0, 0.5005, 1.501])


def test_usage_has_a_row_of_bars_per_layer_and_none_where_nothing_is_quantized():
    drawn = figures.usage_figure([layer(ACTIVATION), layer(None)]).axes
    assert [len(axes.patches) for axes in drawn] == [4, 4, 4, 0]
    assert [bar.get_height() for bar in drawn[1].patches] == [0.1, 0.2, 0.3, 0.4]


def test_colours_of_small_entropy_differences_stay_close():
    values = [[2.0, 1.9], [2.0, 1.95], [1.99, 2.0]]
    (mesh,) = figures.entropy_map(["a", "b"], [0, 50, 100], values).axes[0].collections
    assert mesh.get_clim() == (1.8, 2.0)
    assert mesh.get_array().tolist() == [[2.0, 2.0, 1.99], [1.9, 1.95, 2.0]]
    assert plot_data.entropy_range([0.5, 2.0]) == (0.5, 2.0)
    assert plot_data.entropy_range([0.0, 0.0]) == (0.0, 1e-3)
