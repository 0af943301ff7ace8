"""How the engine's benchmark is reported: its sides, its goals, and the tables and figure made from a report."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from massdpo.console import markdown_table
from massdpo.report.figures import save_pictures
from massdpo.runs.machine import in_words
from massdpo.store import write_text

# Goals of a quiet machine: at least, or at most.
AT_LEAST = {
    "full_pool_speedup": 25.0,
    "full_pool_speedup_lean": 12.0,
    "random_k_speedup": 5.0,
    "random_k_speedup_lean": 3.0,
    "mass_speedup": 4.0,
    "mass_speedup_lean": 2.5,
    "trl_pairs_speedup": 1.3,
}
AT_MOST = {"full_pool_memory_ratio": 1 / 12, "mass_over_random": 1.4}
SIDES = {
    "full_everywhere": "full pool, prompts repeated, logits at every token",
    "full_lean": "full pool, prompts repeated, logits at response tokens",
    "full_packed": "full pool, packed",
    "random_everywhere": "random k, prompts repeated, logits at every token",
    "random_lean": "random k, prompts repeated, logits at response tokens",
    "random_packed": "random k, packed",
    "mass": "MASS, selected at this step, two-phase",
}

GROWN = {  # the sides that are measured along N, k and P
    "full_packed": "full pool, packed",
    "mass": "MASS, two-phase",
    "random_packed": "random k, packed",
    "random_lean": "random k, prompts repeated",
}


def markdown(report: dict[str, Any]) -> str:
    """Every number of the report as Markdown tables."""
    sides = [
        (meaning, f"{report['seconds'][side]:.3f}", f"{report['peak_bytes'][side] / 1e9:.2f}")
        for side, meaning in SIDES.items()
    ]
    goals = [
        (name, f"{report[name]:.3g}", f"{sign} {goal:.3g}")
        for sign, bounds in (("at least", AT_LEAST), ("at most", AT_MOST))
        for name, goal in bounds.items()
    ]
    growth = [(row["axis"], str(row["value"]), *(f"{row[side]:.3f}" for side in GROWN)) for row in report["growth"]]
    setting = ", ".join(f"{name} {value}" for name, value in report["setting"].items())
    return "\n\n".join(
        [
            markdown_table(["side", "step, s", "extra peak memory, GB"], sides),
            markdown_table(["ratio", "measured", "goal"], goals),
            markdown_table(["grows along", "value", *(f"{label}, s" for label in GROWN.values())], growth),
            f"Setting: {setting}.\nMachine: {in_words(report['machine'])}.\nCommit: {report['commit']}.\n",
        ]
    )


def draw_growth(growth: list[dict[str, Any]], out: Path) -> None:
    """`engine_growth.png` and `.svg`: one panel per axis; and the numbers as `engine_growth.csv`."""
    titles = {"negatives": "negatives in the pool", "k": "negatives trained on (k)", "prompt": "prompt tokens"}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for panel, (axis, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        rows = [row for row in growth if row["axis"] == axis]
        for (side, label), marker in zip(GROWN.items(), "osD^", strict=True):
            panel.plot([r["value"] for r in rows], [r[side] for r in rows], marker=marker, markersize=4, label=label)
        panel.set(xlabel=title, xscale="log", yscale="log", xticks=[r["value"] for r in rows])
        panel.set_xticks([r["value"] for r in rows], [str(r["value"]) for r in rows])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds per step")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_pictures(figure, out / "engine_growth")
    table = pd.DataFrame(growth, columns=["axis", "value", *GROWN])
    write_text(out / "engine_growth.csv", table.to_csv(index=False, lineterminator="\n"))
