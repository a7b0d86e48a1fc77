"""`generate` for pondering models: transformers' own, and what is said about pondering beside it.

How a call goes: its settings (see PonderingGenerationMixin.generate) and the prompt are checked before any work. Then
transformers runs its own loop, in which `prepare_inputs_for_generation` gives the settings to each forward pass, where
tokens may stop early (pondering_generate_exits.py), and `_sample` goes over to drafting where that is asked for
(pondering_generate_speculation.py). At the end the output is told what happened.

While the call lasts its settings stand in a context variable of its thread, from which every forward pass of the call
gets them. So strategies that hand on their arguments (to an assistant, say) do not hand these on.
"""

import contextlib
import contextvars
import difflib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, logging

from .configuration_pondering import check_steps
from .pondering_backbone import (
    are_close,
    check_inputs,
    evaluating,
    in_one_line,
    num_positions,
    peft_config_around,
    positions_of,
)
from .pondering_cache import CACHE_NAME, CACHE_NAMES, check_owner, given_cache, start_manager, step_cache
from .pondering_errors import INSTALL_TESTED, PonderingError, untested_version
from .pondering_generate_drafts import read_source
from .pondering_generate_exits import PonderingExit, check_exits_once
from .pondering_generate_speculation import check_settings, speculative_sample
from .pondering_generate_tokens import PredictionWatch


logger = logging.get_logger(__name__)

SETTINGS = (
    "pondering_steps",
    "pondering_exit_threshold",
    "pondering_exit_criterion",
    "num_draft_tokens",
    "draft_source",
)
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # what asks for it
_OF_FORWARD = ("output_pondering", "pondering_exit")  # which transformers hands on
_CALL: contextvars.ContextVar["GenerationCall | None"] = contextvars.ContextVar("pondering_call", default=None)


@dataclass
class GenerationCall:
    """One call of `generate`: its settings, and what is recorded while it lasts.

    Attributes:
        model: whose call it is.
        steps: S of this call.
        exit: a PonderingExit, or None where every token takes all S steps.
        num_draft_tokens: how far ahead the model may guess; 0: not at all.
        draft_source: where the guesses come from (pondering_generate_drafts.py).
        autocast: (whether it was on, its dtype) within the model's forward pass, as the last one saw it.
        acceptance_rate: the share of guesses that proved right, told by whoever drafts; None until then.
        steps_used: list of (first slot, (B, T) steps that each position took), one entry a forward pass; filled only
            where tokens may take fewer than S.
        slot_offset: of the first token of `input_ids`, where the prompt was embeddings or cached before.
        watch: looks at what is predicted; None where NaN is to be removed (`remove_invalid_values`).
    """

    model: PreTrainedModel
    steps: int
    exit: PonderingExit | None = None
    num_draft_tokens: int = 0
    draft_source: Callable | None = None
    autocast: tuple[bool, torch.dtype] | None = None
    acceptance_rate: float | None = None
    steps_used: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    slot_offset: int | None = None
    watch: PredictionWatch | None = None

    def check_predictions(self) -> None:
        """Raise a PonderingError where something else than a distribution was predicted."""
        if self.watch is not None:
            self.watch.check()

    @classmethod
    def read(
        cls, given: dict[str, Any], generation_config: GenerationConfig | None, model: PreTrainedModel
    ) -> "GenerationCall":
        """The settings among what was given to `generate`, or else in the generation configurations, checked.

        Raises:
            PonderingError: one of them is wrong, or they do not go together.
        """
        _check_settings(given, generation_config, model.generation_config)
        steps, threshold, criterion, num_draft_tokens, draft_source = (
            _setting(name, given, generation_config, model) for name in SETTINGS
        )
        steps = model.config.pondering_steps if steps is None else steps
        check_steps("pondering_steps", steps)
        num_draft_tokens = 0 if num_draft_tokens is None else num_draft_tokens
        if isinstance(num_draft_tokens, bool) or not isinstance(num_draft_tokens, int) or num_draft_tokens < 0:
            raise PonderingError(
                f"`num_draft_tokens` must be an integer >= 0 (0: no drafts), got {num_draft_tokens!r}"
            )
        exit = PonderingExit.read(criterion, threshold)
        # As a default of the model a criterion may wait for a call's threshold.
        default = getattr(model.generation_config, "pondering_exit_criterion", None)
        is_of_call = given.get("pondering_exit_criterion") is not None
        if exit is None and (is_of_call or (criterion is not None and default is None)):
            raise PonderingError(
                "`pondering_exit_criterion` needs `pondering_exit_threshold`, the distance below which a token stops: "
                "give both or none"
            )
        if num_draft_tokens and exit is not None:
            raise PonderingError(
                "`num_draft_tokens` and `pondering_exit_threshold` do not go together, as drafts run ahead on "
                "the very passes that an exit leaves out: use one of them"
            )
        call = cls(model, steps, exit, num_draft_tokens, read_source(draft_source, model))
        if not _setting("remove_invalid_values", given, generation_config, model):
            call.watch = PredictionWatch()
        return call


