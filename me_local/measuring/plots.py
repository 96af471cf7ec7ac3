"""The picture of `bench --plot`: speeds with the limit marked, and what an evaluation of k tokens takes."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from me_local.measuring.bench import Report


def plot_bench(report: Report, path: Path) -> None:
    """Write the picture, in the format of the file's suffix. Raises OSError."""
    panels = [_bars, _curves, _batches] if report.batches else [_bars, _curves]
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
        draw(axes, report)
    figure.savefig(path, dpi=150, format=path.suffix.lstrip(".") or "png")


def _bars(axes: Axes, report: Report) -> None:
    names = [speed.name for speed in report.speeds]
    axes.bar(
        names,
        [speed.pieces for speed in report.speeds],
        color=["C0" if s.kind != "me" else "C1" for s in report.speeds],
    )
    if len(report.weights) > 1:
        limit = report.limit * report.speed("ce").pieces
        axes.axhline(limit, linestyle="--", color="black", label=f"limit of ME, {report.limit:.2f} times CE")
        axes.legend()
    axes.set_ylabel("pieces per second")
    axes.tick_params(axis="x", rotation=20)


def _batches(axes: Axes, report: Report) -> None:
    for i, name in enumerate(dict.fromkeys(speed.name for speed in report.batches)):
        speeds = [speed for speed in report.batches if speed.name == name]
        counts = [speed.batch for speed in speeds]
        axes.plot(counts, [speed.pieces for speed in speeds], marker="o", color=f"C{i}", label=name)
        axes.plot(counts, [speed.predicted for speed in speeds], linestyle=":", color=f"C{i}")
    axes.set_xlabel("replies at once (dotted: by what evaluations cost)")
    axes.set_ylabel("pieces per second, all together")
    axes.set_ylim(bottom=0)
    axes.legend()


def _curves(axes: Axes, report: Report) -> None:
    for member, context in dict.fromkeys((call.member, call.context) for call in report.calls):
        calls = [call for call in report.calls if (call.member, call.context) == (member, context)]
        axes.plot(
            [c.tokens for c in calls], [1000 * c.seconds for c in calls], marker="o", label=f"{member}, {context}"
        )
    axes.set_xlabel("tokens in one evaluation")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    axes.legend(title="member, tokens of context")
