"""What the demo tells people: the report in HTML and the summary for the terminal, both from the results alone."""

import base64
import html
import os
import shlex
import shutil
import sys
from pathlib import Path
from string import Template
from typing import Any

from .figure import draw_curves


_TEMPLATE = Path(__file__).with_name("report.html")
_NAMES = {
    "base": "base, before",
    "control": "control: the base, trained on",
    "converted": "base made to ponder, untrained",
    "pondering": "pondering model",
}


def headline(results: dict[str, Any]) -> str:
    """The outcome in a few words."""
    difference = results["loss_difference"]
    if difference is None:
        return "Training diverged"
    if abs(difference) < 0.0005:
        return "Pondering made no difference"
    return "Pondering lowered the loss" if difference < 0 else "Pondering did not lower the loss"


def verdict(results: dict[str, Any]) -> str:
    """The outcome in one sentence."""
    difference, losses = results["loss_difference"], results["held_out_loss"]
    if difference is None:
        return "A loss is not a number any more: training diverged. A lower --learning-rate may help."
    return (
        f"On the same {results['settings']['tokens']:,} tokens the pondering model came to a held-out loss of "
        f"{losses['pondering']:.3f} nats per token and the plain control to {losses['control']:.3f}: "
        f"{abs(difference):.3f} {'less' if difference < 0 else 'more'} with pondering, at "
        f"{results['tokens_per_second']['ratio']:.1f} times the training time per token."
    )


def on_the_way(results: dict[str, Any]) -> str:
    """How the difference between the two models changed while they trained, in one sentence."""
    held_out = [results["curves"][name]["held_out"] for name in ("pondering", "control")]
    differences = [
        f"{pondering[-1] - control[-1]:+.3f}"
        for (_, pondering), (_, control) in zip(*held_out, strict=True)
        if None not in (pondering[-1], control[-1])
    ]
    return f"Pondering model minus control, from the start of their training to its end: {', '.join(differences)}."


def summary(results: dict[str, Any]) -> str:
    """The results for a terminal, without colours."""
    rates = results["tokens_per_second"]
    rows: list[tuple[str, ...]] = [("", "held-out loss", "bits per byte", "tokens/s")]
    for key in ("base", "control", "converted", "pondering"):
        rate = f"{rates[key]:,.0f}" if key in rates else ""
        rows.append((_NAMES[key], *(number(results[part][key]) for part in ("held_out_loss", "bits_per_byte")), rate))
    lines = [f"{name:<32}{loss:>13}{bits:>15}{rate:>10}" for name, loss, bits, rate in rows]
    passes = "  ".join(number(loss) for loss in results["loss_of_each_pass"]["pondering"])
    output = results["output"]
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"Loss of each pass of the pondering model: {passes}",
            on_the_way(results),
            verdict(results),
            "",
            f"Report: {Path(output, 'report.html')}",
            f"Next:   {_generate_command(output, program())}",
        ]
    )


def write_report(results: dict[str, Any]) -> str:
    """The report as one HTML page that needs no other file."""
    fields = {
        "headline": html.escape(headline(results)),
        "verdict": html.escape(verdict(results)),
        "explanation": html.escape(_explanation(results)),
        "result_rows": _result_rows(results),
        "curves": _inline(draw_curves(results)),
        "dark_curves": _inline(draw_curves(results, dark=True)),
        "on_the_way": html.escape(on_the_way(results)),
        "passes_explanation": html.escape(_passes_explanation(results)),
        "pass_rows": _pass_rows(results),
        "samples_explanation": html.escape(
            "Both models continue the same prompts, sampled at temperature 0.8 with the same seed. Models as small as "
            "the demo's own write text that only looks right."
            if results["samples"]
            else "None: training diverged."
        ),
        "samples": "\n".join(_sample(sample) for sample in results["samples"]),
        "checkpoint_explanation": html.escape(_checkpoint_explanation(results)),
        "method": html.escape(_method(results)),
        "setting_rows": "\n".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in _settings(results)
        ),
        "commands": html.escape(_commands(results)),
    }
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(fields)


def number(value: float | None, digits: int = 3) -> str:
    """A loss for people; None stands for a number that JSON does not have."""
    return "not a number" if value is None else f"{value:.{digits}f}"


def _explanation(results):
    base = results["base"]
    start = f"The base is a {base['model_type']} model with {base['parameters']:,} parameters, {base['name']}" + (
        f" on {base['tokens']:,} tokens of {results['text']['source']}" if base["tokens"] else ""
    )
    settings = results["settings"]
    gate = "" if settings["pondering_gate"] == "none" else f" and the gate {settings['pondering_gate']}"
    return (
        f"{start}. The control is that base trained on as it is. The pondering model is the same base converted with "
        f"S = {settings['pondering_steps']} pondering steps{gate}, trained on the same blocks in the same order with "
        "the same settings. This is one seed of a very small model: another seed, size or length of training can come "
        "out differently. The comparison is at equal tokens, not at equal time."
    )