def _setting(name, given, generation_config, model):
    """What was said first of all: in the call, in its GenerationConfig, in the model's."""
    values = (
        given.get(name),
        *(getattr(config, name, None) for config in (generation_config, model.generation_config)),
    )
    return next((value for value in values if value is not None), None)


def _check_settings(given, *generation_configs):
    """Raise for a setting about pondering or drafts that does not exist, whoever makes it."""
    known = GenerationConfig()
    for name in [*given, *(name for config in generation_configs if config is not None for name in config.__dict__)]:
        if name in (*SETTINGS, *_OF_FORWARD) or hasattr(known, name):
            continue
        near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
        is_ours = "ponder" in name or name == "num_steps"
        if is_ours or difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.7):
            hint = f"did you mean `{near[0]}`?" if near else f"the settings are {', '.join(SETTINGS)}"
            raise PonderingError(f"`{name}` is no setting of generate: {hint}")


def current_call() -> GenerationCall | None:
    """The GenerationCall that this thread is in, or None outside `generate`."""
    return _CALL.get()


@contextlib.contextmanager
def during(call: GenerationCall) -> Iterator[None]:
    """Within it, `call` is this thread's current call."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def keep_settings(generation_config: GenerationConfig) -> None:
    """Make transformers read these settings back from generation_config.json.

    From a file that is marked as made from a model's configuration it takes only what it knows itself.
    """
    if any(getattr(generation_config, name, None) is not None for name in SETTINGS):
        generation_config._from_model_config = False


class PonderingGenerationMixin(GenerationMixin):
    """transformers' GenerationMixin, and what is said about pondering beside it."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        pondering_steps: int | None = None,
        pondering_exit_threshold: float | None = None,
        pondering_exit_criterion: str | Callable | None = None,
        num_draft_tokens: int | None = None,
        draft_source: str | Callable | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.Tensor:
        """transformers' `generate`, which takes everything that it takes for other models, and says how to ponder.

        What is said about pondering may as well be an attribute of a GenerationConfig: of the one that is given, or of
        `model.generation_config`, and so be saved with the model.

        Args:
            inputs: (B, T), the prompts; `input_ids` is another name.
            generation_config, args, kwargs: as of transformers' `GenerationMixin.generate`: `attention_mask`,
                `max_new_tokens`, `do_sample`, `streamer`, `past_key_values` (a cache of all passes) ...
            pondering_steps: S, how often to ponder before each token of this call, >= 0; by default
                `model.config.pondering_steps`.
            pondering_exit_threshold: stop pondering a token where the distance that the criterion measures is below
                this number >= 0. By default no token stops early.
            pondering_exit_criterion: that distance, measured after each pass: "kl" (Kullback-Leibler divergence of
                its prediction from that of the pass before, in nats), "entropy" (of its prediction, in nats), "argmax"
                (1 - the largest probability, where it is of the token that the pass before predicted, else 1), or a
                function of (logits (n, V), logits of the pass before or None) that gives distances (n,).
            num_draft_tokens: guess up to so many tokens ahead with the model itself; at most S are of use. The text
                stays what it is, and a sample is of the same distribution. 0, the default: none.
            draft_source: where the guesses come from: "own" (each pass's prediction), "heads" (trained draft heads),
                "prompt_lookup" (what followed in the text before), or an object like PromptLookup. By default the
                heads, where the model has them.

        Returns:
            What transformers returns. With `return_dict_in_generate=True` the output also has `pondering_steps_used`
            (B, new tokens), the number of pondering steps from which each new token was predicted, and where tokens
            were drafted `draft_acceptance_rate`, the share of guesses that proved right.

        Raises:
            PonderingError: a setting or the prompt cannot be used; nothing has been computed then. Or the model
                predicts NaN or infinity, where `remove_invalid_values` does not say that these are to be replaced.
        """
        cache = given_cache(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        if cache is not None:  # under the name that transformers has for it
            kwargs[CACHE_NAME] = cache
        settings = (
            pondering_steps,
            pondering_exit_threshold,
            pondering_exit_criterion,
            num_draft_tokens,
            draft_source,
        )
        given = {**dict(zip(SETTINGS, settings, strict=True)), **kwargs}
        call = GenerationCall.read(given, generation_config, self)
        check_prompt(self, inputs, call.steps, generation_config, kwargs)
        if not check_generation_once(self):
            for name, is_set in (
                ("past_key_values", cache is not None),
                ("num_draft_tokens", call.num_draft_tokens),
                ("pondering_exit_threshold", call.exit),
            ):
                if is_set:
                    raise PonderingError(
                        f"`{name}` needs a cache, which does not work under transformers {untested_version()}: leave "
                        f"it out, or {INSTALL_TESTED}"
                    )
            kwargs["use_cache"] = False
        if call.exit is not None:
            check_exits_once(self)
        with during(call):
            try:
                output = super().generate(inputs, generation_config, *args, **kwargs)
            except RuntimeError:  # sampling from NaN ends in torch's own words
                call.check_predictions()
                raise
        call.check_predictions()
        if call.num_draft_tokens and call.acceptance_rate is None:
            raise PonderingError(
                "nothing was drafted, as transformers took another way than `_sample`: leave out "
                f"`num_draft_tokens`, or {INSTALL_TESTED}"
            )
        if isinstance(output, ModelOutput):
            _report(call, output, inputs, kwargs)
        return output

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        call = current_call()
        if call is not None and call.num_draft_tokens:
            check_settings(generation_mode, generation_config)
        if call is not None and call.exit is not None:
            for name in ("output_hidden_states", "output_attentions"):
                if getattr(generation_config, name, None):
                    raise PonderingError(
                        f"`{name}` needs the same passes for every token: leave out `pondering_exit_threshold`"
                    )
            generation_config.disable_compile = True  # how many passes run is known only while they run
        if str(generation_config.cache_implementation).startswith("offloaded") and self.device.type == "cpu":
            raise PonderingError(
                "an offloaded cache moves from the GPU to memory, but the model is in memory: leave out "
                "`cache_implementation`"
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    # transformers reads the parameters of this method to learn what the model takes.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # The backbone's own, which may know more than transformers' usual one: Phi-3 drops its cache where the text
        # grows past the length from which other rotations hold, BLOOM makes masks of its own for static caches.
        prepare: Any = getattr(self.backbone, "prepare_inputs_for_generation", super().prepare_inputs_for_generation)
        model_inputs = prepare(input_ids, *args, **kwargs)
        if _is_called_for_virtual_tokens(self):
            # PEFT looks under one of the names. Where it finds none it would put its tokens in again and again.
            model_inputs.update(dict.fromkeys(CACHE_NAMES, given_cache(model_inputs)))
        call = current_call()
        if call is None:
            return model_inputs
        model_inputs["pondering_steps"] = call.steps
        if call.exit is not None:
            cache, given = given_cache(model_inputs), model_inputs.get("input_ids")
            given = model_inputs["inputs_embeds"] if given is None else given
            first_slot = 0 if cache is None else int(cache.get_seq_length())
            last_slot = first_slot + given.shape[1] - 1
            if call.slot_offset is None:
                call.slot_offset = last_slot + 1 - input_ids.shape[1]
            # Without a cache the whole text runs again for every token: only its end is new.
            new = (last_slot, slice(-1, None)) if cache is None else (first_slot, slice(None))
            model_inputs["pondering_exit"] = PonderingExit(
                call.exit.criterion,
                call.exit.threshold,
                record=lambda steps: call.steps_used.append((new[0], steps[:, new[1]])),
            )
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        call = current_call()
        if call is not None and call.model is self and call.watch is not None:
            call.watch.look(outputs.logits[:, -1])
        if model_kwargs.get("use_cache") is False and _is_called_for_virtual_tokens(self):
            # PEFT gives its prefix, a filled cache, to each forward pass by itself.
            for name in CACHE_NAMES:
                model_kwargs.pop(name, None)
        return model_kwargs

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **model_kwargs):
        call = current_call()
        if call is None or not call.num_draft_tokens:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, *args, **model_kwargs
            )
        return speculative_sample(
            self, input_ids, logits_processor, stopping_criteria, generation_config, call, *args, **model_kwargs
        )

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' continuous batching, and `pondering_steps`: S of all requests.

        Raises:
            PonderingError: a setting or a prompt cannot be used; nothing has been computed then. Or the model
                predicts NaN or infinity, as in `generate`.
        """
        call = current_call() or GenerationCall.read(kwargs, generation_config, self)
        kwargs = {name: value for name, value in kwargs.items() if name not in SETTINGS}
        if not check_generation_once(self):
            raise PonderingError(
                f"continuous batching needs a cache, which does not work under transformers {untested_version()}: "
                f"use `generate`, or {INSTALL_TESTED}"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and not mask.bool().all():
            raise PonderingError(
                "continuous batching takes no padding: give `generate_batch` lists of different lengths"
            )
        unmasked = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        for token_ids in inputs:  # each must be one that `generate` would take
            prompt = torch.as_tensor(token_ids, dtype=None if len(token_ids) else torch.long)
            check_prompt(self, prompt.unsqueeze(0), call.steps, generation_config, unmasked)
        with during(call):
            results = super().generate_batch(inputs, generation_config, *args, **kwargs)
        call.check_predictions()
        return results

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' own, over a paged cache with pages for every pass (pondering_cache.py)."""
        call = current_call()
        is_alone = call is None
        call = call or GenerationCall.read({}, generation_config, self)
        return start_manager(self, call, is_alone, generation_config, *args, **kwargs)


