"""Matplotlib figures as inline SVG that takes its colours and type from the page, so it follows light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from temper.core.hashing import hash_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT, SECOND, GOOD, BAD = "#101112", "#707172", "#d0d1d2", "#1f4e79", "#a8620c", "#0b7a53", "#b23a1e"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", ACCENT: "var(--accent)", SECOND: "var(--second)", GOOD: "var(--good)",
    BAD: "var(--bad)",
}  # fmt: skip
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "temper", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": RULE, "axes.labelcolor": MUTED,
    "axes.titlecolor": INK, "text.color": INK, "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "grid.linewidth": 0.5, "axes.axisbelow": True, "xtick.major.size": 0,
    "ytick.major.size": 0, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "axes.unicode_minus": True,
}  # fmt: skip


@contextmanager
def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of inches with a grid of axes, in the report's style; axes come as a [rows, columns] array."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):  # type: ignore[arg-type]
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def to_svg(drawn: Figure, described: str) -> str:
    """The figure as an `<svg>` element with no outside reference; `described` is what a screen reader says."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([\d. a-z]*?)([\d.]+px)[^;\"]*", r"font: \1\2 var(--sans)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    mark = "f" + hash_text(described + text)[:8]
    text = re.sub(r"\bid=\"([^\"]+)\"", rf'id="{mark}-\1"', text)
    text = re.sub(r"(href=\"#|url\(#)", rf"\1{mark}-", text)
    spoken = described.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{spoken}" ', text, count=1)
