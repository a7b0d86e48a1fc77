"""`generate` for pondering models: transformers' own, and what is said about pondering beside it (pondering_call.py).

Settings and prompt are checked before any work. `prepare_inputs_for_generation` gives the settings of the call to each
forward pass, `_sample` goes over to drafting where that is asked for, and at the end the output is told what happened.
"""

import functools

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .pondering_cache import CACHE_NAME, CACHE_NAMES, given_cache
from .pondering_call import GenerationCall, current_call, during
from .pondering_errors import INSTALL_TESTED, PonderingError, untested_version
from .pondering_paged import check_prompts, start_manager
from .pondering_prompt import check_prompt
from .pondering_self_check import check_exits_once, check_generation_once
from .pondering_speculation import speculative_sample


class PonderingGenerationMixin(GenerationMixin):
    """transformers' GenerationMixin with the settings of pondering_call.py."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """transformers' `generate`, and the settings at the head of pondering_call.py.

        Returns:
            What transformers returns. With `return_dict_in_generate=True` the output also has `pondering_steps_used`
            (B, new tokens), the number of pondering steps from which each new token was predicted, and where tokens
            were drafted `draft_acceptance_rate`, the share of guesses that proved right.

        Raises:
            PonderingError: a setting or the prompt cannot be used; nothing has been computed then.
        """
        _take_cache(kwargs)
        call = GenerationCall.read(kwargs, generation_config, self)
        check_prompt(self, inputs, call.steps, generation_config, kwargs)
        self._check_itself(call, kwargs)
        with during(call):
            output = super().generate(inputs, generation_config, *args, **kwargs)
        if isinstance(output, ModelOutput):
            self._report(call, output, self._num_prompt_tokens(inputs, kwargs))
        return output

    def _check_itself(self, call, kwargs):
        """What an untested transformers calls for; changes `kwargs` where only caches do not work there."""
        if not check_generation_once(self):
            needing = {
                "past_key_values": given_cache(kwargs) is not None,
                "num_draft_tokens": call.num_draft_tokens,
                "pondering_exit_threshold": call.exit,
            }
            for name, is_set in needing.items():
                if is_set:
                    raise PonderingError(
                        f"`{name}` needs a cache, which does not work under transformers {untested_version()}: leave "
                        f"it out, or {INSTALL_TESTED}"
                    )
            kwargs["use_cache"] = False
        if call.exit is not None:
            check_exits_once(self)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        call = current_call()
        if call is not None and call.num_draft_tokens:
            _check_drafts(generation_mode, generation_config)
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
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        # The backbone's own, which may know more than transformers' usual one: Phi-3 drops its cache where the text
        # grows past the length from which other rotations hold, BLOOM makes masks of its own for static caches.
        prepare = getattr(self.backbone, "prepare_inputs_for_generation", super().prepare_inputs_for_generation)
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
            model_inputs["pondering_exit"] = call.exit.recording(
                lambda steps: call.steps_used.append((new[0], steps[:, new[1]]))
            )
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
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
        output, speculation = speculative_sample(
            self, input_ids, logits_processor, stopping_criteria, generation_config, call, *args, **model_kwargs
        )
        call.acceptance_rate = speculation.acceptance_rate
        return output

    def generate_batch(self, inputs, generation_config=None, *args, **kwargs):
        """transformers' continuous batching, and `pondering_steps`: S of all requests.

        Raises:
            PonderingError: a setting or a prompt cannot be used; nothing has been computed then.
        """
        call = current_call() or GenerationCall.read(kwargs, generation_config, self)
        if not check_generation_once(self):
            raise PonderingError(
                f"continuous batching needs a cache, which does not work under transformers {untested_version()}: "
                f"use `generate`, or {INSTALL_TESTED}"
            )
        check_prompts(self, inputs, call.steps, generation_config, kwargs)
        with during(call):
            return super().generate_batch(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        """transformers' own, over a paged cache with pages for every pass (pondering_paged.py)."""
        call = current_call() or GenerationCall.read({}, generation_config, self)
        return start_manager(self, call, generation_config, *args, **kwargs)

    def _num_prompt_tokens(self, inputs, kwargs):
        """How many of the tokens in the output's `sequences` are the prompt's."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            return prompt.shape[1]
        return 0 if kwargs.get("inputs_embeds") is not None else 1  # otherwise transformers begins with one token

    def _report(self, call, output, num_prompt_tokens):
        sequences = output.sequences
        shape = (len(sequences), sequences.shape[1] - num_prompt_tokens)
        if "pondering_steps_used" not in output:
            used = torch.full(shape, call.steps, device=sequences.device)
            if call.steps_used:
                used = _steps_of_new_tokens(call, output, num_prompt_tokens, used)
            output["pondering_steps_used"] = used
        if call.num_draft_tokens:
            output["draft_acceptance_rate"] = call.acceptance_rate


def _take_cache(arguments):
    """Rename the cache to what transformers calls it, whichever name it was given under."""
    cache = given_cache(arguments)
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    if cache is not None:
        arguments[CACHE_NAME] = cache


def _is_called_for_virtual_tokens(model):
    """Whether PEFT's prompt learning has put itself around the model's `prepare_inputs_for_generation`."""
    wrapper = getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", None)
    return bool(getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False))


def _check_drafts(generation_mode, generation_config):
    mode = getattr(generation_mode, "value", generation_mode)
    if mode not in ("greedy_search", "sample"):
        advice = "leave out `num_draft_tokens`, or use greedy search or sampling"
        raise PonderingError(f"`num_draft_tokens` does not go with {str(mode).replace('_', ' ')}: {advice}")
    if generation_config.use_cache is False:
        raise PonderingError("`num_draft_tokens` needs the cache: leave out `use_cache=False`")
    kind = generation_config.cache_implementation
    if kind not in (None, "dynamic", "dynamic_full"):  # the last one in transformers 4.57
        raise PonderingError(
            f"`num_draft_tokens` works with transformers' dynamic cache, not with a {kind} one: leave out "
            "`cache_implementation`, or set num_draft_tokens=0"
        )


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
