"""Self-speculative generation: the loop that drafts tokens, runs the wave and takes what comes out of it.

For each prompt some tokens are under way, the newest true one and drafts behind it (pondering_generate_drafts.py). A
tick runs the next pass of each (pondering_generate_wave.py), tokens are chosen from the logits
(pondering_generate_tokens.py), and each prompt moves on: what came out of the last pass is true and joins the text,
and a new draft enters pass 0.
"""

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .pondering_backbone import AdapterRows, changing_rotations, check_wrapping, takes_cache
from .pondering_cache import CACHE_NAME, given_cache
from .pondering_errors import PonderingError
from .pondering_generate_drafts import Flight
from .pondering_generate_tokens import Record, TokenChooser
from .pondering_generate_wave import Wave, check_step_cache, mask_kind, verify_wave_once, without_inference_tensors


_MODEL_ARGUMENTS = frozenset(
    "attention_mask cache cache_position inputs_embeds logits_to_keep past_key_values pondering_steps position_ids "
    "use_cache".split()
)


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
