"""Checks that a model makes of itself where the tests of ponder_hf could not: on backbones and under versions of
transformers that they do not know.

Each is made once a model, at its first `generate` that needs it, on a few tokens.
"""

import contextlib

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import logging

from .pondering_backbone import TESTED, evaluating
from .pondering_call import GenerationCall, during
from .pondering_drafts import OwnPredictions
from .pondering_errors import INSTALL_TESTED, PonderingError, untested_version
from .pondering_exit import PonderingExit
from .pondering_wave import Flight, Wave


logger = logging.get_logger(__name__)

# What goes wrong where transformers has moved something: the first line of it is all that helps.
_ERRORS = (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError, ImportError, NotImplementedError)
_NUM_NEW = 3


def check_generation_once(model):
    """Under an untested transformers, hold cached against uncached generation and that against the model's logits.

    Returns:
        Whether caches work. If they do not, it has been said, and the model must generate without.

    Raises:
        PonderingError: `generate` does not give what the model predicts, or the backbone is not what it was.
    """
    version = untested_version()
    if version is None:
        return True
    known = getattr(model, "_caches_work", None)
    if known is not None:
        return known
    wrong = f"under transformers {version}, which is newer than what this code is tested with, "
    with evaluating(model), _plain_generation(model), torch.no_grad():
        ids, mask = _prompt(model)
        try:
            expected = model(
                ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False, pondering_steps=1
            ).logits[:, -1]
            uncached = _generate(model, ids, mask, use_cache=False)
        except PonderingError:  # which says it already
            raise
        except _ERRORS as error:
            raise PonderingError(
                f"{wrong}`generate` does not work ({_first_line(error)}): {INSTALL_TESTED}"
            ) from error
        if not _are_close(uncached[:, 0], expected):
            raise PonderingError(f"{wrong}`generate` does not give what the model predicts: {INSTALL_TESTED}")
        try:
            problem = None if _are_close(_generate(model, ids, mask, use_cache=True), uncached) else "other logits"
        except _ERRORS as error:
            problem = _first_line(error)
    if problem is not None:
        logger.warning(
            f"{wrong}a cache does not work ({problem}): generating without, which is slower. {INSTALL_TESTED}"
        )
    model._caches_work = problem is None
    return model._caches_work


def check_exits_once(model):
    """Under an untested transformers, hold passes that tokens may leave early against whole passes.

    Raises:
        PonderingError: tokens that stay to the end get other logits.
    """
    version = untested_version()
    if version is None or getattr(model, "_exits_are_verified", False):
        return
    with evaluating(model), torch.no_grad():
        ids, mask = _prompt(model)
        inputs = {"attention_mask": mask, "position_ids": _positions(mask), "use_cache": False, "pondering_steps": 1}
        expected = model(ids, **inputs).logits
        try:
            found = model(ids, **inputs, pondering_exit=PonderingExit(_only_the_first_row, 1)).logits
            problem = None if _are_close(found[1:, -1], expected[1:, -1]) else "other logits"
        except _ERRORS as error:
            problem = _first_line(error)
    if problem is not None:
        raise PonderingError(
            f"`pondering_exit_threshold` does not work under transformers {version} ({problem}): leave it out, or "
            f"{INSTALL_TESTED}"
        )
    model._exits_are_verified = True


def verify_wave_once(model):
    """Check the wave against plain pondering at the first drafted call of an untested backbone or transformers.

    Raises:
        PonderingError: the wave does not give what plain pondering gives.
    """
    name, version = model.backbone.config.model_type, untested_version()
    if (name in TESTED and version is None) or getattr(model, "_wave_is_verified", False):
        return
    where = f"with model_type {name!r}" if version is None else f"under transformers {version}"
    try:
        with evaluating(model):
            found, expected = _compare_wave(model)
    except PonderingError:  # which says it already
        raise
    except _ERRORS as error:
        raise PonderingError(
            f"`num_draft_tokens` does not work {where} ({_first_line(error)}): set num_draft_tokens=0"
        ) from error
    if not _are_close(found, expected):
        raise PonderingError(
            f"`num_draft_tokens` does not work {where}, where passes of several tokens in one batch "
            "give something else than by themselves: set num_draft_tokens=0"
        )
    model._wave_is_verified = True


def _prompt(model):
    """Token ids (2, 6) and their mask: the second row is left-padded by two."""
    ids = torch.arange(2, 14, device=model.device).view(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


def _positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def _generate(model, ids, mask, use_cache):
    """(2, _NUM_NEW, V), the logits that transformers' `generate` chooses from, with S = 1."""
    settings = GenerationConfig(
        max_new_tokens=_NUM_NEW,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with during(GenerationCall(1, model=model)):
        output = GenerationMixin.generate(model, ids, settings, attention_mask=mask)
    return torch.stack(output.logits, dim=1)


def _are_close(found, expected):
    """Whether two tensors are equal but for rounding. What is not a number is not."""
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 1e-1
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6)
    )


def _first_line(error):
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _only_the_first_row(logits, previous_logits):
    """An exit criterion: tokens of one row stop after pass 0, where all tokens of two equal rows are there."""
    distances = logits.new_full(logits.shape[:1], 2.0)
    if previous_logits is None:
        distances[: len(distances) // 2] = 0.0
    return distances


@contextlib.contextmanager
def _plain_generation(model):
    """Within it, `generate` finds no defaults of the model: no sampling, beams or caches of a special kind.

    Nor what PEFT puts in the place of a method, to add a learned prompt.
    """
    settings, model.generation_config = model.generation_config, GenerationConfig()
    replaced = model.__dict__.pop("prepare_inputs_for_generation", None)
    try:
        yield
    finally:
        model.generation_config = settings
        if replaced is not None:
            model.prepare_inputs_for_generation = replaced


@torch.no_grad()
def _compare_wave(model):
    """Logits (2, 2, V) of two tokens behind two prompts, one of them padded: by the wave, and by whole passes."""
    ids, mask = _prompt(model)
    position_ids = _positions(mask)
    whole = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False, pondering_steps=1).logits
    prompt, new = slice(0, 4), ids[:, 4:]
    cache = model(
        ids[:, prompt],
        attention_mask=mask[:, prompt],
        position_ids=position_ids[:, prompt],
        use_cache=True,
        pondering_steps=1,
    ).past_key_values
    wave = Wave(model, cache, 1, mask[:, prompt], None, 6, OwnPredictions())
    flights = [Flight(4, token) for token in new[:, 0].tolist()]
    wave.tick(flights, new[:, 0])
    for flight, token in zip(flights, new[:, 1].tolist(), strict=True):
        flight.tokens, flight.stages = [flight.tokens[0], token], [1, 0]
    first = wave.tick(flights, new[:, 1])[1][1]
    for flight in flights:
        flight.column, flight.tokens, flight.stages = 5, flight.tokens[1:], [1]
    second = wave.tick(flights, new[:, 1])[1][0]
    return torch.stack([first, second], dim=1), whole[:, 4:]
