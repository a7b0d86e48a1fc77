"""Tables in Markdown, and plots, of what `run.py` has measured so far.

    python examples/evidence/report.py evidence --plots plots

Losses are held-out nats per byte, the mean over seeds with half the distance between the highest and the lowest.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from runs import BLOCK, TABLES, Run


HEADINGS = {
    "run": "",
    "seeds": "",
    "parameters": "",
    "tokens": "tokens trained on, those of a base included",
    "TFLOP": "of training by formula (training.py), those of a base included",
    "loss": "of the last pass at the end",
    "lowest": "of all evaluations on the way, and its step: where early stopping would have stopped",
    "gain": "over its control at the end: the table's first run with this seed, text and base",
    "most behind": "the largest loss over that of its control at any step, where both have the same steps",
    "S = 0, 1, ...": "the loss when the trained model is run with so many steps, the S it was trained for in bold",
    "ticks": "of drafts for each new byte, sampled; S + 1 without drafts (decoding.py)",
    "exits": "passes of a byte, and the share of bytes that all passes would have chosen, too, for rising thresholds",
}


def read_results(folder: Path) -> dict[str, dict]:
    """The results in a folder by their names, each with what decoding.py measured of it under "decoding"."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        decoding = folder / "decoding" / path.name
        if decoding.is_file():
            result["decoding"] = json.loads(decoding.read_text(encoding="utf-8"))
        results[result["name"]] = result
    return results


def last_losses(result: dict) -> list[float]:
    """The last pass's loss at each evaluation."""
    return [point["losses"][-1] for point in result["curve"]]


def of_seeds(runs: Iterable[Run], results: dict[str, dict]) -> dict[tuple[str, str], list[dict]]:
    """Results of these runs by text and label, in the runs' order; what is not measured is left out."""
    groups = {}
    for run in runs:
        if run.name in results:
            groups.setdefault((run.text, run.label), []).append(results[run.name])
    return groups


def mean_and_spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """The mean, and half the distance between the highest and the lowest where there are several."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def with_base(result: dict, results: dict[str, dict], key: str) -> float:
    """What a run took together with its base."""
    base = result["run"]["base"]
    name = base and f"{base['text']}-{base['label']}-seed{base['seed']}"
    return result[key] + (results[name][key] if name in results else 0)


def row(group: list[dict], first: dict[tuple, dict], results: dict[str, dict]) -> dict[str, str]:
    """One row of a table: results that differ only in their seeds."""
    one = group[0]
    cells = {"run": one["run"]["label"], "seeds": str(len(group)), "parameters": f"{one['parameters']:,}"}
    cells["tokens"] = f"{with_base(one, results, 'tokens'):,}"
    cells["TFLOP"] = f"{statistics.mean(with_base(each, results, 'training_flops') for each in group) / 1e12:.1f}"
    if any(each["diverged"] for each in group):
        return {**cells, "loss": "diverged"}
    cells["loss"] = mean_and_spread([last_losses(each)[-1] for each in group])
    lowest = [min(zip(last_losses(each), each["curve"], strict=True), key=lambda pair: pair[0]) for each in group]
    steps = sorted({point["step"] for _, point in lowest})
    cells["lowest"] = f"{mean_and_spread([loss for loss, _ in lowest])} at {', '.join(map(str, steps))}"
    pairs = [(each, first[comparable(each)]) for each in group if first[comparable(each)] is not each]
    if pairs:
        gains = [last_losses(other)[-1] - last_losses(each)[-1] for each, other in pairs]
        cells["gain"] = mean_and_spread(gains, sign="+")
        behind = [most_behind(each, other) for each, other in pairs]
        if None not in behind:
            cells["most behind"] = f"{max(behind):+.3f}"
    if all("losses_by_steps" in each for each in group):
        columns = zip(*(each["losses_by_steps"] for each in group), strict=True)
        losses = [f"{statistics.mean(column):.3f}" for column in columns]
        losses[one["run"]["pondering_steps"]] = f"**{losses[one['run']['pondering_steps']]}**"
        cells["S = 0, 1, ..."] = " ".join(losses)
    if "decoding" in one:
        cells["ticks"] = f"{one['decoding']['ticks']:.2f}"
        cells["exits"] = ", ".join(f"{each['passes']:.2f} {each['agree']:.0%}" for each in one["decoding"]["exits"])
    return cells


def comparable(result: dict) -> tuple:
    """What two results must share, so that one can be the other's control."""
    run = result["run"]
    base = run["base"] and run["base"]["label"]
    return run["seed"], run["text"], base, run["text_bytes"], run.get("vocabulary")


