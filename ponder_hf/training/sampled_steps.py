"""How often the model ponders in a training step, where that is not the same in every step."""

import math
import random
from collections.abc import Sequence

from ponder_hf.modeling import PonderingConfig, PonderingError


GROWING = "growing"
Rule = str | Sequence[float]


def read_rule(words: Sequence[str]) -> str | list[float]:
    """The rule that words of a command line mean: growing, or numbers, as in 0 1 1 8."""
    if list(words) == [GROWING]:
        return GROWING
    try:
        return [float(word) for word in words]
    except ValueError:
        raise PonderingError(f"`sampled_steps` must be {_CHOICES}, got {' '.join(words)}") from None


def check_rule(rule: Rule) -> None:
    """Raise a PonderingError for what no model could follow."""
    if rule == GROWING:
        return
    is_number = [isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in rule]
    if isinstance(rule, str) or not all(is_number):
        raise PonderingError(f"`sampled_steps` must be {_CHOICES}, got {rule!r}")
    if not all(0 <= weight < math.inf for weight in rule) or not sum(rule):
        raise PonderingError(
            f"the weights of `sampled_steps` must be finite and >= 0, one of them > 0, got {describe(rule)}"
        )


def check_rule_of_model(rule: Rule, config: PonderingConfig) -> None:
    """Raise a PonderingError where a model with this configuration cannot follow the rule.

    Args:
        rule: "growing", or the weights of S = 0, 1, ...
        config: a PonderingConfig.
    """
    check_rule(rule)
    most = config.pondering_steps
    if most == 0:
        raise PonderingError("`sampled_steps` is for a model that ponders; this one has S = 0: leave it out")
    if rule == GROWING:
        return
    if len(rule) != most + 1:
        raise PonderingError(
            f"`sampled_steps` has the weights of S = 0 .. {len(rule) - 1}, and the model has S = {most}: "
            f"give {most + 1} weights"
        )
    if rule[0] and config.pondering_gate != "none":
        raise PonderingError(
            "`sampled_steps` draws S = 0, where the gate learns nothing and has no gradient: give S = 0 the "
            "weight 0, or make the model without a gate"
        )


def steps_at(rule: Rule, most: int, seed: int, step: int, num_steps: int) -> int:
    """S of a training step. It follows from its arguments alone, so all processes have the same, and a resumed run.

    Args:
        rule: "growing": 1, 2, ... `most`, each for as many steps; or the weights of S = 0, 1, ... to draw by.
        most: the model's own S.
        seed: of the run.
        step: from 0 on.
        num_steps: of the whole run.
    """
    if isinstance(rule, str):
        return min(most, 1 + step * most // max(1, num_steps))
    return random.Random(f"{seed} {step}").choices(range(most + 1), rule)[0]


def describe(rule: Rule) -> str:
    """The rule as it is written on a command line."""
    return rule if isinstance(rule, str) else " ".join(f"{weight:g}" for weight in rule)


_CHOICES = f'"{GROWING}" or the weights of S = 0, 1, ...'
