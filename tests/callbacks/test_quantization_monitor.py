import csv
import json
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tiny_training import TinyModule, loader, trainer
from torch import nn

from lightning_n2uq.callbacks import EntropyRegularizer, QuantizationMonitor
from lightning_n2uq.callbacks._common.activation_inputs import thin
from lightning_n2uq.callbacks._common.quantized_layers import quantized_layers
from lightning_n2uq.callbacks._monitor.layer_recorder import LayerRecorder
from lightning_n2uq.layers import QuantConv2d, QuantLinear, QuantSpec, integer
from lightning_n2uq.report import write_report
from lightning_n2uq.report.layer_record import entropy

NAMES = (
    "quant/0/threshold_1",
    "quant/2/threshold_3",
    "quant/0/weight_entropy",
    "quant/0/activation_entropy",
    "quant/2/weight_usage_3",
    "quant/0/activation_dead_levels",
    "quant/0/weight_clipped",
    "quant/0/activation_clipped_high",
    "quant/0/scale_in",
    "quant/0/scale_out",
    "quant/0/weight_scale",
    "quant/0/widths_at_floor",
    "quant/mean_weight_entropy",
)


def measured(module, x):
    layers = quantized_layers(module)
    return LayerRecorder(layers), {layer.name: x if i == 0 else x[:16] for i, layer in enumerate(layers)}


def test_a_collapsed_threshold_and_a_dead_level_are_seen():
    module = TinyModule()
    with torch.no_grad():
        quantizer = module.net[0].activation_quantizer
        quantizer.widths[1] = -0.5
        quantizer.widths[2] = 100.0
        module.net[0].weight[:] = 1.0
    x = torch.rand(1000)
    recorder, inputs = measured(module, x)
    metrics = recorder.measure(inputs)[0].metrics()
    assert metrics["quant/0/widths_at_floor"] == 1
    assert metrics["quant/0/activation_dead_levels"] == 1
    assert metrics["quant/0/activation_usage_3"] == 0
    assert metrics["quant/0/weight_dead_levels"] == 3
    assert metrics["quant/0/weight_entropy"] == 0
    assert metrics["quant/0/smallest_width"] == -0.5
    for k, threshold in enumerate(quantizer.thresholds().tolist()):
        assert metrics[f"quant/0/threshold_{k + 1}"] == pytest.approx(threshold, abs=1e-5)


def test_usage_entropy_and_clipping_are_those_of_the_codes():
    module = TinyModule()
    x = torch.randn(4096)
    recorder, inputs = measured(module, x)
    record = recorder.measure(inputs)[0]
    q = module.net[0].activation_quantizer
    counts = torch.bincount(q.codes(x).long(), minlength=4).tolist()
    assert record.activation.usage == counts
    assert record.metrics()["quant/0/activation_entropy"] == pytest.approx(entropy(counts))
    assert record.activation.clipped_low == pytest.approx(float((x <= 0).float().mean()), abs=1e-6)
    assert record.activation.clipped_high == pytest.approx(float((x >= 2).float().mean()), abs=1e-6)
    assert sum(record.activation.histogram) == 4096
    weight = module.net[0].weight
    codes = module.net[0].weight_quantizer.codes(weight)
    assert record.weight.usage == torch.bincount(codes.flatten().long(), minlength=4).tolist()


def test_weights_that_changed_level_are_counted():
    module = TinyModule()
    recorder, inputs = measured(module, torch.rand(10))
    assert "quant/0/weight_changed" not in recorder.measure(inputs)[0].metrics()
    assert recorder.measure(inputs)[0].metrics()["quant/0/weight_changed"] == 0
    with torch.no_grad():
        module.net[0].weight[:4].neg_()  # 4 of 16 rows; no two-bit level is its own negative
    assert recorder.measure(inputs)[0].metrics()["quant/0/weight_changed"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("lsq", "lsq_plus"), ("dorefa", "pact"), ("apot", "dorefa"), ("n2uq", "apot")],
)
def test_every_method_can_be_watched(weights, activations):
    module = TinyModule(spec=QuantSpec(3, 3, weights, activations))
    module.net(torch.randn(4, 8))
    recorder, inputs = measured(module, torch.randn(100))
    record = recorder.measure(inputs)[0]
    assert sum(record.weight.usage) == 128
    assert sum(record.activation.usage) == 100
    assert len(record.activation.curve) == 257
    assert json.loads(json.dumps(record.as_dict()))["name"] == "0"


