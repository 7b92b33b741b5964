"""The section on evaluation tasks: scores of both models and what share of the base's the candidate keeps."""

from __future__ import annotations

from collections.abc import Sequence

from reap_serve.compare.plot import CANDIDATE_COLOUR, Plot, interval_bars, label, piece
from reap_serve.compare.record import Report, TaskReport
from reap_serve.compare.section import Cell, Row, Section


def tasks_section(report: Report) -> Section | None:
    """None where no tool measured anything."""
    if not report.tasks:
        return None
    note = (
        "Recovery = 100 * candidate / base. In brackets its 95 % interval: by bootstrap over the items that both "
        "models were asked, or, where the tool keeps no items, from its standard errors (Fieller), as if the models "
        "had been asked different ones. A metric of which less is better has no recovery."
    )
    recovered = [task for task in report.tasks if task.recovery_percent is not None]
    plots = (Plot(_recovery(recovered), "Recovery of each metric with its 95 % interval."),) if recovered else ()
    return Section("Tasks", tuple(_row(task) for task in report.tasks), (note,), plots)


def _row(task: TaskReport) -> Row:
    ends = task.recovery_interval
    interval = "" if ends is None else f"[{ends[0]:.1f} %, {ends[1]:.1f} %]"
    recovery = "–" if task.recovery_percent is None else f"{task.recovery_percent:.1f} %"
    return Row(
        task.task,
        None,
        (
            Cell("Tool", task.tool),
            Cell("Metric", task.metric),
            Cell("Base", f"{task.base:.4f}"),
            Cell("Candidate", f"{task.candidate:.4f}"),
            Cell("Recovery", recovery, interval),
            Cell("Items", "–" if task.items is None else f"{task.items:,}", task.method or ""),
        ),
        "Task",
    )


def _recovery(tasks: Sequence[TaskReport]) -> str:
    import plotly.graph_objects as go

    values = [task.recovery_percent or 0.0 for task in tasks]
    ends = [task.recovery_interval or (value, value) for task, value in zip(tasks, values, strict=True)]
    trace = go.Scatter(
        x=values,
        y=[label(f"{task.task}, {task.metric}") for task in tasks],
        mode="markers",
        marker={"color": CANDIDATE_COLOUR, "size": 10},
        error_x=interval_bars(values, ends),
    )
    plot = go.Figure([trace])
    plot.add_vline(x=100.0, line={"dash": "dash", "color": "#595959"}, annotation_text="base")
    plot.update_xaxes(title="recovery, %")
    plot.update_yaxes(autorange="reversed")
    return piece(plot, "recovery", 110 + 34 * len(tasks))