def _report(call, output, inputs, kwargs):
    """Put into the output of `generate` what is asked of it about pondering."""
    prompt, sequences = inputs if inputs is not None else kwargs.get("input_ids"), output.sequences
    if prompt is not None:
        num_prompt_tokens = prompt.shape[1]
    else:  # of embeddings there is nothing in `sequences`; without them transformers begins with one token
        num_prompt_tokens = 0 if kwargs.get("inputs_embeds") is not None else 1
    if "pondering_steps_used" not in output:
        shape = (len(sequences), sequences.shape[1] - num_prompt_tokens)
        used = torch.full(shape, call.steps, device=sequences.device)
        if call.steps_used:
            used = _steps_of_new_tokens(call, output, num_prompt_tokens, used)
        output["pondering_steps_used"] = used
    if call.num_draft_tokens:
        output["draft_acceptance_rate"] = call.acceptance_rate


def _is_called_for_virtual_tokens(model):
    """Whether PEFT's prompt learning has put itself around the model's `prepare_inputs_for_generation`."""
    configuration = peft_config_around(model.__dict__.get("prepare_inputs_for_generation"))
    return getattr(configuration, "is_prompt_learning", False)


def _steps_of_new_tokens(call, output, num_prompt_tokens, used):
    """(B, new tokens): what was recorded in the slots that each new token was predicted from.

    More forward passes may have run than tokens were kept (guesses that proved wrong, a stop that is noticed late,
    processes that wait for each other): what is wrong is overwritten by what came later in its slot, and what is
    behind the last token is left out.
    """
    count = used.shape[1]
    num_rows = len(call.steps_used[-1][1])
    width = max(first + steps.shape[1] for first, steps in call.steps_used)
    recorded = used.new_full((num_rows, width), call.steps)
    for first, steps in call.steps_used:
        recorded[:, first : first + steps.shape[1]] = steps
    first = call.slot_offset + num_prompt_tokens - 1
    recorded = recorded[:, first : first + count]
    beam_indices = getattr(output, "beam_indices", None)
    if beam_indices is None:
        return recorded
    return recorded.gather(0, beam_indices[:, :count].clamp(min=0))  # rows change places from token to token


