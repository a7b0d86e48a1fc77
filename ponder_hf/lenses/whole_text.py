"""What pondering does over a whole text: which tokens gain and lose by it, how thoughts change, how sure they are.

Every figure has a standard error over blocks of the text, as in docs/evaluation.md: the passes read the same tokens,
so a difference of two passes is measured token by token, and is more certain than the passes themselves.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.data import load_blocks
from ponder_hf.data.blocks import choose_block_size
from ponder_hf.data.sources import Names, as_list, find_sources, usual_split
from ponder_hf.data.tables import import_optional
from ponder_hf.evaluation.load import load_for_evaluation, warn_of_untrained
from ponder_hf.evaluation.passes import PassStatistics, PassSums, check_finite, ratio
from ponder_hf.evaluation.text import measure_batches
from ponder_hf.modeling.configuration_pondering import check_steps

from .strings import token_strings


if TYPE_CHECKING:
    from matplotlib.figure import Figure

Z = 1.96  # standard errors on each side of an interval of 95 %
# What tokens are grouped by, and what it is called.
GROUPS = {
    "frequency": "How often the token occurs in this text",
    "position": "Tokens before it in its block",
    "kind": "What the token is",
    "entropy": "How unsure pass 0 is before it",
}
OVER_ALL = {
    "kept": "right in every pass",
    "never": "right in none",
    "gained": "wrong in pass 0, right in the last",
    "lost": "right in pass 0, wrong in the last",
    "lost_and_back": "right, then wrong, then right again",
    "found_and_lost": "wrong, then right, then wrong again",
}
_FIFTHS, _BINS = 5, 10
_MOST_CHANGED, _FEWEST = 12, 5  # tokens that are listed, and how often each of them must occur


class TextLens:
    """What each pass predicts of a whole text, taken apart. In a notebook it shows itself as a page."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def to_dict(self) -> dict[str, Any]:
        """Everything, as `lens_text` describes it; JSON can hold it."""
        return self.content

    def to_html(self, title: str | None = None) -> str:
        """One self-contained page with tables and plots.

        Args:
            title: of the page.
        """
        from .text_page import text_page

        return text_page(self.content, title)

    def figure(self) -> "Figure":
        """The plots, as a figure of matplotlib.

        Raises:
            PonderingError: matplotlib is not installed.
        """
        import_optional("matplotlib", "for figures", extra="viz")
        from .text_figure import text_plots

        return text_plots(self.content)

    def _repr_html_(self) -> str:
        from .page import frame

        return frame(self.to_html())

    def __repr__(self) -> str:
        content = self.content
        return f"TextLens({content['source']!r}: {content['tokens']} tokens, {len(content['passes'])} passes)"


