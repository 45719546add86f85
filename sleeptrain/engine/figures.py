"""Figures of a run, drawn from its metrics."""

from pathlib import Path
from typing import Any


def draw_learning_curve(rows: list[dict[str, Any]], folder: Path, title: str) -> list[Path]:
    """Training loss, and every held-out metric by difficulty and N, over steps; as SVG and PNG in
    ``folder``."""
    from matplotlib.figure import Figure  # without pyplot, which is for windows on a screen

    curves = _curves(rows)
    panels = ["train/loss", *sorted({name.split("/")[1] for name in curves if name.count("/") == 3})]
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        shown = {
            n: c for n, c in curves.items() if n == panel or (n.count("/") == 3 and n.split("/")[1] == panel)
        }
        for name, (steps, values) in sorted(shown.items()):
            label = ", ".join(part.replace("_", " ") for part in name.split("/")[2:])
            axis.plot(steps, values, label=label or None, marker="." if label else None, linewidth=1.4)
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(panel.replace("train/loss", "training loss, nats per target").replace("_", " "))
        axis.grid(alpha=0.3)
        if panel != "train/loss":
            axis.legend(fontsize=8)
    figure.suptitle(title)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"learning_curve.{suffix}" for suffix in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=140)
        figure.set_layout_engine("none")  # the second one as the first was laid out
    return paths


def _curves(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Metric name -> (steps, values); names of held-out metrics are ``eval/METRIC/DIFFICULTY/passes_N``."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and (name == "train/loss" or name.startswith("eval/")):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves
