"""Write docs/evidence.md, README's part on evidence and their pictures from page.md, readme.md and the results.

    python examples/evidence/page.py

Every `{...}` in page.md and readme.md is a figure that is computed here. A run is written text/label, and a figure is
the mean over its seeds. `--check` writes nothing and says whether all is up to date.
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import exponents, last_losses, read_results, with_base
from runs import BLOCK, TABLES


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DRAWN = {
    "2layers": "plain, 2 layers",
    "2layers-S1": "S = 1, 2 layers",
    "2layers-S3": "S = 3, 2 layers",
    "4layers": "plain, 4 layers",
    "8layers": "plain, 8 layers",
    "2layers-x4": "plain, 2 layers, 4 times the tokens",
}
ORANGE, YELLOW = "#d55e00", "#e69f00"
MARKS = "<!-- figures by examples/evidence/page.py -->\n", "<!-- end of figures -->"
FIGURE = re.compile(r"\{(\w+)((?: [^ {}]+)*)\}")


class Figures:
    """What a page may ask for.

    Args:
        results: from `read_results`.
    """

    def __init__(self, results: dict[str, dict]):
        self.results = results

    def seeds_of(self, run: str) -> dict[int, dict]:
        """The results of a run, written text/label, by seed.

        Raises:
            KeyError: there is none.
        """
        text, label = run.split("/")
        found = {
            result["run"]["seed"]: result
            for result in self.results.values()
            if (result["run"]["text"], result["run"]["label"]) == (text, label)
        }
        if not found:
            raise KeyError(f"{run} has not been measured")
        return found

    def mean(self, run: str, figure: Callable[[dict], float]) -> float:
        return statistics.mean(map(figure, self.seeds_of(run).values()))

    def seeds(self, run: str) -> str:
        """How many seeds were run."""
        return str(len(self.seeds_of(run)))

    def loss(self, run: str, step: str = "") -> str:
        """The last pass's loss at the end, or at a step."""

        def at_step(result: dict) -> float:
            points = zip(result["curve"], last_losses(result), strict=True)
            return next(loss for point, loss in points if not step or point["step"] == int(step))

        return f"{self.mean(run, at_step if step else lambda result: last_losses(result)[-1]):.3f}"

    def lowest(self, run: str) -> str:
        """The lowest loss on the way: where early stopping would have stopped."""
        return f"{self.mean(run, lambda result: min(last_losses(result))):.3f}"

    def losses(self, run: str, most: str) -> str:
        """The loss of seed 0 when the trained model is run with S = 0 .. `most`, as cells of a table."""
        return " | ".join(f"{loss:.3f}" for loss in self.seeds_of(run)[0]["losses_by_steps"][: int(most) + 1])

    def _gains(self, run: str, control: str) -> list[float]:
        ours, theirs = self.seeds_of(run), self.seeds_of(control)
        return [last_losses(theirs[seed])[-1] - last_losses(ours[seed])[-1] for seed in ours.keys() & theirs.keys()]

    def gain(self, run: str, control: str) -> str:
        """By how much a run's loss is below its control's, on the same seeds."""
        return f"{statistics.mean(self._gains(run, control)):+.3f}"

    def gain0(self, run: str, control: str) -> str:
        """The gain of seed 0."""
        ours, theirs = self.seeds_of(run)[0], self.seeds_of(control)[0]
        return f"{last_losses(theirs)[-1] - last_losses(ours)[-1]:+.3f}"

    def spread(self, run: str, control: str) -> str:
        """Half the distance between the highest and the lowest gain of a seed."""
        gains = self._gains(run, control)
        return f"{(max(gains) - min(gains)) / 2:.3f}"

    def share(self, run: str, control: str, other: str) -> str:
        """Which part of another run's gain over a control a run has, in percent, on the seeds that all three have."""
        three = [self.seeds_of(each) for each in (run, control, other)]
        seeds = set.intersection(*(set(each) for each in three))
        ours, controls, others = (statistics.mean(last_losses(each[seed])[-1] for seed in seeds) for each in three)
        return f"{(controls - ours) / (controls - others):.0%}".replace("%", " %")

    def parameters(self, run: str) -> str:
        return f"{self.mean(run, lambda result: result['parameters']) / 1e6:.2f} M"

    def arithmetic(self, run: str, control: str) -> str:
        """The operations of training, bases included, by those of a control."""
        operations = [
            self.mean(each, lambda result: with_base(result, self.results, "training_flops"))
            for each in (run, control)
        ]
        return f"{operations[0] / operations[1]:.1f}"

    def exponent(self, *tables: str) -> str:
        """The exponent of (S + 1) in what pondering is worth in plain layers, with its standard error."""
        found = {each["name"]: each["exponent"] for table in tables for each in exponents(self.results, table)}
        values = list(found.values())
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"

    def layers(self, run: str, table: str) -> str:
        """How many plain layers a run of a table is worth."""
        names = {result["name"] for result in self.seeds_of(run).values()}
        return (
            f"{statistics.mean(each['worth'] for each in exponents(self.results, table) if each['name'] in names):.1f}"
        )

    def ticks(self, run: str) -> str:
        """Of drafts for each new byte of seed 0; S + 1 without drafts."""
        return f"{self._decoding(run)['ticks']:.2f}"

    def exits(self, run: str, threshold: str) -> str:
        """Passes a new byte of seed 0 with early exits, and the share of bytes that stay what they are without."""
        found = next(each for each in self._decoding(run)["exits"] if each["threshold"] == float(threshold))
        return f"{found['passes']:.2f}, {found['agree']:.0%}".replace("%", " %")

    def _decoding(self, run: str) -> dict:
        """What decoding.py measured of seed 0.

        Raises:
            KeyError: nothing.
        """
        result = self.seeds_of(run)[0]
        if "decoding" not in result:
            raise KeyError(f"{run} has not been measured by decoding.py")
        return result["decoding"]

    def machines(self) -> str:
        """On what was measured."""
        kinds = {
            (each["machine"].get("gpu", each["machine"]["processor"]), each["date"]) for each in self.results.values()
        }
        counts = dict.fromkeys(sorted(kinds), 0)
        for each in self.results.values():
            counts[each["machine"].get("gpu", each["machine"]["processor"]), each["date"]] += 1
        return "; ".join(f"{count} runs on {machine}, {date}" for (machine, date), count in counts.items())


