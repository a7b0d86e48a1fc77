"""Self-speculative generation: tokens chosen from the wave, one tick after another.

Whatever is drafted, the text is the one that plain pondering would have given. Greedy decoding takes the best score.
Sampling does as well, after adding noise to the scores: the largest of score + Gumbel noise is a sample from the
softmax of the scores. The noise of a token's place is drawn once and the same for a draft and for the final choice, so
both choose alike wherever their scores are alike, and the final choice is a sample that no draft can bias.
"""

import functools

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .pondering_backbone import (
    AdapterRows,
    changing_rotations,
    hook_origin,
    hooks_of,
    is_about_weights,
    is_original,
    takes_cache,
)
from .pondering_cache import CACHE_NAME, given_cache
from .pondering_errors import PonderingError
from .pondering_self_check import verify_wave_once
from .pondering_wave import Flight, Wave, mask_kind, without_inference_tensors
from .pondering_wave_cache import check_step_cache


# transformers' processors that only look at the scores, and those that also look at the tokens before. Drafts are
# processed with these; any other kind might keep a state, and sees final scores only, once each and in order.
_OF_SCORES = frozenset(
    f"{name}LogitsWarper" for name in "Temperature TopK TopP TopH MinP Typical Epsilon Eta".split()
) | frozenset(("InfNanRemoveLogitsProcessor", "LogitNormalization", "SuppressTokensLogitsProcessor"))
_OF_TOKENS = frozenset(
    f"{name}LogitsProcessor"
    for name in "MinLength MinNewTokensLength RepetitionPenalty NoRepeatNGram SequenceBias NoBadWords ForcedBOSToken "
    "ForcedEOSToken SuppressTokensAtBegin Watermark PrefixConstrained EncoderRepetitionPenalty "
    "EncoderNoRepeatNGram".split()
) | frozenset(("ExponentialDecayLengthPenalty",))
_MODEL_ARGUMENTS = frozenset(
    "attention_mask cache cache_position inputs_embeds logits_to_keep past_key_values pondering_steps position_ids "
    "use_cache".split()
)
# What plain generation calls of the model for each token, and drafts do not.
_PASSED_BY = ("forward", "__call__", "ponder", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_PACKAGE = __name__.rpartition(".")[0]
_HOMES = (
    f"{_PACKAGE}.modeling_pondering",
    f"{_PACKAGE}.pondering_generation",
    "transformers.generation",
    "torch.nn.modules",
)
_INSTEAD = "do so on the head (`get_output_embeddings()`) or in a logits processor, or set num_draft_tokens=0"


class Noise:
    """Gumbel noise for each place of each prompt, the same however often it is asked for.

    Each prompt has a generator of its own, which draws for its places in order, so what is drafted changes nothing.
    """

    def __init__(self, num_prompts, device):
        seed = int(torch.randint(1 << 31, ()))  # from the global state: torch.manual_seed decides
        # Generators of a CPU take the lower 32 bits of a seed.
        self.generators = [torch.Generator(device).manual_seed(seed + prompt) for prompt in range(num_prompts)]
        self.device, self.drawn = device, {}

    def rows(self, places, vocab_size):
        """places: (prompt, column) each. Returns (n, V)."""
        return torch.stack([self._row(place, vocab_size) for place in places])

    def _row(self, place, vocab_size):
        if place not in self.drawn:
            waiting = torch.empty(vocab_size, device=self.device)
            waiting.exponential_(generator=self.generators[place[0]])
            self.drawn[place] = waiting.log_().neg_()
        return self.drawn[place]

    def forget(self, place):
        """This place is decided."""
        self.drawn.pop(place, None)


class TokenChooser:
    """From logits to tokens: processors, noise, the largest.

    token_ids: (B, columns), the prompts, what is decided and, behind it, what is under way.
    """

    def __init__(self, logits_processor, do_sample, token_ids):
        self.token_ids = token_ids
        self.final_processors = logits_processor
        kinds = [type(processor).__name__ for processor in logits_processor]
        is_known = [kind in _OF_SCORES | _OF_TOKENS for kind in kinds]
        self.draft_processors = type(logits_processor)(
            processor for processor, is_pure in zip(logits_processor, is_known, strict=True) if is_pure
        )
        self.all_are_known = all(is_known)
        self.only_scores = all(kind in _OF_SCORES for kind in kinds)
        self.noise = Noise(len(token_ids), token_ids.device) if do_sample else None

    def __call__(self, logits, places, is_final):
        """Choose a token for each place.

        Args:
            logits: (n, V), float32.
            places: n pairs (prompt, column that the token would stand in), or None where there is nothing to choose.
            is_final: n booleans: whether it is the last pass that has given these logits.

        Returns:
            (tokens, scores): a list of n ids, and (n, V) processed logits.
        """
        scores = logits
        if len(self.final_processors):
            scores = self._process(logits, places, is_final)
        noisy = scores
        if self.noise is not None:
            asked = [index for index, place in enumerate(places) if place is not None]
            noisy = scores.clone()
            noisy[asked] += self.noise.rows([places[index] for index in asked], scores.shape[-1])
        return noisy.argmax(-1).tolist(), scores

    def _process(self, logits, places, is_final):
        if self.only_scores:
            return self.final_processors(self.token_ids[:1].expand(len(logits), -1), logits.clone())
        scores = logits.clone()
        for final in (True, False):
            processors = self.final_processors if final or self.all_are_known else self.draft_processors
            by_column = {}
            for index, place in enumerate(places):
                if place is not None and is_final[index] == final:
                    by_column.setdefault(place[1], []).append(index)
            for column, indices in sorted(by_column.items()):
                prompts = [places[index][0] for index in indices]
                scores[indices] = self._process_column(processors, column, prompts, logits[indices])
        return scores

    def _process_column(self, processors, column, prompts, logits):
        # Whole batches, as some processors tell the prompts of a batch apart by their row.
        token_ids = self.token_ids[:, :column]
        whole = logits.new_zeros(len(token_ids), logits.shape[-1])
        whole[prompts] = logits
        return processors(token_ids, whole)[prompts]


class Record:
    """What has been generated, row by row, and what transformers' `generate` does with it.

    Rows of a batch may be of different lengths while they grow. lengths: tokens of each row, the prompt included.
    """

    def __init__(self, input_ids, stopping_criteria, generation_config, streamer):
        self.stopping_criteria, self.streamer = stopping_criteria, streamer
        self.batch_size, self.prompt_length = input_ids.shape
        pad_token = generation_config._pad_token_tensor
        self.pad_token = 0 if pad_token is None else int(pad_token)
        self.token_ids = torch.full(
            (self.batch_size, self.prompt_length + 64), self.pad_token, device=input_ids.device
        )
        self.token_ids[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * self.batch_size
        self.finished_at = [None] * self.batch_size  # the length at which the row was told to stop
        self.pads_finished = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        self.num_streamed = self.prompt_length
        wanted = generation_config.return_dict_in_generate
        self.scores = {} if wanted and generation_config.output_scores else None
        self.logits = {} if wanted and generation_config.output_logits else None

    def reserve(self, length):
        """Make room for so many tokens a row."""
        if length > self.token_ids.shape[1]:
            more = self.token_ids.new_full((self.batch_size, length), self.pad_token)
            self.token_ids = torch.cat([self.token_ids, more], dim=1)

    def is_done(self, row):
        """Whether this row needs no more tokens: as in transformers, without an eos token rows go on together."""
        if self.finished_at[row] is None:
            return False
        if self.pads_finished or self.lengths[row] == self.stopping_criteria.max_length:
            return True
        return None not in self.finished_at and self.lengths[row] >= max(self.finished_at)

    @property
    def all_done(self):
        """Whether no row needs more tokens."""
        return all(self.is_done(row) for row in range(self.batch_size))

    @property
    def width(self):
        """How long the sequences are, once all is done."""
        return max(self.lengths) if self.pads_finished else max(self.finished_at)

    def accept(self, rows, scores, logits):
        """Take note that the token behind the end of these rows, which stands in `token_ids`, is a true one.

        scores, logits: (B, V), processed and raw ones of the last pass.
        """
        for row in rows:
            for kept, values in ((self.scores, scores), (self.logits, logits)):
                if kept is not None:
                    column = kept.setdefault(self.lengths[row], values.new_zeros(self.batch_size, values.shape[-1]))
                    column[row] = values[row]
            self.lengths[row] += 1
        lengths, stops = sorted({self.lengths[row] for row in rows}), []
        for length in lengths:
            kept = None if self.scores is None else self.columns_of(self.scores, length)
            stops.append(self.stopping_criteria(self.token_ids[:, :length], kept))
        stops = torch.stack(stops).tolist()  # at once, as each look waits for the device
        for row in rows:
            if self.finished_at[row] is None and stops[lengths.index(self.lengths[row])][row]:
                self.finished_at[row] = self.lengths[row]
        if self.streamer is not None:
            self._stream()

    def columns_of(self, kept, length):
        """The kept tensors of all tokens up to this length, as transformers' tuples, or None."""
        return None if kept is None else tuple(kept[column] for column in range(self.prompt_length, length))

    def _stream(self):
        # A token is put out when every row has it.
        waiting = [length for row, length in enumerate(self.lengths) if not self.is_done(row)]
        ready = min(waiting) if waiting else self.width
        for column in range(self.num_streamed, ready):
            self.streamer.put(self._padded(column + 1)[:, column].cpu())
        self.num_streamed = max(self.num_streamed, ready)

    def _padded(self, width):
        token_ids = self.token_ids[:, :width].clone()
        for row, length in enumerate(self.lengths):
            token_ids[row, length:] = self.pad_token
        return token_ids

    def sequences(self):
        """(B, T) of everything that was generated, finished rows padded."""
        return self._padded(self.width)


def prefill(model, input_ids, generation_config, model_kwargs):
    """Run the prompt through all passes, as transformers does it. Returns the model's output."""
    if hasattr(model, "_prefill"):
        return model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, model_kwargs)
    if generation_config.prefill_chunk_size is not None:
        return model._prefill_chunking(input_ids, generation_config, **model_kwargs)
    return model(**model.prepare_inputs_for_generation(input_ids, **model_kwargs), return_dict=True)


class Speculation:
    """One call of `generate` with drafts.

    Args:
        call: the GenerationCall.
        record: a Record.
        others: as in transformers' `_sample`.
    """

    corrects = True  # a pass before the last one replaces a draft that it does not predict

    def __init__(self, model, input_ids, logits_processor, generation_config, call, record, model_kwargs):
        self.record, self.num_steps = record, call.steps
        self.num_drafts = min(call.num_draft_tokens, call.steps)
        self.source, self.chooses_drafts = call.draft_source, hasattr(call.draft_source, "token")
        # For such sources, which look at the text each tick: reading it off the device would wait.
        self.known_tokens = input_ids.tolist() if self.chooses_drafts else None
        self.chooser = TokenChooser(logits_processor, generation_config.do_sample, record.token_ids)
        self.max_length = record.stopping_criteria.max_length
        if self.max_length is None:
            self.max_length = 1 << 62
        output = prefill(model, input_ids, generation_config, model_kwargs)
        cache = output.past_key_values
        # Columns of the cache count what went through the model, which is more than `input_ids` where the prompt was
        # given as embeddings or goes on from a cache.
        self.shift = cache.get_seq_length() - record.prompt_length
        self.wave = Wave(
            model,
            cache,
            self.num_steps,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("position_ids"),
            self.max_length + self.shift,
            self.source,
            call.autocast,
        )
        self.finished_flights = []
        self._begin(output.logits[:, -1])

    def _begin(self, logits):
        # As transformers does: with a device_map the head may lie elsewhere than the text.
        logits = logits.to(self.record.token_ids.device, torch.float32, copy=True)
        places = [(row, self.record.prompt_length) for row in range(self.record.batch_size)]
        tokens, scores = self.chooser(logits, places, [True] * len(places))
        self._write([(row, self.record.prompt_length, token) for row, token in enumerate(tokens)])
        self.flights = [Flight(self.record.prompt_length + self.shift, token) for token in tokens]
        self.record.accept(range(len(tokens)), scores, logits)
        self._retire()

    def _write(self, entries):
        """Put tokens into the text: (row, column, token) each."""
        if entries:
            self.record.reserve(max(column for _, column, _ in entries) + 1)
            self.chooser.token_ids = self.record.token_ids
        for row, column, token in entries:
            self.record.token_ids[row, column] = token
            if self.known_tokens is not None:
                self.known_tokens[row][column:] = [token]

    def _retire(self):
        for row, flight in enumerate(self.flights):
            if flight is not None and self.record.is_done(row):
                self.finished_flights.append(flight)
                self.flights[row] = None

    @property
    def acceptance_rate(self):
        """The share of the true tokens that a draft was under way for, and that it had right."""
        flights = [*self.finished_flights, *(flight for flight in self.flights if flight is not None)]
        num_verdicts = sum(flight.num_verdicts for flight in flights)
        return sum(flight.num_hits for flight in flights) / num_verdicts if num_verdicts else 0.0

    def run(self):
        """Tick until every row is done."""
        while not self.record.all_done:
            self.step()
        return self

    def step(self):
        """One tick, and what follows from it."""
        entering = torch.tensor(
            [0 if flight is None else flight.tokens[-1] for flight in self.flights], device=self.wave.device
        )
        first, logits = self.wave.tick(self.flights, entering)
        _, size, vocab_size = logits.shape
        logits = logits.reshape(-1, vocab_size).to(self.record.token_ids.device, torch.float32)
        places = [None] * len(logits)
        for row, flight in enumerate(self.flights):
            if flight is not None:
                for index, stage in enumerate(flight.stages):
                    places[(stage - first) * size + row] = (row, flight.column - self.shift + index + 1)
        is_final = [first + index // size == self.num_steps for index in range(len(places))]
        tokens, scores = self.chooser(logits, places, is_final)
        finals = self._settle(tokens, first)
        if finals:
            last = (self.num_steps - first) * size
            self.record.accept(finals, scores[last:], logits[last:])
            self._retire()

    def _settle(self, tokens, first):
        """Move every flight on. Returns the rows that have a new true token."""
        size, finals, entries = len(self.flights), [], []
        for row, flight in enumerate(self.flights):
            if flight is None:
                continue
            predicted = {stage: tokens[(stage - first) * size + row] for stage in flight.stages}
            drafted = self._ask_source(row, flight, predicted) if self.chooses_drafts else None
            limit = self.max_length + self.shift - 1  # the last token of all needs no pass
            num_drafts = min(self.num_drafts, flight.num_worthwhile)
            final = flight.settle(predicted, self.num_steps, num_drafts, limit, self.corrects, drafted)
            if final is not None:
                finals.append(row)
                if self.chooser.noise is not None:
                    self.chooser.noise.forget((row, flight.column - self.shift))
            if flight.stages[-1] == 0:
                column = flight.column - self.shift + len(flight.tokens) - 1
                entries.append((row, column, flight.tokens[-1]))
        self._write(entries)
        return finals

    def _ask_source(self, row, flight, predicted):
        """The source's token in place of pass 0's, or None. Those in place of later passes' go into `predicted`."""
        column = flight.column - self.shift
        known = self.known_tokens[row][:column]
        drafted = None
        for index, stage in enumerate(flight.stages):
            if stage < self.num_steps:
                token = self.source.token(row, stage, known + flight.tokens[: index + 1], predicted[stage])
                if token is None:
                    continue
                if stage == 0:
                    drafted = int(token)
                else:
                    predicted[stage] = int(token)
        return drafted


def speculative_sample(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    call,
    synced_gpus=False,
    streamer=None,
    **model_kwargs,
):
    """transformers' `_sample` by the wave.

    Args:
        call: the GenerationCall, with its `steps`, `num_draft_tokens` and `draft_source`.
        others: as `_sample` has them.

    Returns:
        (output, speculation): what `_sample` returns, and the finished Speculation.

    Raises:
        PonderingError: something that drafts do not go with.
    """
    _check(generation_config, synced_gpus, model_kwargs)
    _check_backbone(model.backbone, input_ids.shape[1], stopping_criteria.max_length, model_kwargs)
    check_wrapping(model)
    mask_kind(model.backbone)  # raises where the wave cannot make one, before the prompt runs
    record = Record(input_ids, stopping_criteria, generation_config, streamer)
    try:
        verify_wave_once(model)
        with AdapterRows(model):
            speculation = Speculation(
                model, input_ids, logits_processor, generation_config, call, record, model_kwargs
            )
            speculation.run()
    finally:
        without_inference_tensors(model)
    if streamer is not None:
        streamer.end()
    sequences = record.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences, speculation
    length = min([*record.lengths, sequences.shape[1]]) + speculation.shift - 1
    output = GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=record.columns_of(record.scores, sequences.shape[1]),
        logits=record.columns_of(record.logits, sequences.shape[1]),
        **{CACHE_NAME: speculation.wave.cache.give_back(length)},
    )
    return output, speculation


def _check_backbone(backbone, prompt_length, max_length, model_kwargs):
    """Raise where tokens that run ahead would change what the backbone computes for the others."""
    name = backbone.config.model_type
    if not takes_cache(backbone):
        raise PonderingError(f"`num_draft_tokens` needs a cache, but model_type {name!r} keeps none: leave it out")
    rotations = changing_rotations(backbone)
    if rotations is None:
        return
    kind, length = rotations
    mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    longest = prompt_length if mask is None else int((mask != 0).sum(-1).max())
    if position_ids is not None:
        longest = max(longest, int(position_ids.max()) + 1)
    # The last token needs no pass. Behind a longer prompt all tokens are rotated alike, if there are but two ways.
    reached = float("inf") if max_length is None else longest + max_length - prompt_length - 1
    if reached > length and (kind == "dynamic" or longest <= length):
        raise PonderingError(
            f"`num_draft_tokens` cannot follow model_type {name!r} beyond {length} tokens, where its rotary "
            f"embeddings change ({kind!r}): use max_new_tokens={max(length - longest + 1, 0)} or less, or leave it out"
        )


def _check(generation_config, synced_gpus, model_kwargs):
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(generation_config, name, None):
            raise PonderingError(f"`{name}` needs one forward pass a token: leave out `num_draft_tokens`")
    if synced_gpus:
        raise PonderingError("`num_draft_tokens` does not go with `synced_gpus`, where each process has its own speed")
    cache = given_cache(model_kwargs)
    if cache is not None:
        check_step_cache(cache)
    for name, value in model_kwargs.items():
        if name not in _MODEL_ARGUMENTS and value is not None:
            raise PonderingError(f"`{name}` does not reach drafted tokens: leave it out, or `num_draft_tokens`")


def check_wrapping(model):
    """Raise unless what stands around the model, which drafts do not call, leaves its logits as they are.

    Raises:
        PonderingError: a hook on the model, or on all modules, or a replaced method might change them.
    """
    for hook in hooks_of(model):
        if not is_about_weights(hook) or hook_origin(hook).startswith("peft."):
            raise PonderingError(
                f"`num_draft_tokens` does not run the hook {_name(hook)} on the model, which may change what it "
                f"gives: {_INSTEAD}"
            )
    every = torch.nn.modules.module
    for hooks in (getattr(every, "_global_forward_pre_hooks", {}), getattr(every, "_global_forward_hooks", {})):
        if hooks:
            raise PonderingError(
                f"`num_draft_tokens` does not run the hook {_name(next(iter(hooks.values())))} of all modules on the "
                "model: remove it, or set num_draft_tokens=0"
            )
    for hook in _offloading_hooks(getattr(model, "_hf_hook", None)):
        if not type(hook).__module__.startswith("accelerate."):
            raise PonderingError(
                f"`num_draft_tokens` does not run accelerate's hook {type(hook).__name__} on the model, which may "
                f"change what it gives: {_INSTEAD}"
            )
    for name in _PASSED_BY:
        method = getattr(model, name, None)
        if method is not None and not _is_adapters(method) and not is_original(method, _HOMES):
            raise _replaced(name, method)


def _replaced(name, method):
    configuration = getattr(getattr(method, "__self__", None), "active_peft_config", None)
    if getattr(configuration, "is_prompt_learning", False):
        kind = getattr(configuration.peft_type, "value", configuration.peft_type)
        return PonderingError(
            f"`num_draft_tokens` does not go with PEFT's {kind}, whose virtual tokens drafts do not see: set "
            "num_draft_tokens=0"
        )
    return PonderingError(
        f"`num_draft_tokens` does not call the model's `{name}`, which was replaced ({_name(method)}) and may change "
        f"what it gives: {_INSTEAD}"
    )


def _is_adapters(method):
    # PEFT puts its own `prepare_inputs_for_generation` in, also where it only calls the model's.
    configuration = getattr(getattr(method, "__self__", None), "active_peft_config", None)
    return configuration is not None and not configuration.is_prompt_learning


def _offloading_hooks(hook):
    if hook is None:
        return []
    return [one for part in hook.hooks for one in _offloading_hooks(part)] if hasattr(hook, "hooks") else [hook]


def _name(function):
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__)