def _result_rows(results):
    losses, rates = results["held_out_loss"], results["tokens_per_second"]
    rows = []
    for key, name in _NAMES.items():
        against = ""
        if key != "control" and losses[key] is not None and losses["control"] is not None:
            against = f"{losses[key] - losses['control']:+.3f}"
        cells = (
            number(losses[key]),
            number(results["bits_per_byte"][key]),
            against,
            f"{rates[key]:,.0f}" if key in rates else "",
        )
        kind = key if key in ("control", "pondering") else "other"
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f'<tr class="{kind}"><td>{html.escape(name)}</td>{numbers}</tr>')
    return "\n".join(rows)


def _passes_explanation(results):
    steps = results["settings"]["pondering_steps"]
    if not steps:
        return "With S = 0 there is one pass, and the pondering model is its backbone."
    return (
        f"The model runs {steps + 1} times before each token; the loss of pass {steps} is the model's loss. Pass 0 "
        "reads nothing but token embeddings, so before training it predicts exactly as the base does. Training looks "
        "at the last pass alone; the earlier ones are free to say something that helps it rather than the next token."
    )


def _pass_rows(results):
    by_model = [results["loss_of_each_pass"][key] for key in ("converted", "pondering")]
    largest = max((loss for losses in by_model for loss in losses if loss is not None), default=1.0)
    rows = []
    for index, losses in enumerate(zip(*by_model, strict=True)):
        cells = "".join(
            f'<td class="number">{number(loss)}</td>'
            f'<td class="bar {kind}"><span style="width: {100 * (loss or 0) / largest:.1f}%"></span></td>'
            for kind, loss in zip(("converted", "trained"), losses, strict=True)
        )
        rows.append(f"<tr><td>{index}</td>{cells}</tr>")
    return "\n".join(rows)


def _sample(sample):
    columns = "".join(
        f"<div><h3>{name}</h3><pre><b>{html.escape(sample['prompt'])}</b>{html.escape(sample[key])}</pre></div>"
        for key, name in (("control", "control"), ("pondering", "pondering model, loaded from its checkpoint"))
    )
    return f'<div class="columns">{columns}</div>'


def _checkpoint_explanation(results):
    checkpoint = results["checkpoint"]
    bits = "with the same bits in every logit" if checkpoint["same_bits"] else "with logits that differ in rounding"
    return (
        "The folder checkpoint/ holds weights, tokenizer, configuration and the code that runs them. Another process, "
        "in which ponder_hf could not be imported, loaded it with AutoModelForCausalLM and trust_remote_code=True. "
        f"There its loss on a batch of held-out text was {number(checkpoint['loss'], 6)}; that of the model that was "
        f"saved is {number(checkpoint['expected_loss'], 6)}, {bits}. The pondering model's samples are from there."
    )


def _method(results):
    share = results["settings"]["share_of_schedule"]
    if share == 1:
        return "The same command with the same seed gives the same numbers on the same machine."
    return (
        f"This machine was too slow, or too busy, for the full schedule: it was cut to 1/{round(1 / share)} to stay "
        "within five minutes. The command below repeats it exactly."
    )


def _settings(results):
    """(name, value) of everything that one needs to judge the numbers or to get them again."""
    settings, text, base = results["settings"], results["text"], results["base"]
    versions, machine = results["versions"], results["machine"]
    rates = f"warm-up over 5 % of the steps to {settings['learning_rate']:g}, then cosine to 10 % of that"
    if base["learning_rate"]:
        rates = f"base: warm-up to {base['learning_rate']:g}, then constant; continued: {rates}"
    return [
        ("text", text["source"]),
        ("training text", f"{text['training_documents']:,} documents, {text['training_tokens']:,} tokens"),
        ("held-out text", f"{text['held_out']}; {text['held_out_tokens']:,} tokens of it, the same every time"),
        ("steps", f"base {settings['base_steps']:,}, then {settings['steps']:,} each"),
        ("batch", f"{settings['batch_size']} blocks of {settings['block_size']} tokens"),
        ("learning rate", rates),
        ("optimiser", "AdamW, betas 0.9 and 0.95, weight decay 0.01, gradients clipped to norm 1, float32"),
        ("seed", settings["seed"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        (
            "machine",
            f"{machine['system']}, {machine['cores']} cores, {settings['threads']} threads, {machine['device']}",
        ),
        ("date", results["date"]),
        ("seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds"].items())),
        ("to repeat", results["repeat"]),
    ]


def _commands(results):
    folder = shlex.quote(str(Path(results["output"], "checkpoint")))
    return "\n".join(
        [
            _generate_command(results["output"]),
            f"ponder-hf export {folder} plain-model      # the backbone without pondering",
            "ponder-hf demo --pondering-gate zero_init   # starts exactly as its base",
            "ponder-hf demo --text YOUR_TEXT.txt         # on text of yours",
        ]
    )


def program() -> str:
    """How the shell that started this finds `ponder-hf`: beside Python, if not on its path (`make demo` in .venv)."""
    beside = Path(sys.executable).with_name("ponder-hf")
    if shutil.which("ponder-hf") is not None or not beside.is_file():
        return "ponder-hf"
    return shlex.quote(os.path.relpath(beside))


def _generate_command(output, program="ponder-hf"):
    return f'{program} generate {shlex.quote(str(Path(output, "checkpoint")))} --prompt "def "'


def _inline(png):
    return base64.b64encode(png).decode("ascii")
