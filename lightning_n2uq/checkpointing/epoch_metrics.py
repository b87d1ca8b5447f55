"""Averages of the running epoch: what metrics and Lightning's logger have summed so far, on this process.

Lightning does not keep them in checkpoints, so that the row logged at the end of an interrupted epoch would
speak of its second part only.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

_REDUCTIONS = ("mean", "sum", "min", "max")


def capture(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Plain values and CPU tensors.

    Metrics that validation logs are left out: at its end they are still to be reset, and the next validation
    would count their images again.
    """
    results = trainer.fit_loop.epoch_loop.val_loop._results.values()
    evaluated = {id(item.value) for item in results if not item.is_tensor}
    metrics = {
        name: {"count": metric._update_count, "states": _states(metric)}
        for name, metric in pl_module.named_modules()
        if isinstance(metric, Metric)
        and id(metric) not in evaluated
        and metric.update_called
        and all(map(torch.is_tensor, _values(metric)))
    }
    names = {id(module): name for name, module in pl_module.named_modules()}
    logged = [
        entry
        for item in trainer.fit_loop.epoch_loop._results.values()
        if item.meta.on_epoch and not item.has_reset and (entry := _entry(item, names)) is not None
    ]
    return {"metrics": metrics, "logged": logged}


def restore(trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
    """Continue the sums; metrics that the module no longer has are left out."""
    modules = dict(pl_module.named_modules())
    for name, saved in state["metrics"].items():
        metric = modules.get(name)
        if isinstance(metric, Metric) and saved["states"].keys() == metric._defaults.keys():
            for key, value in saved["states"].items():
                setattr(metric, key, value.to(metric.device))
            metric._update_count, metric._computed = saved["count"], None
    for entry in state["logged"]:
        _register(trainer, pl_module, entry, modules)


def _values(metric: Metric) -> list[Any]:
    return [getattr(metric, key) for key in metric._defaults]


def _states(metric: Metric) -> dict[str, Tensor]:
    return {key: getattr(metric, key).detach().cpu().clone() for key in metric._defaults}


def _entry(item: Any, names: dict[int, str]) -> dict[str, Any] | None:  # noqa: ANN401  # Lightning's private type
    meta = item.meta
    reduction = getattr(meta.reduce_fx, "__name__", "")
    if meta.dataloader_idx is not None or reduction not in _REDUCTIONS:
        return None
    kept = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
    entry = {key: getattr(meta, key) for key in (*kept, "metric_attribute")}
    sync = {"sync_dist": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}
    if not item.is_tensor:
        name = names.get(id(item.value))
        return None if name is None else {"arguments": {**entry, **sync}, "reduce": reduction, "metric": name}
    values = {"value": item.value.detach().cpu().clone()}
    if meta.is_mean_reduction:
        values["cumulated_batch_size"] = torch.as_tensor(item.cumulated_batch_size).detach().cpu().clone()
    return {"arguments": {**entry, **sync}, "reduce": reduction, "values": values}


def _register(
    trainer: Trainer, pl_module: LightningModule, entry: dict[str, Any], modules: dict[str, Any]
) -> None:
    """Enters a logged value as the module's own call of `log` would, then puts the saved sums in."""
    results: Any = trainer.fit_loop.epoch_loop._results
    arguments = dict(entry["arguments"])
    fx, name = arguments.pop("fx"), arguments.pop("name")
    if "metric" in entry and entry["metric"] not in modules:
        return
    value = modules[entry["metric"]] if "metric" in entry else torch.zeros((), device=pl_module.device)
    results.log(
        fx, name, value, reduce_fx=getattr(torch, entry["reduce"]), batch_size=1,
        sync_dist_fn=trainer.strategy.reduce, **arguments,
    )  # fmt: skip
    item = results[f"{fx}.{name}"]
    for key, saved in entry.get("values", {}).items():
        setattr(item, key, saved.to(pl_module.device))
    item._computed = None