def check_prompt(
    model: PreTrainedModel,
    inputs: torch.Tensor | None,
    num_steps: int,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
) -> None:
    """Raise unless the model can go on from this prompt.

    Args:
        model: a PonderingForCausalLM.
        num_steps: S of the call.
        inputs, generation_config, kwargs: as `generate` got them.

    Raises:
        PonderingError: the prompt is empty, has ids outside the vocabulary or, with the tokens to come, more tokens
            than the model has positions, the mask does not fit, or the cache was filled by another model, with another
            number of passes or with other rows.
    """
    sources = (kwargs, generation_config, model)
    past_length, past_rows = _check_cache(model, given_cache(kwargs), num_steps)
    embeds = kwargs.get("inputs_embeds")
    prompt = inputs if inputs is not None else kwargs.get("input_ids")
    if embeds is not None:
        _check_embeds(embeds, model.embedding_size)
        shape = embeds.shape[:2]
    elif prompt is not None:
        _check_token_ids(prompt, model.get_input_embeddings().weight.shape[0])
        shape = prompt.shape
    elif past_length:
        raise PonderingError("`past_key_values` needs the text that it holds, and more: give `input_ids`")
    elif _setting("bos_token_id", *sources) is None:
        raise PonderingError(
            "the prompt is empty, and no `bos_token_id` says what begins a text: give at least one token"
        )
    else:
        return
    mask, length = kwargs.get("attention_mask"), shape[1]
    if mask is not None:
        length = _check_mask(mask, shape, past_length)
    _check_positions(num_positions(model.backbone), length, shape[1], sources)
    if not past_length:
        return
    for name in _ASSISTED:
        if _setting(name, *sources) is not None:
            raise PonderingError(
                f"`past_key_values` does not go with assisted generation (`{name}`), for which transformers feeds in "
                "again what the cache holds: leave out one of the two, or use `num_draft_tokens`"
            )
    # A mask that also covers the cache says that the prompt is only what follows.
    if mask is None or mask.shape[1] == shape[1]:
        if shape[1] <= past_length:
            raise PonderingError(
                f"`past_key_values` holds {past_length} tokens, but the prompt has only {shape[1]}: give the whole "
                "text, what the cache holds and at least one token more"
            )
    elif embeds is not None:
        raise PonderingError(
            "`inputs_embeds` must hold the whole text, also what `past_key_values` holds, and `attention_mask` must "
            "be as long as they are"
        )
    num_rows = shape[0] * max(_setting(name, *sources) or 1 for name in ("num_beams", "num_return_sequences"))
    if past_rows not in (None, num_rows):
        raise PonderingError(
            f"`past_key_values` holds {past_rows} rows, but {num_rows} are generated: go on with as many prompts, "
            "beams and sequences as it was filled with, or leave it out"
        )