def filled(text: str, figures: Figures) -> str:
    """A text with its figures in place, in lines of at most 125 characters but for tables."""
    text = FIGURE.sub(lambda found: getattr(figures, found[1])(*found[2].split()), text)
    return "\n\n".join(_wrapped(paragraph) for paragraph in text.split("\n\n"))


def _wrapped(paragraph: str) -> str:
    """A paragraph or list in lines of its own length; whatever else as it is."""
    if paragraph.lstrip().startswith(("|", "#", "```", "!", "<")):
        return paragraph
    items = re.split(r"\n(?=- )", paragraph.rstrip("\n"))
    wrapped = [
        textwrap.fill(
            " ".join(item.split()),
            125,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_on_hyphens=False,
        )
        for item in items
    ]
    return "\n".join(wrapped) + "\n" * paragraph.endswith("\n")


def drawn_curves(figures: Figures) -> dict[str, list[tuple[int, float, float]]]:
    """For each line of the picture: tokens, operations and loss at each evaluation, the mean over seeds."""
    curves = {}
    for label in DRAWN:
        seeds = list(figures.seeds_of(f"shakespeare/{label}").values())
        run = seeds[0]["run"]
        points = zip(*(result["curve"][1:] for result in seeds), strict=True)
        curves[label] = [
            (
                group[0]["step"] * run["batch"] * run.get("block", BLOCK),
                group[0]["flops"],
                round(statistics.mean(point["losses"][-1] for point in group), 4),
            )
            for group in points
        ]
    return curves


def drawn_sizes(figures: Figures) -> dict[int, list[tuple[int, int, float, float]]]:
    """For each S of the table of sizes: layers, parameters, operations and loss, the mean over seeds, by size."""
    sizes = {}
    for label in dict.fromkeys(run.label for run in TABLES["scaling"]):
        seeds = list(figures.seeds_of(f"novels/{label}").values())
        run = seeds[0]["run"]
        loss = statistics.mean(last_losses(result)[-1] for result in seeds)
        point = run["layers"], seeds[0]["parameters"], seeds[0]["training_flops"], round(loss, 4)
        sizes.setdefault(run["pondering_steps"], []).append(point)
    return {steps: sorted(points) for steps, points in sorted(sizes.items())}


