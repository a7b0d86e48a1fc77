"""What the demo tells people: the report in HTML and the summary for the terminal, both from the results alone."""

import html
import math
import os
import shlex
import shutil
import sys
from pathlib import Path
from string import Template
from typing import Any

from .figure import draw_svg
from .words import NAMES, findings, headline


_TEMPLATE = Path(__file__).with_name("report.html")


def summary(results: dict[str, Any]) -> str:
    """The results for a terminal, without colours."""
    rows = [("", "lowest loss", "at the end", "arithmetic", "tokens/s")]
    for key, name in _trained(results):
        losses = (results["lowest_loss"][key], results["held_out_loss"][key])
        price = f"x {results['arithmetic'][key]:.1f}"
        rows.append((name, *map(number, losses), price, f"{results['tokens_per_second'][key]:,.0f}"))
    passes = "  ".join(number(loss) for loss in results["loss_of_each_pass"]["pondering"])
    output = results["output"]
    return "\n".join(
        [
            "",
            *(f"{name:<38}{lowest:>13}{end:>13}{price:>12}{rate:>10}" for name, lowest, end, price, rate in rows),
            "",
            f"Loss of each pass of the pondering model: {passes}",
            "",
            f"{headline(results)}.",
            *findings(results),
            "",
            f"Report: {Path(output, 'report.html')}",
            f"Next:   {_generate_command(output, program())}",
        ]
    )


def write_report(results: dict[str, Any]) -> str:
    """The report as one HTML page that needs no other file."""
    fields = {
        "headline": headline(results),
        "caveat": _caveat(results),
        "table_explanation": _table_explanation(results),
        "passes_explanation": _passes_explanation(results),
        "passage_explanation": _passage_explanation(results),
        "drafts": _drafts(results),
        "samples_explanation": _samples_explanation(results),
        "checkpoint_explanation": _checkpoint_explanation(results),
        "method": _method(results),
        "commands": _commands(results),
    }
    fields = {name: html.escape(text) for name, text in fields.items()}
    parts = {
        "findings": "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(results)),
        "result_rows": _result_rows(results),
        "against_tokens": draw_svg(results, "tokens"),
        "against_operations": draw_svg(results, "operations"),
        "pass_rows": _pass_rows(results),
        "passages": _passages(results),
        "samples": "\n".join(_sample(sample) for sample in results["samples"]),
        "setting_rows": "\n".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in _settings(results)
        ),
    }
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(fields, **parts)


def number(value: float | None, digits: int = 3) -> str:
    """A loss for people; None stands for a number that JSON does not have."""
    return "not a number" if value is None else f"{value:.{digits}f}"


def _trained(results):
    return [(key, name) for key, name in NAMES.items() if key in results["lowest_loss"]]


def _caveat(results):
    base, settings = results["base"], results["settings"]
    made = f", trained on {base['tokens']:,} tokens" if base["tokens"] else ""
    gate = "" if settings["pondering_gate"] == "none" else f" and the gate {settings['pondering_gate']}"
    left_out = [NAMES[name] for name in results["left_out"]]
    late = f" Left out, as the machine became too busy: {'; '.join(left_out)}." if left_out else ""
    return (
        f"The base is a {base['model_type']} model with {base['parameters']:,} parameters, {base['name']}{made}; the "
        f"pondering model is that base converted with S = {settings['pondering_steps']} pondering steps{gate}. One "
        f"seed of one small model: another seed, size, text or length of training can come out differently.{late}"
    )


def _result_rows(results):
    losses = results["lowest_loss"]
    rows = []
    for key, name in _trained(results):
        against = ""
        if key != "control" and None not in (losses[key], losses["control"]):
            against = f"{losses[key] - losses['control']:+.3f}"
        cells = [
            ("number", f"&times; {results['arithmetic'][key]:.1f}"),
            ("number", number(losses[key])),
            ("number wide", against),
            ("number wide", number(results["held_out_loss"][key])),
            ("number wide", number(results["bits_per_byte"][key])),
        ]
        size = f"{results['parameters'][key]:,} parameters, {results['tokens'][key]:,} tokens"
        first = f'<td class="{key}">{html.escape(name)}<small>{size}</small></td>'
        numbers = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in cells)
        rows.append(f'<tr class="{key}">{first}{numbers}</tr>')
    return "\n".join(rows)