def test_thinning_keeps_what_fits_and_bounds_what_does_not():
    x = torch.arange(1000.0).view(10, 100)
    assert torch.equal(thin(x, 1000), x.flatten())
    assert torch.equal(thin(x, 999), x.flatten()[::3])  # an odd step: 2 would meet even columns only
    assert torch.equal(thin(x, 100), x.flatten()[::11])
    assert thin(x, 1).tolist() == [0.0]


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_csv_and_files_hold_the_run(tmp_path):
    monitor = QuantizationMonitor(every_n_steps=3)
    runner = trainer(tmp_path, [monitor], logger=CSVLogger(tmp_path, "", ""))
    runner.fit(TinyModule(), loader(), loader())
    rows = read_csv(tmp_path / "metrics.csv")
    assert set(NAMES) <= rows[0].keys()
    steps = [int(row["step"]) for row in rows if row["quant/0/threshold_1"]]
    assert steps == [0, 2, 5, 7, 8, 11, 14, 15]
    lines = [json.loads(line) for line in (tmp_path / "quantization.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 15]
    assert [layer["name"] for layer in lines[0]["layers"]] == ["0", "2"]
    assert not any(m._forward_pre_hooks for m in runner.lightning_module.modules())


def test_the_report_page_draws_what_the_monitor_wrote(tmp_path):
    pytest.importorskip(
        "plotly", reason="plotly (extra `report`) is not installed: the page embeds its script"
    )
    runner = trainer(tmp_path, [QuantizationMonitor()], logger=CSVLogger(tmp_path, "", ""))
    runner.fit(TinyModule(), loader(), loader())
    text = write_report([tmp_path]).read_text()
    for key in ("staircase-0-2", "thresholds-0-0", "usage-weight-0", "entropy-activation-0"):
        assert f'data-figure="{key}"' in text


def test_accumulated_batches_are_logged_once_per_step(tmp_path):
    runner = trainer(
        tmp_path,
        [QuantizationMonitor(every_n_steps=1)],
        logger=CSVLogger(tmp_path, "", ""),
        accumulate_grad_batches=4,
    )
    runner.fit(TinyModule(), loader(), loader())
    steps = [int(row["step"]) for row in read_csv(tmp_path / "metrics.csv") if row["quant/0/scale_in"]]
    assert steps == [0, 1, 2, 3]


def test_nothing_is_watched_between_logs(tmp_path):
    module, watched = TinyModule(), []

    class Count(QuantizationMonitor):
        def on_train_batch_end(self, trainer, pl_module, *args):
            watched.append(bool(pl_module.net[0]._forward_pre_hooks))
            super().on_train_batch_end(trainer, pl_module, *args)

    trainer(tmp_path, [Count(every_n_steps=4)], max_epochs=1).fit(module, loader(), loader())
    assert watched == [True, False, False, True, False, False, False, True]


def wandb_records(folder):
    """Records of an offline run, as `wandb leet inspect --json` prints them, or the datastore's reader."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", str(path), "--json"]
    done = subprocess.run(inspect, capture_output=True, text=True, timeout=60)
    if done.returncode == 0 and done.stdout.startswith("{"):
        return [json.loads(line) for line in done.stdout.splitlines()]
    return datastore_records(path)


def datastore_records(path):
    from google.protobuf.json_format import MessageToDict
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, records = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(MessageToDict(record, preserving_proto_field_name=True))
    for record in records:
        if "history" in record:
            items = record["history"]["item"]
            pairs = {(i.get("key") or "/".join(i["nested_key"])): json.loads(i["value_json"]) for i in items}
            record["history"]["item"] = pairs
    return records


@pytest.mark.integration
def test_an_offline_wandb_run_holds_metrics_histograms_figures_and_table(tmp_path):
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    callbacks = [QuantizationMonitor(every_n_steps=4), EntropyRegularizer(0.01, log_every_n_steps=4)]
    trainer(tmp_path, callbacks, logger=logger, log_every_n_steps=1).fit(TinyModule(), loader(), loader())
    logger.experiment.finish()
    records = wandb_records(tmp_path)
    history = {}
    for record in records:
        history |= record.get("history", {}).get("item", {})
    assert {*NAMES, "entropy/0/weight", "entropy/penalty", "train/loss"} <= history.keys()
    kinds = {"quant/0/inputs": "histogram", "quant/layers": "table-file"}
    images = ("quant/0/staircase", "quant/usage", "quant/entropy")
    for name, kind in {**kinds, **dict.fromkeys(images, "images/separated")}.items():
        assert (history.get(f"{name}._type") or history[name]["_type"]) == kind
    text = json.dumps([record for record in records if "metric" in record])
    assert "quant/*" in text
    assert "trainer/global_step" in text
    assert "lightning_n2uq" in json.dumps([record for record in records if "config" in record])


def test_tensorboard_gets_the_same_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = [TensorBoardLogger(tmp_path / "tb", "", ""), CSVLogger(tmp_path / "csv", "", "")]
    trainer(tmp_path, [QuantizationMonitor()], logger=loggers, max_epochs=1).fit(
        TinyModule(), loader(), loader()
    )
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    columns = read_csv(tmp_path / "csv" / "metrics.csv")[0].keys()
    quant = {name for name in columns if name.startswith("quant/")}
    assert set(NAMES) <= quant
    assert quant <= set(events.Tags()["scalars"])
    assert "quant/usage" in events.Tags()["images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps: got 0, allowed are integers from 1"),
        ({"max_samples": 1.5}, "max_samples: got 1.5"),
        ({"figures_every_n_epochs": -1}, "figures_every_n_epochs: got -1"),
    ],
)
def test_bad_arguments_give_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationMonitor(**arguments)


def test_a_pattern_that_matches_nothing_gives_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="layers: 'fc' matches no quantized layer, there are 0, 2"):
        trainer(tmp_path, [QuantizationMonitor(layers=("fc",))]).fit(TinyModule(), loader(), loader())


def test_a_layer_that_is_never_called_is_named_once(tmp_path):
    module = TinyModule()
    module.unused = QuantLinear(4, 4, spec=QuantSpec(2, 2))
    for parameter in module.unused.parameters():
        parameter.requires_grad_(False)
    runner = trainer(tmp_path, [QuantizationMonitor(every_n_steps=1)])
    with pytest.warns(UserWarning, match=r"^QuantizationMonitor: unused: not called in this step") as seen:
        runner.fit(module, loader(), loader())
    assert sum("not called in this step" in str(one.message) for one in seen) == 1


def test_a_frozen_layer_in_evaluation_mode_is_not_named(tmp_path, recwarn):
    class Frozen(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].eval()

    trainer(tmp_path, [QuantizationMonitor(every_n_steps=1)]).fit(Frozen(), loader(), loader())
    assert not [str(one.message) for one in recwarn if "not called in this step" in str(one.message)]


class Convolutions(TinyModule):
    """One layer that trains on integers where the processor adds them, and some that do not."""

    def __init__(self):
        super().__init__()
        layers = {
            "large": QuantConv2d(8, 32, 3, spec=QuantSpec(2, 2)),
            "small": QuantConv2d(32, 2, 1, spec=QuantSpec(2, 2)),
            "annealed": QuantConv2d(2, 2, 3, spec=QuantSpec(2, 2)),
            "flat": nn.Flatten(),
            "fc": QuantLinear(2 * 60 * 60, 4, spec=QuantSpec(2, 2)),
        }
        self.net = nn.Sequential(OrderedDict(layers))
        self.net.annealed.activation_quantizer.ramp = 0.5

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x[:, :, None, None].expand(-1, -1, 64, 64)), y)


def test_layers_that_train_in_floats_are_named_once_with_their_reasons(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_n2uq.callbacks.quantization_monitor.rank_zero_info", said.append)
    monkeypatch.setattr(integer, "integer_obstacle", lambda size, device: None)  # as if on any processor
    callback = QuantizationMonitor(every_n_steps=1)
    trainer(tmp_path, [callback], max_steps=3).fit(Convolutions(), loader(), loader())
    assert said == [
        "training in floats: small: fewer than 8,388,608 multiplications in a batch",
        "training in floats: annealed: thresholds are being annealed",
        "training in floats: fc: QuantLinear has no integer training",
    ]
    said.clear()
    monkeypatch.setattr(integer, "integer_obstacle", lambda size, device: "no integers here")
    callback = QuantizationMonitor(layers=("large", "small"))
    trainer(tmp_path, [callback], max_steps=1).fit(Convolutions(), loader(), loader())
    assert said == ["training in floats: large, small: no integers here"]
