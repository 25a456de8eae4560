"""The report of one training run: its curves, and where its time went."""

from collections.abc import Mapping
from pathlib import Path

from cm3jax.evals.report import Report
from cm3jax.metrics import Series, read_metrics
from cm3jax.reliability.goodput import BUCKETS, account, goodput, read_spans

GOODPUT = """
Every second since the first start is in one bucket. **step** is what lasted: updates that are part of the result,
**lost_work** what was computed after a checkpoint and thrown away with its process, **restart** the time between two
processes.
"""
# Charts by the end of their metrics' names; what is left has a chart of its own.
_TOGETHER = ("loss", "_per_second", "perplexity")


def write_run_report(workdir: Path) -> Path:
    """Writes `workdir/report.html` from the files of the run and returns its path."""
    workdir = Path(workdir)
    metrics = read_metrics(workdir / "metrics.jsonl")
    spans = read_spans(workdir / "goodput.jsonl")
    totals = account(spans)
    report = Report(f"cm3jax: {workdir.name}")
    report.highlights(
        {
            "updates": max((int(steps[-1]) for steps, _ in metrics.values()), default=0),
            "goodput": f"{goodput(totals):.1%}",
            "attempts": max((span.attempt for span in spans), default=0),
            "hours": round(sum(totals.values()) / 3600, 2),
        }
    )
    report.section("Training")
    for title, curves in _charts(metrics).items():
        report.curves(curves, title)
    report.section("Time")
    report.text(GOODPUT)
    report.shares({bucket: totals[bucket] for bucket in BUCKETS}, "Share of the time")
    report.table([(bucket, round(totals[bucket], 2)) for bucket in BUCKETS], ("bucket", "seconds"))
    report.section("Run")
    for name in ("config.json", "layout.txt"):
        if (workdir / name).exists():
            report.details(name, (workdir / name).read_text())
    report.write(workdir / "report.html")
    return workdir / "report.html"


def _charts(metrics: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    charts: dict[str, dict[str, Series]] = {}
    for name, series in metrics.items():
        prefix = "evaluation: " if name.startswith("eval/") else ""
        short = name.removeprefix("eval/")
        ending = next((ending.strip("_") for ending in _TOGETHER if short.endswith(ending)), short)
        charts.setdefault(f"{prefix}{ending.replace('_', ' ')}", {})[short] = series
    return charts