def _table_explanation(results):
    base, text = number(results["held_out_loss"]["base"]), results["text"]
    more = "" if text["more_tokens"] is None else f" Fresh text is other {text['more_tokens']:,} tokens of it."
    return (
        f"Losses are on held-out text, in {results['unit']}, the lowest of all evaluations on the way: where one "
        f"would have stopped. The base had {base} before it was trained on. All begin with that base, but for the one "
        "of twice the layers, which had a base of its own on the same tokens. The text is "
        f"{text['tokens']:,} tokens of {text['source']}.{more} Arithmetic is that of training on, by the weights that "
        "a token is multiplied with; bits per byte are those at the end."
    )


def _passes_explanation(results):
    steps = results["settings"]["pondering_steps"]
    if not steps:
        return "With S = 0 there is one pass, and the pondering model is its backbone."
    return (
        f"The model runs {steps + 1} times before each token; the loss of pass {steps} is the model's loss. Training "
        "looks at the last pass alone; the earlier ones are free to say something that helps it rather than the next "
        "token."
    )


def _pass_rows(results):
    by_model = [results["loss_of_each_pass"][key] for key in ("converted", "pondering")]
    largest = max((loss for loss in by_model[1] if loss is not None), default=1.0)
    return "\n".join(
        f'<tr><td>{index}</td><td class="number">{number(converted)}</td><td class="number">{number(trained)}</td>'
        f'<td class="bar"><span style="width: {100 * (trained or 0) / largest:.1f}%"></span></td></tr>'
        for index, (converted, trained) in enumerate(zip(*by_model, strict=True))
    )


def _passage_explanation(results):
    if results["passage"] is None:
        return "Nothing to be seen: training diverged."
    return (
        "A piece of held-out text: the stronger the colour behind a token, the more probable did this pass find it "
        "after what stands before it; the number is its loss on this piece. lens.html beside this page shows more of "
        "it, and what the control makes of it."
    )


def _passages(results):
    if results["passage"] is None:
        return ""
    tokens, by_pass = results["passage"]["tokens"], results["passage"]["probabilities"]
    parts = []
    for index, probabilities in enumerate(by_pass):
        spans = "".join(
            f'<span style="background: rgba(var(--pondering-rgb), {0.8 * probability:.2f})">'
            f"{html.escape(token)}</span>"
            for token, probability in zip(tokens[1:], probabilities, strict=True)
        )
        loss = -sum(math.log(max(each, 1e-30)) for each in probabilities) / len(probabilities)
        title = f"<h3>pass {index}, {number(loss)} here</h3>"
        parts.append(f'{title}<div class="passage">{html.escape(tokens[0])}{spans}</div>')
    return "\n".join([*parts, '<p><a href="lens.html">A closer look</a></p>'])


def _drafts(results):
    drafts = results["drafts"]
    if drafts is None:
        return "Nothing was drafted."
    speed = drafts["speed"]
    pace = f"{speed:.1f} times as fast" if speed >= 1 else f"slower, at {speed:.1f} times the speed"
    same = "the same text" if drafts["same_text"] else "another text, which it should not,"
    return (
        f"Generated with num_draft_tokens={drafts['num_draft_tokens']} the pondering model wrote {pace} as without "
        f"drafts ({1000 * drafts['drafted_seconds']:.1f} ms for a token in place of "
        f"{1000 * drafts['plain_seconds']:.1f} ms, in turns in one process), and greedily gave {same} in both ways."
    )


def _samples_explanation(results):
    if not results["samples"]:
        return "No samples: training diverged."
    return (
        "Both models continue the same prompts, sampled at temperature 0.8 with the same seed. Models as small as the "
        "demo's own write text that only looks right from afar."
    )


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
        f"This machine was too slow, or too busy, for the full schedule: {share:.0%} of its steps were taken, to stay "
        " within five minutes. The command below repeats it exactly."
    )


def _settings(results):
    """(name, value) of everything that one needs to judge the numbers or to get them again."""
    settings, text, base = results["settings"], results["text"], results["base"]
    versions, machine = results["versions"], results["machine"]
    rates = f"warm-up over 5 % of the steps to {settings['learning_rate']:g}, then cosine to 10 % of that"
    if base["learning_rate"]:
        rates = f"base: warm-up to {base['learning_rate']:g}, then constant; after that: {rates}"
    return [
        ("text", f"{text['tokens']:,} tokens of {text['source']}"),
        ("held-out text", f"{text['held_out']}; {text['held_out_tokens']:,} tokens of it, the same every time"),
        (
            "steps",
            f"base {settings['base_steps']:,}, then {settings['steps']:,} each, or {settings['longer_steps']:,} for "
            "the same arithmetic",
        ),
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
            "ponder-hf demo --text YOUR_TEXT.txt         # on text of yours",
            "ponder-hf demo --text-blocks 10000          # where text is not scarce",
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
