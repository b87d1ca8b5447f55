"""Folders as runs leave them, with known numbers in them."""

import json


def layer(name, start, thresholds=3, dead=False):
    widths = [0.5 + 0.1 * k for k in range(thresholds)]
    ends, left = [], start
    for width in widths:
        ends.append(left + width / 2)
        left += width
    weight = {
        "bits": 2,
        "count": 100,
        "usage": [20, 30, 30, 20],
        "clipped": 0.4,
        "changed": 0.01,
        "scale": 0.1,
    }
    return {
        "name": name,
        "weight": {**weight, "scale": 0.1},
        "activation": {
            "bits": 2,
            "usage": [50, 0 if dead else 20, 20, 10],
            "clipped_low": 0.5,
            "clipped_high": 0.02,
            "low": start - 0.5,
            "high": left + 0.5,
            "histogram": [5.0] * 20,
            "start": start,
            "scale_in": 1.0,
            "scale_out": 1.1,
            "widths": widths,
            "thresholds": ends,
            "widths_at_floor": 0,
            "curve": [],
        },
    }


def write_run(folder, seed=0, traffic=False, layers=("layer1.0.conv1", "layer1.0.conv2"), lr=0.002):
    folder.mkdir(parents=True)
    header = ["epoch", "step", "train/loss", "val/acc", "val/loss", "quant/mean_weight_entropy"]
    header += ["comm/sent_bytes"] if traffic else []
    rows = [",".join(header)]
    for step in range(0, 100, 10):
        loss, accuracy = f"{2.3 / (1 + step / 20) + 0.1 * seed:.4f}", f"{0.5 + step / 250:.4f}"
        rows.append(
            ",".join([str(step // 50), str(step), loss, "", "", "1.98", *(["1e6"] if traffic else [])])
        )
        if step % 50 == 40:
            rows.append(
                ",".join([str(step // 50), str(step), "", accuracy, loss, "", *([""] if traffic else [])])
            )
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    snapshots = []
    for i, step in enumerate((49, 99)):
        records = [layer(name, 0.01 * step + k, dead=k == 1) for k, name in enumerate(layers)]
        snapshots.append({"step": step, "epoch": i, "layers": records})
    (folder / "quantization.jsonl").write_text("".join(json.dumps(s) + "\n" for s in snapshots))
    matrix = [[9 if i == j else int(i + 1 == j) for j in range(4)] for i in range(4)]
    (folder / "confusion.json").write_text(json.dumps({"val": matrix}))
    (folder / "config.yaml").write_text(f"# name: test\nmodel:\n  init_args:\n    lr: {lr}\n    bits: 2\n")
    return folder