def _check_cache(model, past_key_values, num_steps):
    """How many tokens it holds, and in how many rows (None where its slots do not tell)."""
    if past_key_values is None or (isinstance(past_key_values, Cache) and past_key_values.get_seq_length() == 0):
        return 0, None
    step_cache(past_key_values, model.config.base_config, num_steps + 1)
    check_owner(past_key_values, model.backbone)
    keys = getattr(past_key_values.layers[0], "keys", None)
    rows = keys.shape[0] if torch.is_tensor(keys) and keys.ndim == 4 else None
    return int(past_key_values.get_seq_length()), rows


def _check_token_ids(input_ids, vocab_size):
    if not torch.is_tensor(input_ids):
        hint = "unpack it, `generate(**inputs)`" if hasattr(input_ids, "keys") else "make it one"
        raise PonderingError(f"`input_ids` must be a tensor, got {type(input_ids).__name__}: {hint}")
    if torch.is_floating_point(input_ids) or input_ids.dtype == torch.bool:
        raise PonderingError(f"`input_ids` must be integers, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise PonderingError(
            f"`input_ids` must have the shape (batch, tokens), got {tuple(input_ids.shape)}: "
            "make one prompt a batch of one"
        )
    if input_ids.numel() == 0:
        raise PonderingError("the prompt is empty: give at least one token")
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= vocab_size:
        raise PonderingError(
            f"the prompt has token id {low if low < 0 else high}, but the vocabulary goes from 0 to {vocab_size - 1}: "
            f"use the model's own tokenizer, whose {vocab_size} entries it knows"
        )


