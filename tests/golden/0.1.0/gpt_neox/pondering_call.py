"""One call of `generate`: what was said about pondering, and what is recorded while the call lasts.

Five settings go with a call, each given to `generate` or set on a GenerationConfig (and so in generation_config.json):

    pondering_steps             S for this call
    pondering_exit_threshold    stop pondering a token that has converged (pondering_exit.py); None: never
    pondering_exit_criterion    how convergence is measured: "kl", "entropy", "argmax", or an object
    num_draft_tokens            > 0: guess up to so many tokens ahead with the model itself (pondering_speculation.py)
    draft_source                where the guesses come from: "own", "heads", "prompt_lookup", or an object

While the call lasts they stand in a context variable of its thread, from which every forward pass of the call gets
them. So strategies that hand on their arguments (to an assistant, say) do not hand these on.
"""

import contextlib
import contextvars
import difflib

from transformers import GenerationConfig

from .configuration_pondering import check_steps
from .pondering_drafts import read_source
from .pondering_errors import PonderingError
from .pondering_exit import PonderingExit


SETTINGS = (
    "pondering_steps",
    "pondering_exit_threshold",
    "pondering_exit_criterion",
    "num_draft_tokens",
    "draft_source",
)
_OF_FORWARD = ("output_pondering", "pondering_exit")  # of forward, which transformers hands on
_CALL = contextvars.ContextVar("pondering_generation_call", default=None)


class GenerationCall:
    """One call of `generate`: its settings, and what is recorded while it lasts.

    Attributes:
        steps: S of this call.
        exit: a PonderingExit, or None where every token takes all S steps.
        num_draft_tokens: how far ahead the model may guess; 0: not at all.
        draft_source: where the guesses come from (pondering_drafts.py); None without guesses.
        model: whose call it is.
        autocast: (whether it was on, its dtype) within the model's forward pass, as the last one saw it.
        acceptance_rate: the share of guesses that proved right, told by whoever drafts.
        steps_used: list of (first slot, (B, T) steps that each position took), one entry a forward pass; filled only
            where tokens may take fewer than S.
    """

    def __init__(self, steps, exit=None, num_draft_tokens=0, draft_source=None, model=None):
        self.model = model
        self.steps, self.exit = steps, exit
        self.num_draft_tokens, self.draft_source = num_draft_tokens, draft_source
        self.acceptance_rate, self.autocast = 0.0, None
        self.steps_used = []
        self.slot_offset = None  # of the first token of `input_ids`, where the prompt was embeddings or cached before

    @classmethod
    def read(cls, kwargs, generation_config, model):
        """Take the settings out of `kwargs`, or else from the generation configurations, and check them.

        Raises:
            PonderingError: one of them is wrong, or they do not go together.
        """
        _check_names(kwargs, generation_config, model.generation_config)
        values, criterion_of_call = {}, kwargs.get("pondering_exit_criterion")
        for name in SETTINGS:
            sources = [kwargs.pop(name, None), getattr(generation_config, name, None)]
            sources.append(getattr(model.generation_config, name, None))
            values[name] = next((value for value in sources if value is not None), None)
        steps, threshold, criterion, num_draft_tokens, draft_source = values.values()
        steps = model.config.pondering_steps if steps is None else steps
        check_steps("pondering_steps", steps)
        num_draft_tokens = 0 if num_draft_tokens is None else num_draft_tokens
        if isinstance(num_draft_tokens, bool) or not isinstance(num_draft_tokens, int) or num_draft_tokens < 0:
            raise PonderingError(
                f"`num_draft_tokens` must be an integer >= 0 (0: no drafts), got {num_draft_tokens!r}"
            )
        exit = PonderingExit.read(criterion, threshold)
        default = getattr(model.generation_config, "pondering_exit_criterion", None)
        if exit is None and (criterion_of_call is not None or (criterion is not None and default is None)):
            # As a default of the model it may wait for a call's threshold.
            raise PonderingError(
                "`pondering_exit_criterion` needs `pondering_exit_threshold`, the distance below which a token stops: "
                "give both or none"
            )
        if num_draft_tokens and exit is not None:
            raise PonderingError(
                "`num_draft_tokens` and `pondering_exit_threshold` do not go together, as drafts run ahead on "
                "the very passes that an exit leaves out: use one of them"
            )
        source = read_source(draft_source, model)
        return cls(steps, exit, num_draft_tokens, source if num_draft_tokens else None, model)


def _check_names(kwargs, *generation_configs):
    """Raise for a setting about pondering or drafts that does not exist, whoever makes it."""
    names = [*kwargs]
    for config in generation_configs:
        names += [] if config is None else [*config.__dict__]
    for name in names:
        is_ours = "ponder" in name or name == "num_steps"
        is_near = "draft" in name and difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.8)
        if not (is_ours or is_near) or name in (*SETTINGS, *_OF_FORWARD) or hasattr(GenerationConfig(), name):
            continue
        near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"the settings are {', '.join(SETTINGS)}"
        raise PonderingError(f"`{name}` is no setting of generate: {hint}")


def current_call():
    """The GenerationCall that this thread is in, or None outside `generate`."""
    return _CALL.get()


def keep_settings(generation_config):
    """Make transformers read these settings back from generation_config.json.

    From a file that is marked as made from a model's configuration it takes only what it knows itself.
    """
    if any(getattr(generation_config, name, None) is not None for name in SETTINGS):
        generation_config._from_model_config = False


@contextlib.contextmanager
def during(call):
    """Within it, `call` is this thread's current call."""
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)