def digest(drawn: dict) -> str:
    """A mark of what is drawn, kept in the picture."""
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def new_figure(width: float, panels: int) -> tuple:
    """A figure of matplotlib whose panels share the loss as their y-axis, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "evidence", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "figure.facecolor": "white"})
    figure, axes = pyplot.subplots(1, panels, figsize=(width, 3.4), sharey=True, layout="constrained")
    axes[0].set_ylabel("held-out loss, nats per byte")
    return figure, axes


def finish(figure: Any, axes: list, names: list[str], all_ticks: list[tuple], path: Path, drawn: dict) -> None:
    """Name the axes, write the legend, and save the picture with the mark of what is drawn."""
    for axis, name, ticks in zip(axes, names, all_ticks, strict=True):
        axis.set(xlabel=name, xscale="log")
        axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None, "Description": digest(drawn)})


def draw_curves(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Draw the loss against tokens and against arithmetic."""
    figure, axes = new_figure(9, 2)
    styles = {"2layers-S3": (ORANGE, 2.6, "-"), "2layers-S1": (YELLOW, 1.8, "-")}
    greys = iter(["#000000", "#555555", "#888888", "#000000"])
    for label, points in curves.items():
        color, width, dashes = styles.get(label) or (next(greys), 1.3, ":" if label.endswith("x4") else "-")
        tokens, operations, losses = zip(*points, strict=True)
        style = {"color": color, "linewidth": width, "linestyle": dashes, "marker": "o", "markersize": 3}
        axes[0].plot([each / 1e6 for each in tokens], losses, label=DRAWN[label], **style)
        axes[1].plot([each / 1e12 for each in operations], losses, **style)
    names = ["millions of bytes trained on", "arithmetic of training, TFLOP"]
    finish(figure, axes, names, [(0.5, 1, 2, 4), (1, 2, 5, 10, 20)], path, curves)


def draw_sizes(sizes: dict[int, list[tuple[int, int, float, float]]], path: Path) -> None:
    """Draw the loss against layers, parameters and arithmetic."""
    figure, axes = new_figure(9, 3)
    for steps, points in sizes.items():
        color = {0: "#000000", 1: YELLOW, 3: ORANGE}[steps]
        layers, parameters, operations, losses = zip(*points, strict=True)
        style = {"color": color, "linewidth": 1.3 if not steps else 2.2, "marker": "o", "markersize": 4}
        axes[0].plot(layers, losses, label=f"S = {steps}" if steps else "plain", **style)
        axes[1].plot([each / 1e6 for each in parameters], losses, **style)
        axes[2].plot([each / 1e12 for each in operations], losses, **style)
    names = ["layers", "millions of parameters", "arithmetic of training, TFLOP"]
    finish(figure, axes, names, [(1, 2, 4, 8, 16), (0.25, 0.5, 1, 2, 3), (3, 10, 30)], path, sizes)


def pages(figures: Figures) -> dict[Path, str]:
    """What the files should say."""
    page = filled((HERE / "page.md").read_text(encoding="utf-8"), figures)
    part = filled((HERE / "readme.md").read_text(encoding="utf-8"), figures)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return {ROOT / "docs" / "evidence.md": page, ROOT / "README.md": before + MARKS[0] + part + MARKS[1] + after}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    arguments = parser.parse_args(argv)
    figures = Figures(read_results(HERE / "results"))
    texts, docs = pages(figures), ROOT / "docs"
    pictures = {
        docs / "evidence.svg": (draw_curves, drawn_curves(figures)),
        docs / "evidence-sizes.svg": (draw_sizes, drawn_sizes(figures)),
    }
    if not arguments.check:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        for path, (draw, drawn) in pictures.items():
            draw(drawn, path)
        return
    old = [path.name for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    old += [
        path.name for path, (_, drawn) in pictures.items() if digest(drawn) not in path.read_text(encoding="utf-8")
    ]
    if old:
        sys.exit(f"{', '.join(old)}: not what the results say; run {Path(__file__).name}")


if __name__ == "__main__":
    main()