def _check_embeds(embeds, embedding_size):
    if not torch.is_tensor(embeds) or not torch.is_floating_point(embeds):
        kind = embeds.dtype if torch.is_tensor(embeds) else type(embeds).__name__
        raise PonderingError(f"`inputs_embeds` must be a tensor of floating-point numbers, got {kind}")
    if embeds.ndim != 3 or embeds.shape[-1] != embedding_size:
        raise PonderingError(
            f"`inputs_embeds` must have the shape (batch, tokens, {embedding_size}), got {tuple(embeds.shape)}"
        )
    if embeds.numel() == 0:
        raise PonderingError("the prompt is empty: give at least one token")


def _check_mask(mask, shape, past_length):
    """The number of tokens in the longest row, what the cache holds among them."""
    if not torch.is_tensor(mask) or mask.ndim != 2:
        kind = f"the shape {tuple(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
        raise PonderingError(f"`attention_mask` must be a tensor of the shape {tuple(shape)}, got {kind}")
    if mask.shape[0] != shape[0] or mask.shape[1] not in (shape[1], past_length + shape[1]):
        raise PonderingError(
            f"`attention_mask` has the shape {tuple(mask.shape)}, which does not fit a prompt of {tuple(shape)} "
            f"after {past_length} cached tokens"
        )
    counts = (mask != 0).sum(1)
    if (counts == 0).any():
        row = (counts == 0).nonzero()[0].item()
        raise PonderingError(f"row {row} of the prompt is empty: its attention mask leaves no token")
    return int(counts.max())


def _check_positions(limit, length, width, sources):
    """`length` tokens of the longest row and those to come must have positions; `width` counts padding as well."""
    if limit is None:
        return
    if length > limit:
        raise PonderingError(
            f"the prompt has {length} tokens, but the model has only {limit} positions: give a shorter text"
        )
    num_new = _setting("max_new_tokens", *sources)
    if num_new is None:
        max_length = _setting("max_length", *sources)
        num_new = None if max_length is None else max_length - width
    if num_new is not None and length + num_new - 1 > limit:  # the last token needs none
        raise PonderingError(
            f"{length} tokens of prompt and {num_new} new ones are more than the {limit} positions of the model: "
            f"use max_new_tokens={limit - length + 1} or less"
        )


_NUM_NEW = 3


def check_generation_once(model: PreTrainedModel) -> bool:
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
    plain = _with_plain_settings(model)
    with evaluating(model), torch.no_grad():
        ids, mask = check_inputs(model)
        try:
            expected = model(
                ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, pondering_steps=1
            ).logits[:, -1]
            uncached = _generate(plain, ids, mask, use_cache=False)
        except PonderingError:  # which says it already
            raise
        except Exception as error:
            raise PonderingError(
                f"{wrong}`generate` does not work ({in_one_line(error)}): {INSTALL_TESTED}"
            ) from error
        if not are_close(uncached[:, 0], expected):
            raise PonderingError(f"{wrong}`generate` does not give what the model predicts: {INSTALL_TESTED}")
        try:
            problem = None if are_close(_generate(plain, ids, mask, use_cache=True), uncached) else "other logits"
        except Exception as error:
            problem = in_one_line(error)
    if problem is not None:
        logger.warning(
            f"{wrong}a cache does not work ({problem}): generating without, which is slower. {INSTALL_TESTED}"
        )
    model._caches_work = problem is None
    return model._caches_work


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
    with during(GenerationCall(model, 1)):
        output = GenerationMixin.generate(model, ids, settings, attention_mask=mask)
    return torch.stack(output.logits, dim=1)


def _with_plain_settings(model):
    """The same model, whose `generate` finds no defaults: no sampling, beams or caches of a special kind.

    Nor what PEFT puts in the place of a method, to add a learned prompt. An object of its own, since other threads may
    generate meanwhile.
    """
    plain = object.__new__(type(model))
    plain.__dict__.update(model.__dict__)
    plain.__dict__.pop("prepare_inputs_for_generation", None)
    plain.generation_config = GenerationConfig()
    return plain
