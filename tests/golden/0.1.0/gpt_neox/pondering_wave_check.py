"""The wave held against plain pondering, on backbones that the tests of ponder_hf do not know."""

import torch

from .pondering_backbone import TESTED
from .pondering_drafts import OwnPredictions
from .pondering_errors import PonderingError
from .pondering_wave import Flight, Wave


def verify_wave_once(model):
    """Check an untested backbone at its first drafted call.

    Raises:
        PonderingError: the wave does not give what plain pondering gives.
    """
    name = model.backbone.config.model_type
    if name in TESTED or getattr(model, "_wave_is_verified", False):
        return
    was_training = model.training
    try:
        found, expected = _compare(model.eval())
    except PonderingError:  # which says it already
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        first_line = str(error).split("\n")[0]
        raise PonderingError(
            f"`num_draft_tokens` does not work with model_type {name!r} ({first_line}): set num_draft_tokens=0"
        ) from error
    finally:
        model.train(was_training)
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 1e-1
    if not (found - expected).abs().max() <= tolerance * expected.abs().max():
        raise PonderingError(
            f"`num_draft_tokens` does not work with model_type {name!r}, where passes of several tokens in one batch "
            "give something else than by themselves: set num_draft_tokens=0"
        )
    model._wave_is_verified = True


@torch.no_grad()
def _compare(model):
    """Logits (2, 2, V) of two tokens behind two prompts, one of them padded: by the wave, and by whole passes."""
    ids = torch.arange(2, 14, device=model.device).view(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
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
