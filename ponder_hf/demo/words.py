"""What came out, in sentences that follow from the numbers, and always with the price."""

from typing import Any


NAMES = {
    "control": "plain, same tokens (control)",
    "pondering": "pondering, same tokens",
    "longer": "plain, same arithmetic",
    "deeper": "plain, twice the layers, same tokens",
    "more_text": "plain, fresh text",
}
_EQUAL = 0.0005  # what three digits do not show


def headline(results: dict[str, Any]) -> str:
    """The outcome and its price in one sentence."""
    if results["loss_difference"] is None:
        return "Training diverged"
    losses, price = results["lowest_loss"], f"for {_times(results['arithmetic']['pondering'])} the arithmetic"
    control, pondering = losses["control"], losses["pondering"]
    if _same(control, pondering):
        return f"Pondering made no difference, {price}"
    if pondering < control:
        return f"Pondering lowered the loss from {control:.3f} to {pondering:.3f}, {price}"
    return f"Pondering did not lower the loss: {pondering:.3f} against {control:.3f}, {price}"


def findings(results: dict[str, Any]) -> list[str]:
    """One sentence for each comparison: the same tokens first, then what else the price would have bought."""
    if results["loss_difference"] is None:
        return ["A loss is not a number any more: training diverged. A lower --learning-rate may help."]
    comparisons = [_same_tokens, _same_arithmetic, _twice_the_layers, _more_text]
    return [sentence for compare in comparisons if (sentence := compare(results)) is not None]


def _same_tokens(results):
    losses, text = results["lowest_loss"], results["text"]
    return (
        f"On the same text of {text['tokens']:,} tokens, read {text['times_seen']:.1f} times, the pondering model "
        f"came to a held-out loss of {losses['pondering']:.3f} {results['unit']} and the plain control to "
        f"{losses['control']:.3f}: {_against(losses['pondering'], losses['control'])} with pondering, whose training "
        f"took {_times(results['tokens_per_second']['ratio'])} the time per token."
    )


def _same_arithmetic(results):
    losses = results["lowest_loss"]
    if losses.get("longer") is None:
        return None
    longer, pondering = losses["longer"], losses["pondering"]
    sentence = (
        f"As much arithmetic spent on more passes over this text brought the plain model to {longer:.3f} at best"
    )
    if _same(longer, pondering):
        return f"{sentence}, as pondering did."
    better = "pondering" if pondering < longer else "that"
    return f"{sentence}, {_against(longer, pondering)} than pondering: {better} was the better use of it."


def _twice_the_layers(results):
    losses = results["lowest_loss"]
    if losses.get("deeper") is None:
        return None
    deeper, pondering, control = losses["deeper"], losses["pondering"], losses["control"]
    parameters = results["parameters"]["deeper"] / results["parameters"]["control"]
    price = f"{_times(parameters)} the parameters and {_times(results['arithmetic']['deeper'])} the arithmetic"
    sentence = f"A plain model of twice the layers, with {price} of the control, came to {deeper:.3f} on the same text"
    if pondering < control and deeper < control and not _same(control, deeper):
        return f"{sentence}: pondering was worth {(control - pondering) / (control - deeper):.0%} of that gain."
    if _same(deeper, pondering):
        return f"{sentence}, as pondering did."
    return f"{sentence}, {_against(deeper, pondering)} than pondering."


def _more_text(results):
    losses = results["lowest_loss"]
    if losses.get("more_text") is None:
        return None
    more, pondering = losses["more_text"], losses["pondering"]
    sentence = (
        "Reading fresh text in place of the same again brought the plain model, for "
        f"{_times(results['arithmetic']['more_text'])} the arithmetic of the control, to {more:.3f}"
    )
    if more < pondering and not _same(more, pondering):
        return (
            f"{sentence}, {_against(more, pondering)} than pondering: where there is more text, train on that first."
        )
    return f"{sentence}, not better than pondering."


def _same(first, second):
    return abs(first - second) < _EQUAL


def _against(first, second):
    if _same(first, second):
        return "no difference"
    return f"{abs(first - second):.3f} {'less' if first < second else 'more'}"


def _times(ratio):
    return f"{ratio:.1f} times"