def most_behind(result: dict, other: dict) -> float | None:
    """The largest loss over the other's at any evaluation, but the one before the first step; None: not comparable."""
    if [point["step"] for point in result["curve"]] != [point["step"] for point in other["curve"]]:
        return None
    return max(a - b for a, b in list(zip(last_losses(result), last_losses(other), strict=True))[1:])


def table(name: str, results: dict[str, dict]) -> str:
    """A table in Markdown, of what is measured of it; empty where nothing is."""
    groups = of_seeds(TABLES[name], results)
    if not groups:
        return ""
    texts = list(dict.fromkeys(text for text, _ in groups))
    parts = []
    for text in texts:
        chosen = [group for (of_text, _), group in groups.items() if of_text == text]
        first = {}
        for each in (result for group in chosen for result in group):
            first.setdefault(comparable(each), each)
        rows = [row(group, first, results) for group in chosen]
        columns = [heading for heading in HEADINGS if any(heading in cells for cells in rows)]
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(cells.get(column, "") for column in columns) + " |" for cells in rows]
        parts.append(f"### {name}: {text}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def worth_in_layers(loss: float, plain: dict[int, float]) -> float | None:
    """How many layers a plain model needs for this loss, between those measured, by lines over log(layers).

    Args:
        plain: the loss of plain models by their numbers of layers.

    Returns:
        None outside of what is measured.
    """
    points = sorted(plain.items())
    for (few, high), (many, low) in itertools.pairwise(points):
        if low <= loss <= high:
            share = (high - loss) / (high - low)
            return few * (many / few) ** share
    return None


def exponents(results: dict[str, dict], name: str) -> list[dict]:
    """For each pondering run of a table: its worth in plain layers, L (S + 1)^exponent, with seed and sizes."""
    measured = [results[run.name] for run in TABLES[name] if run.name in results]
    found = []
    for result in measured:
        run = result["run"]
        alike = [other for other in measured if not other["run"]["pondering_steps"] and same_but_layers(result, other)]
        plain = {other["run"]["layers"]: last_losses(other)[-1] for other in alike}
        layers = worth_in_layers(last_losses(result)[-1], plain) if run["pondering_steps"] else None
        if layers is not None:
            exponent = math.log(layers / run["layers"]) / math.log(run["pondering_steps"] + 1)
            found.append({"name": result["name"], "worth": layers, "exponent": exponent})
    return found


def same_but_layers(result: dict, other: dict) -> bool:
    one, two = result["run"], other["run"]
    fields = ("text", "width", "steps", "batch", "seed", "family", "dropout", "text_bytes", "vocabulary", "base")
    return all(one.get(field) == two.get(field) for field in fields)


def worth(name: str, results: dict[str, dict]) -> str:
    """What pondering is worth in plain layers, in words; empty where that cannot be said."""
    found = exponents(results, name)
    if not found:
        return ""
    lines = [f"- {each['name']}: as {each['worth']:.2f} plain layers" for each in found]
    values = [each["exponent"] for each in found]
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
        lines.append(f"- worth = layers x (S + 1)^{statistics.mean(values):.2f}, standard error {error:.2f}")
    return "\n".join(lines) + "\n"


def plot(name: str, results: dict[str, dict], path: Path) -> None:
    """Draw the loss of the last pass against tokens and against arithmetic, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for (text, label), group in of_seeds(TABLES[name], results).items():
        curves = [each["curve"][1:] for each in group if not each["diverged"]]
        if not curves:
            continue
        losses = [statistics.mean(point["losses"][-1] for point in points) for points in zip(*curves, strict=True)]
        tokens = [
            point["step"] * group[0]["run"]["batch"] * group[0]["run"].get("block", BLOCK) for point in curves[0]
        ]
        axes[0].plot(tokens, losses, label=f"{text} {label}")
        axes[1].plot([point["flops"] / 1e12 for point in curves[0]], losses)
    axes[0].set(xlabel="tokens", ylabel="held-out loss, nats per byte")
    axes[1].set(xlabel="TFLOP of training", xscale="log")
    figure.legend(loc="outside right upper", fontsize="x-small")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the folder that run.py wrote")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES) + "; by default all")
    parser.add_argument("--plots", type=Path, help="a folder for one SVG a table")
    arguments = parser.parse_args(argv)
    results = read_results(arguments.results)
    for name in arguments.tables or TABLES:
        text = table(name, results)
        if text:
            print(text)
            print(worth(name, results))
            if arguments.plots is not None:
                arguments.plots.mkdir(parents=True, exist_ok=True)
                plot(name, results, arguments.plots / f"{name}.svg")
    print("Columns: " + "; ".join(f"{name}: {text}" for name, text in HEADINGS.items() if text) + ".")


if __name__ == "__main__":
    main()