def lens_text(
    model: str | os.PathLike | PreTrainedModel,
    data: Names,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    text_field: str = "text",
    data_name: str | None = None,
    split: str | None = None,
    block_size: int | None = None,
    max_blocks: int | None = None,
    pondering_steps: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> TextLens:
    """Look at what pondering does over a whole text, in blocks as `ponder_hf.evaluate_text` reads them.

    A few numbers of every token and pass are kept until the end, about 20 bytes: `max_blocks` bounds them.

    Args:
        model, data, tokenizer, text_field, data_name, split, block_size, max_blocks, dtype, device, revision: as in
            `ponder_hf.evaluate_text`.
        pondering_steps: S, in place of the model's own.
        progress: whether bars on standard error show how far it is.

    Returns:
        A TextLens, whose `to_dict()` has, with a standard error beside each figure (`NAME_stderr`, over blocks; None
        of a single block):
        `gain`: the loss of pass 0 less that of the last one, in nats per token.
        `passes`: for each pass `loss`, `accuracy`, `agreement` with the last pass, `confidence` (mean probability
        of the most probable token), `calibration_error` (mean distance of confidence and accuracy over ten bins).
        `groups`: of the tokens that come, by `frequency` in this text, `position` in the block, `kind` (start or
        inside of a word, digits, ...) and `entropy` of pass 0: `loss_before` (pass 0), `loss_after` (last pass),
        `gain` (before - after, nats), `accuracy_before`, `accuracy_after`, `share` of all tokens.
        `changes`: shares of all tokens. `steps`: what was right and became wrong (`lost`), wrong and became right
        (`won`) from each pass to the next. `over_all`: right in every pass (`kept`), never right, right in the last
        pass only after a wrong first one (`gained`), the other way round (`lost`), right, wrong and right again
        (`lost_and_back`), wrong, right and wrong again (`found_and_lost`).
        `agreement`: for each two passes the share of the same predictions. `calibration`: for each pass ten bins.
        `most_changed`: the tokens that gain and lose most in sum.

    Raises:
        PonderingError: the model, the tokenizer or the data cannot be used, or a loss is no finite number.
    """
    if pondering_steps is not None:
        check_steps("pondering_steps", pondering_steps)
    split = split or usual_split(data)
    find_sources(data, data_name, split, streaming=True)  # a wrong name, before a model is loaded
    loaded = load_for_evaluation(
        model, tokenizer=tokenizer, dtype=dtype, device=device, revision=revision, pondering_steps=pondering_steps
    )
    warn_of_untrained(pondering_steps, loaded)
    blocks: Any = load_blocks(
        data,
        loaded.tokenizer,
        choose_block_size(block_size, loaded.model.config),
        text_field=text_field,
        name=data_name,
        split=split,
        max_blocks=max_blocks,
        vocab_size=loaded.model.config.vocab_size,
        progress=progress,
    )
    batches = measure_batches(loaded.model, blocks, pondering_steps, entropies=True, progress=progress)
    measured = _Measured(list(map(_small, batches)))
    check_finite(measured.losses, loaded.name)
    strings = token_strings(loaded.tokenizer, measured.targets.unique().tolist())
    return TextLens(
        {
            "source": loaded.name,
            "revision": loaded.revision,
            "data": as_list(data),
            "pondering_steps": len(measured.losses) - 1,
            "trained_steps": loaded.pondering_steps,
            "blocks": len(blocks),
            "block_size": blocks.rows.shape[1],
            "tokens": measured.targets.numel(),
            **taken_apart(measured, strings),
        }
    )


def _small(batch: PassStatistics) -> tuple[torch.Tensor, ...]:
    """What is kept of a batch: losses, predictions, confidences (S + 1, B, T - 1), targets, entropies (B, T - 1)."""
    entropies: Any = batch.entropies
    confidences: Any = batch.confidences
    kept = (batch.losses.float(), batch.predictions.int(), confidences.float(), batch.targets, entropies[0].float())
    return tuple(each[..., :-1].cpu() for each in kept)  # the last token of a block predicts nothing


class _Measured:
    """All batches as one: (S + 1, N, T - 1), (N, T - 1)."""

    def __init__(self, parts: list[tuple[torch.Tensor, ...]]) -> None:
        found = [torch.cat(each, -2) for each in zip(*parts, strict=True)]
        self.losses, self.predictions, self.confidences, self.targets, self.entropies = found
        self.is_right = self.predictions == self.targets

    def ratio(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[float, float | None]:
        """The mean of values (N, T - 1) over the tokens of a mask, and its standard error over blocks."""
        mask = torch.ones_like(self.targets, dtype=torch.bool) if mask is None else mask
        return ratio((values.double() * mask).sum(-1), mask.sum(-1).double())


def taken_apart(measured: Any, strings: dict[int, str]) -> dict[str, Any]:
    """The figures of `lens_text` that are computed from the tokens.

    Args:
        measured: `losses`, `predictions`, `confidences`, `is_right` (S + 1, N, T - 1), `targets`, `entropies` of
            pass 0 (N, T - 1), and `ratio`.
        strings: the text of each target.
    """
    calibration = [_calibration(measured, index) for index in range(len(measured.losses))]
    return {
        **_named("gain", measured.ratio(measured.losses[0] - measured.losses[-1])),
        "passes": [
            {**figures, **_named("confidence", measured.ratio(measured.confidences[index])), **error}
            for index, (figures, (_, error)) in enumerate(zip(_passes(measured), calibration, strict=True))
        ],
        "groups": {
            name: [_group(measured, label, mask) for label, mask in groups]
            for name, groups in (
                ("frequency", _by_frequency(measured.targets)),
                ("position", _by_position(measured.targets)),
                ("kind", _by_kind(measured.targets, strings)),
                ("entropy", _by_entropy(measured.entropies)),
            )
        },
        "changes": _changes(measured),
        "agreement": [
            [measured.ratio(one == other)[0] for other in measured.predictions] for one in measured.predictions
        ],
        "calibration": [bins for bins, _ in calibration],
        "most_changed": _most_changed(measured, strings),
    }


def _named(name: str, found: tuple[float, float | None]) -> dict[str, float | None]:
    return {name: found[0], f"{name}_stderr": found[1]}


def _passes(measured):
    sums = PassSums(
        losses=measured.losses.double().sum(-1),
        hits=measured.is_right.double().sum(-1),
        agreements=(measured.predictions == measured.predictions[-1]).double().sum(-1),
        tokens=torch.full((measured.targets.shape[0],), float(measured.targets.shape[1]), dtype=torch.float64),
    )
    wanted = ("loss", "accuracy", "agreement")
    return [{name: each[name] for word in wanted for name in (word, f"{word}_stderr")} for each in sums.figures()]


def _group(measured, label, mask):
    first, last = measured.losses[0], measured.losses[-1]
    return {
        "label": label,
        "tokens": int(mask.sum()),
        "share": mask.double().mean().item(),
        **_named("loss_before", measured.ratio(first, mask)),
        **_named("loss_after", measured.ratio(last, mask)),
        **_named("gain", measured.ratio(first - last, mask)),
        **_named("accuracy_before", measured.ratio(measured.is_right[0], mask)),
        **_named("accuracy_after", measured.ratio(measured.is_right[-1], mask)),
    }


# Groups of tokens: pairs of a label and a mask (N, T - 1). Together they are all tokens, and none is empty.
Groups = Iterator[tuple[str, torch.Tensor]]


def _by_frequency(targets: torch.Tensor) -> Groups:
    """Fifths of the text: of its most frequent tokens, ..., of its rarest. A token is in one of them always."""
    _, places, counts = targets.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    before = torch.empty_like(counts)
    before[order] = counts[order].cumsum(0) - counts[order]
    fifths = (before * _FIFTHS // counts.sum()).clamp(max=_FIFTHS - 1)
    for fifth in range(_FIFTHS):
        own = counts[fifths == fifth]
        if len(own):
            yield _range(own.min().item(), own.max().item(), "time", "times"), (fifths == fifth)[places]


def _by_position(targets: torch.Tensor) -> Groups:
    """By how many tokens of context there are."""
    context = torch.arange(1, targets.shape[-1] + 1).expand_as(targets)
    low, high = 1, 7
    while low <= targets.shape[-1]:
        last = min(high, targets.shape[-1])
        yield _range(low, last, "token", "tokens"), (context >= low) & (context <= last)
        low, high = high + 1, 2 * high + 1


def _by_kind(targets: torch.Tensor, strings: dict[int, str]) -> Groups:
    """By what a token is, and whether it begins a word: behind white space or behind what is no part of a word."""
    has_spaces = any(text[:1].isspace() for text in strings.values())
    kinds = {token_id: _kind(text) for token_id, text in strings.items()}
    names = ("white space", "letters", "digits", "punctuation and others")
    code = {token_id: names.index(kind) for token_id, kind in kinds.items()}
    size = max(strings) + 1
    codes, begins, ends = torch.zeros(size, dtype=torch.int), *(torch.zeros(size, dtype=torch.bool) for _ in range(2))
    for token_id, text in strings.items():
        codes[token_id] = code[token_id]
        begins[token_id] = text[:1].isspace() or not has_spaces
        ends[token_id] = not (text[-1:].isalnum() or text[-1:] in ("'", "\N{RIGHT SINGLE QUOTATION MARK}"))
    of_targets = codes[targets]
    is_start = begins[targets]
    is_start[:, 1:] |= ends[targets[:, :-1]]
    masks = (
        ("start of a word", (of_targets == 1) & is_start),
        ("inside of a word", (of_targets == 1) & ~is_start),
        *((name, of_targets == names.index(name)) for name in names if name != "letters"),
    )
    yield from ((label, mask) for label, mask in masks if mask.any())


def _kind(text):
    inner = text.strip()
    if not inner:
        return "white space"
    return "letters" if inner[0].isalpha() else "digits" if inner[0].isdigit() else "punctuation and others"


def _by_entropy(entropies: torch.Tensor) -> Groups:
    """Fifths: from the tokens before which pass 0 was surest to those where it was least sure."""
    ordered = entropies.flatten().sort().values
    ends = [ordered[min(len(ordered) - 1, len(ordered) * fifth // _FIFTHS)].item() for fifth in range(1, _FIFTHS)]
    fifths = torch.bucketize(entropies, torch.tensor(ends), right=True)
    for fifth in range(_FIFTHS):
        mask = fifths == fifth
        if mask.any():
            own = entropies[mask]
            yield f"{own.min():.2f} to {own.max():.2f} nats", mask


def _range(low: int, high: int, one: str, many: str) -> str:
    return f"{low:,} {one if low == 1 else many}" if low == high else f"{low:,} to {high:,} {many}"


def _changes(measured: Any) -> dict[str, Any]:
    right = measured.is_right
    steps = []
    for index, (before, after) in enumerate(itertools.pairwise(right)):
        found = {"lost": before & ~after, "won": ~before & after}
        figures: dict[str, Any] = {"step": index}
        for name, mask in found.items():
            figures |= _named(name, measured.ratio(mask))
        steps.append(figures)
    over_all = {
        "kept": right.all(0),
        "never": ~right.any(0),
        "gained": ~right[0] & right[-1],
        "lost": right[0] & ~right[-1],
        "lost_and_back": _in_turn(right, (True, False, True)),
        "found_and_lost": _in_turn(right, (False, True, False)),
    }
    shares: dict[str, Any] = {}
    for name, mask in over_all.items():
        shares |= _named(name, measured.ratio(mask))
    return {"steps": steps, "over_all": shares}


def _in_turn(right: torch.Tensor, pattern: Sequence[bool]) -> torch.Tensor:
    """(N, T - 1): where the passes were right, wrong, ... in this order, others between them or not."""
    reached = torch.zeros(right.shape[1:], dtype=torch.int)
    wanted = torch.tensor([*pattern, False])
    for each in right:
        reached += (reached < len(pattern)) & (each == wanted[reached.long()])
    return reached == len(pattern)


def _calibration(measured: Any, index: int) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Ten bins of confidence, and the expected calibration error with its standard error by leaving out each block."""
    confidences, right = measured.confidences[index].double(), measured.is_right[index].double()
    places = (confidences * _BINS).long().clamp(max=_BINS - 1)
    masks = torch.stack([places == each for each in range(_BINS)])  # (bins, N, T - 1)
    counts, hits, sure = (
        (masks * each).sum(-1) for each in (torch.ones_like(right), right, confidences)
    )  # (bins, N) each
    bins = []
    for each in range(_BINS):
        if counts[each].any():
            bins.append(
                {
                    "low": each / _BINS,
                    "high": (each + 1) / _BINS,
                    "tokens": int(counts[each].sum()),
                    "confidence": (sure[each].sum() / counts[each].sum()).item(),
                    **_named("accuracy", ratio(hits[each], counts[each])),
                }
            )
    gaps, totals, blocks = hits - sure, counts.sum(), counts.shape[1]
    error: tuple[float, float | None] = (gaps.sum(1).abs().sum() / totals).item(), None
    if blocks > 1:
        without = (gaps.sum(1, keepdim=True) - gaps).abs().sum(0) / (totals - counts.sum(0))
        error = error[0], ((without - without.mean()).square().sum() * (blocks - 1) / blocks).sqrt().item()
    return bins, _named("calibration_error", error)


def _most_changed(measured: Any, strings: dict[int, str]) -> dict[str, list[dict[str, Any]]]:
    gains = (measured.losses[0] - measured.losses[-1]).double()
    kinds, places, counts = measured.targets.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(kinds), dtype=torch.float64).index_add_(0, places.flatten(), gains.flatten())
    sums = sums.where(counts >= _FEWEST, 0)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, order in (("gain", sums.argsort(descending=True)), ("lose", sums.argsort())):
        chosen = [each for each in order[:_MOST_CHANGED].tolist() if (sums[each] > 0) == (name == "gain")]
        found[name] = [
            {
                "token": strings[int(kinds[each])],
                "id": int(kinds[each]),
                "times": int(counts[each]),
                "sum": sums[each].item(),
                **_named("gain", measured.ratio(gains, places == each)),
            }
            for each in chosen
            if sums[each] != 0
        ]
    return found
