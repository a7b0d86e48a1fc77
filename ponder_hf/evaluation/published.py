"""Averages that others published, to stand beside results of the same model."""

_SOURCE = "a third party's reading of arXiv 2505.20674 v3, table 1"
_REVIEWS = "public reviews of PonderLM-2"
# The last part of a model's id, in small letters, to its averages over the nine tasks: (5-shot, 0-shot) in percent.
_AVERAGES = {
    "pythia-1b": (50.4, 50.6, _SOURCE),
    "ponderingpythia-1b": (56.2, 55.0, _SOURCE),
    "ponderpythia-1b": (56.2, 55.0, _SOURCE),
    "pythia-2.8b": (57.6, 57.3, _SOURCE),
    "ponderingpythia-2.8b": (61.5, 60.4, _SOURCE),
    "ponderpythia-2.8b": (61.5, 60.4, _SOURCE),
    "pythia-6.9b": (60.1, 59.1, _SOURCE),
    "pythia-12b": (61.7, 60.5, _SOURCE),
    "ponderlm-2-1.4b": (59.5, 58.5, _REVIEWS),
}


def published_averages(name: str) -> list[dict]:
    """The averages published for the model of this Hub id or folder; none for one that nobody published.

    Returns:
        Dicts with `num_fewshot`, `average` (of the nine tasks, in percent) and `source`.
    """
    found = _AVERAGES.get(name.rstrip("/").rpartition("/")[2].lower())
    if found is None:
        return []
    five, zero, source = found
    return [
        {"num_fewshot": 5, "average": five, "source": source},
        {"num_fewshot": 0, "average": zero, "source": source},
    ]
