"""Turn the panels' description into a W&B workspace (extra `dashboards`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lightning_n2uq.dashboard.panels import SECTIONS, PanelSpec, SectionSpec
from lightning_n2uq.utils.compat import workspace_model
from lightning_n2uq.utils.extras import how_to_install
from lightning_n2uq.utils.validation import check

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

STEP = "trainer/global_step"
_OPEN_SECTIONS = 3


def build_workspace(entity: str, project: str, name: str) -> Workspace:
    """Builds the workspace; nothing is sent.

    Raises:
        ValueError: Wandb-workspaces is not installed, or a name is empty.
    """
    for argument, value in (("entity", entity), ("project", project), ("name", name)):
        check(bool(value.strip()), argument, value, "is a name")
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(
            f"dashboard: wandb-workspaces is not installed, install it with {how_to_install('dashboards')}"
        ) from error
    sections = [
        ws.Section(name=spec.title, panels=_panels(spec), is_open=i < _OPEN_SECTIONS)
        for i, spec in enumerate(SECTIONS)
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _panels(section: SectionSpec) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    plots = [_line_plot(panel) for panel in section.panels]
    return [*plots, wr.MediaBrowser(media_keys=list(section.images))] if section.images else plots


def _line_plot(panel: PanelSpec) -> Any:  # noqa: ANN401 -- a type of an optional package
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=panel.title, x=STEP, metric_regex=f"^{panel.regex}$", log_y=panel.log_y, max_runs_to_show=10
    )


def to_json(workspace: Workspace) -> str:
    """Returns what would be sent, as JSON: entity, project, name and the view's specification."""
    view = workspace_model(workspace)
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    fields = {"entity": view.entity, "project": view.project, "displayName": view.display_name, "spec": spec}
    return json.dumps(fields, indent=2)


def push(workspace: Workspace) -> str:
    """Sends the workspace to W&B and returns its address.

    Raises:
        ValueError: Nobody is logged in, or W&B refuses.
    """
    import wandb

    try:
        workspace.save()
    except (wandb.errors.UsageError, wandb.errors.CommError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"dashboard: W&B refused the workspace ({reason}); try wandb login") from error
    url: str = workspace.url
    return url
