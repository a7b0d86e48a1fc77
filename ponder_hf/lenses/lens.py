"""`ponder_hf.lens`: what a model ponders over one text, as numbers, a frame, a figure and a page."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.conversion import check_tokenizer
from ponder_hf.data.blocks import choose_block_size
from ponder_hf.data.tables import import_optional
from ponder_hf.evaluation.passes import pondering_model_in, ponders
from ponder_hf.modeling import PonderingError, PonderingForCausalLM
from ponder_hf.modeling.configuration_pondering import check_steps
from ponder_hf.modeling.pondering_backbone import evaluating, num_positions
from ponder_hf.modeling.pondering_generate_exits import CRITERIA, PonderingExit

from .interventions import Intervention, intervening
from .measures import MEASURES
from .readings import Readings, read_passes
from .strings import token_strings


if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

# Thresholds that the exits are shown with unless others are asked for.
EXIT_THRESHOLDS = {"kl": 0.03, "entropy": 1.0, "argmax": 0.5}


@dataclass
class Lens:
    """What each pass of a model makes of each token of a text. In a notebook it shows itself as a page.

    Column t of everything is the prediction made at token t, of token t + 1. See `Readings` for what is measured.

    Attributes:
        name: what the model is called.
        token_ids: of the text, and of what the model wrote behind it.
        prompt_tokens: how many of them are the text's.
        strings: the text of every token id that occurs below.
        pondering_steps: S of this look. trained_steps: the model's own; passes beyond were never trained.
        readings: the numbers.
        draft_source: "heads" where the model has trained draft heads, "own" where drafts are what the passes predict.
        exit_thresholds: for each exit criterion the threshold that `stops` are for.
        intervention: the name of what was changed, or None.
    """

    name: str
    token_ids: list[int]
    prompt_tokens: int
    strings: dict[int, str]
    pondering_steps: int
    trained_steps: int
    readings: Readings
    draft_source: str
    exit_thresholds: dict[str, float]
    intervention: str | None = None

    @property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return [self.strings[token_id] for token_id in self.token_ids]

    def measure(self, name: str) -> torch.Tensor:
        """(S + 1, T), one of `MEASURES`.

        Raises:
            PonderingError: there is no such measure.
        """
        if name not in MEASURES:
            raise PonderingError(f"there is no measure {name!r}: the measures are {', '.join(MEASURES)}")
        return getattr(self.readings, name)

    def to_dict(self) -> dict[str, Any]:
        """Everything as a dict that JSON can hold: what is not known is None."""
        tokens, readings = self.tokens, self.readings
        return {
            "source": self.name,
            "pondering_steps": self.pondering_steps,
            "trained_steps": self.trained_steps,
            "intervention": self.intervention,
            "prompt_tokens": self.prompt_tokens,
            "tokens": tokens,
            "token_ids": self.token_ids,
            "next_tokens": [*tokens[1:], None],
            **{name: _finite(self.measure(name), int if name == "rank" else float) for name in MEASURES},
            "top": [
                [self._top(index, place) for place in range(len(tokens))] for index in range(self.pondering_steps + 1)
            ],
            "exits": {
                name: {
                    "threshold": threshold,
                    "stops": readings.stops(name, threshold).tolist(),
                    "distance": _finite(readings.distances[name]),
                }
                for name, threshold in self.exit_thresholds.items()
            },
            "drafts": {
                "from": self.draft_source,
                "tokens": [[self.strings[token_id] for token_id in row] for row in readings.drafts.tolist()],
            },
        }

    def to_frame(self) -> "pandas.DataFrame":
        """One row for each pass of each token, as a pandas DataFrame; what is not known is NaN.

        Raises:
            PonderingError: pandas is not installed.
        """
        pandas = import_optional("pandas", "for to_frame()", extra="viz")
        tokens, readings = self.tokens, self.readings
        rows = []
        for index in range(self.pondering_steps + 1):
            for place, token in enumerate(tokens):
                rows.append(
                    {
                        "position": place,
                        "token": token,
                        "next_token": tokens[place + 1] if place + 1 < len(tokens) else None,
                        "pass": index,
                        "predicted": self.strings[int(readings.top_ids[index, place, 0])],
                        **{name: self.measure(name)[index, place].item() for name in MEASURES},
                        **{f"exit_{name}": readings.distances[name][index, place].item() for name in CRITERIA},
                    }
                )
        return pandas.DataFrame(rows)

    def to_html(self, *others: "Lens", title: str | None = None) -> str:
        """One self-contained page: no network, nothing beside it.

        Args:
            others: one more model to put beside this one.
            title: of the page.

        Raises:
            PonderingError: there are more than two.
        """
        from .page import page

        return page([self, *others], title)

    def figure(self, measures: Sequence[str] = tuple(MEASURES)) -> "Figure":
        """Heat maps of passes by tokens, one for each measure, as a figure of matplotlib.

        Args:
            measures: which of `MEASURES`.

        Raises:
            PonderingError: there is no such measure, there are more than 400 tokens, or matplotlib is not installed.
        """
        import_optional("matplotlib", "for figures", extra="viz")
        from .figure import heat_maps

        return heat_maps(self, measures)

    def _repr_html_(self) -> str:
        from .page import frame

        return frame(self.to_html())

    def __repr__(self) -> str:
        changed = f", {self.intervention}" if self.intervention else ""
        return f"Lens({self.name!r}: {len(self.token_ids)} tokens, {self.pondering_steps + 1} passes{changed})"

    def _top(self, index: int, place: int) -> list[dict[str, Any]]:
        pairs = zip(self.readings.top_ids[index, place], self.readings.top_probabilities[index, place], strict=True)
        return [
            {"token": self.strings[int(token_id)], "id": int(token_id), "probability": float(probability)}
            for token_id, probability in pairs
        ]


def lens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    pondering_steps: int | None = None,
    max_tokens: int | None = None,
    max_new_tokens: int = 0,
    top_tokens: int = 10,
    exit_thresholds: dict[str, float] | None = None,
    intervention: Intervention | Sequence[Intervention] | None = None,
    name: str | None = None,
) -> Lens:
    """Look at what each pass of a model makes of each token of a text.

    For every token and pass: the most probable next tokens, probability and rank of the one that came, entropy,
    divergence from the last pass, share of pondering in the input, how far each exit criterion is from stopping, and
    what the model would draft. One forward pass; never more logits live than those of a few tokens of a few passes.

    Args:
        model: a pondering model, loaded by ponder_hf or with `trust_remote_code=True`, also wrapped by PEFT; or a
            plain causal language model, which has one pass.
        tokenizer: the model's; adds to the text what it always adds.
        text: what to look at.
        pondering_steps: S in place of the model's own. Passes beyond those were never trained.
        max_tokens: look at the first so many tokens of the text only. None: a longer text than the model has
            positions, or than 2048 tokens, is refused.
        max_new_tokens: have the model go on writing so many tokens, greedily, and look at those as well.
        top_tokens: how many of the most probable tokens are kept of each pass.
        exit_thresholds: for exit criteria ("kl", "entropy", "argmax") other thresholds than 0.03, 1.0 and 0.5.
        intervention: one or several changes of what it ponders, from `ponder_hf.lenses.interventions`.
        name: what to call the model; None: its name or path.

    Returns:
        A Lens, with `to_frame()`, `to_dict()`, `to_html()` and `figure()`.

    Raises:
        PonderingError: something of the above cannot be used.
    """
    if pondering_steps is not None:
        check_steps("pondering_steps", pondering_steps)
    for argument, value, least in (("max_new_tokens", max_new_tokens, 0), ("top_tokens", top_tokens, 1)):
        if value < least:
            raise PonderingError(f"`{argument}` must be at least {least}, got {value}")
    if max_tokens is not None and max_tokens < 1:
        raise PonderingError(f"`max_tokens` must be at least 1, got {max_tokens}")
    thresholds = {**EXIT_THRESHOLDS, **(exit_thresholds or {})}
    for criterion, threshold in thresholds.items():
        PonderingExit.read(criterion, threshold)
    name = name or model.name_or_path or type(model).__name__
    check_tokenizer(tokenizer, model.config, name)
    if not ponders(model):
        if pondering_steps:
            raise PonderingError("`pondering_steps` is for pondering models, and this is a plain one: leave it out")
        model = PonderingForCausalLM.from_base(model, pondering_steps=0)
    own = model.config.pondering_steps
    ids = _token_ids(model, tokenizer, text, max_tokens, max_new_tokens)
    written = _continued(model, ids, max_new_tokens, pondering_steps, intervention) if max_new_tokens else ids
    readings = read_passes(model, written, pondering_steps, top_tokens, intervention)
    shown = torch.cat([written.cpu(), readings.top_ids.flatten(), readings.drafts.flatten()]).unique().tolist()
    return Lens(
        name=name,
        token_ids=written.tolist(),
        prompt_tokens=len(ids),
        strings=token_strings(tokenizer, shown),
        pondering_steps=len(readings.entropy) - 1,
        trained_steps=own,
        readings=readings,
        draft_source="own" if getattr(pondering_model_in(model), "draft_heads", None) is None else "heads",
        exit_thresholds=thresholds,
        intervention=_name_of(intervention),
    )


def _token_ids(model, tokenizer, text, max_tokens, max_new_tokens):
    """(T,), the tokens of the text, where the model has positions for them and for what it is to write."""
    ids = tokenizer(text, verbose=False)["input_ids"][:max_tokens]
    if not ids:
        raise PonderingError("the text is empty to this tokenizer: give a longer one")
    most = choose_block_size(None, model.config)
    if max_tokens is None and len(ids) > most:
        raise PonderingError(
            f"the text has {len(ids):,} tokens, and a lens looks at {most:,} by itself: give `max_tokens` to look at "
            "its beginning"
        )
    positions = num_positions(pondering_model_in(model).backbone)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise PonderingError(
            f"{len(ids) + max_new_tokens:,} tokens are more than the {positions:,} positions of the model: lower "
            "`max_tokens` or `max_new_tokens`"
        )
    return torch.tensor(ids, device=model.device)


def _continued(model, ids, max_new_tokens, pondering_steps, intervention):
    """The tokens with what the model writes behind them, as one row."""
    with nullcontext() if intervention is None else intervening(model, intervention), evaluating(model):
        return model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pondering_steps=pondering_steps,
            pad_token_id=int(ids[0]),  # of one row there is nothing to pad; naming one keeps generate from looking
        )[0]


def _name_of(intervention):
    if intervention is None:
        return None
    return ", ".join(
        each.name for each in ([intervention] if isinstance(intervention, Intervention) else intervention)
    )


def _finite(matrix: torch.Tensor, kind: type = float) -> list[list[float | None]]:
    return [[kind(value) if math.isfinite(value) else None for value in row] for row in matrix.tolist()]
