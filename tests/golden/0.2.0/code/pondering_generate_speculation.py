"""Self-speculative generation: the loop that drafts tokens, runs the wave and takes what comes out of it.

For each prompt some tokens are under way, the newest true one and drafts behind it (pondering_generate_drafts.py). A
tick runs the next pass of each (pondering_generate_wave.py), tokens are chosen from the logits
(pondering_generate_tokens.py), and each prompt moves on: what came out of the last pass is true and joins the text,
and a new draft enters pass 0.
"""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .pondering_backbone import AdapterRows, changing_rotations, check_wrapping, takes_cache
from .pondering_cache import CACHE_NAME, given_cache
from .pondering_errors import PonderingError
from .pondering_generate_drafts import PendingTokens
from .pondering_generate_tokens import GrowingText, TokenChooser
from .pondering_generate_wave import Wave, check_step_cache, mask_kind, verify_wave_once, without_inference_tensors


_MODEL_ARGUMENTS = frozenset(
    "attention_mask cache cache_position inputs_embeds logits_to_keep past_key_values pondering_steps position_ids "
    "use_cache".split()
)


def prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> CausalLMOutputWithPast:
    """Run the prompt through all passes, as transformers does it. Returns the model's output."""
    if hasattr(model, "_prefill"):
        return model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, model_kwargs)
    if generation_config.prefill_chunk_size is not None:  # all but the last token, in transformers 4.57
        model_kwargs = model._prefill_chunking(input_ids, generation_config, **model_kwargs)
    return model(**model.prepare_inputs_for_generation(input_ids, **model_kwargs), return_dict=True)


class Speculation:
    """One call of `generate` with drafts.

    Args:
        call: the GenerationCall, with its `steps`, `num_draft_tokens` and `draft_source`.
        text: a GrowingText of the prompts.
        others: as in transformers' `_sample`.
    """

    corrects = True  # a pass before the last one replaces a draft that it does not predict

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        call: Any,
        text: GrowingText,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.text, self.num_steps, self.watch = text, call.steps, call.watch
        self.num_drafts = min(call.num_draft_tokens, call.steps)
        self.source, self.chooses_drafts = call.draft_source, hasattr(call.draft_source, "token")
        # For such sources, which look at the text each tick: reading it off the device would wait.
        self.known_tokens = input_ids.tolist() if self.chooses_drafts else None
        self.chooser = TokenChooser(
            logits_processor, generation_config.do_sample, text.batch_size, text.token_ids.device
        )
        max_length = text.stopping_criteria.max_length
        output = prefill(model, input_ids, generation_config, model_kwargs)
        cache = output.past_key_values
        # Columns of the cache count what went through the model, which is more than `input_ids` where the prompt was
        # given as embeddings or goes on from a cache.
        self.shift = cache.get_seq_length() - text.prompt_length
        self.num_columns = (1 << 62 if max_length is None else max_length) + self.shift
        self.wave = Wave(
            model,
            cache,
            self.num_steps,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("position_ids"),
            self.num_columns,
            self.source,
            call.autocast,
        )
        # As transformers does: with a device_map the head may lie elsewhere than the text.
        logits = output.logits[:, -1].to(text.token_ids.device, torch.float32, copy=True)
        if self.watch is not None:
            self.watch.look(logits)
        places = [(row, text.prompt_length) for row in range(text.batch_size)]
        tokens, scores = self.chooser(logits, places, [True] * len(places), text.token_ids)
        self.pending = [PendingTokens(text.prompt_length + self.shift, token) for token in tokens]
        for row, token in enumerate(tokens):
            self._write(row, text.prompt_length, token)
        text.accept(range(len(tokens)), scores, logits)

    def _write(self, row, column, token):
        """Put a token into the text, true or a draft."""
        self.text.reserve(column + 1)
        self.text.token_ids[row, column] = token
        if self.known_tokens is not None:
            self.known_tokens[row][column:] = [token]

    @property
    def acceptance_rate(self) -> float:
        """The share of the true tokens that a draft was under way for, and that it had right."""
        num_verdicts = sum(pending.num_verdicts for pending in self.pending)
        return sum(pending.num_hits for pending in self.pending) / num_verdicts if num_verdicts else 0.0

    def run(self) -> "Speculation":
        """Tick until every row is done. Gives back itself."""
        while not self.text.all_done:
            self.step()
        return self

    def step(self) -> None:
        """One tick, and what follows from it."""
        text = self.text
        running = [None if text.is_done(row) else pending for row, pending in enumerate(self.pending)]
        first, columns, logits = self.wave.tick(running)
        _, size, vocab_size = logits.shape
        logits = logits.reshape(-1, vocab_size).to(text.token_ids.device, torch.float32)
        places = [
            None if column < 0 else (index % size, column - self.shift + 1) for index, column in enumerate(columns)
        ]
        is_final = [first + index // size == self.num_steps for index in range(len(places))]
        tokens, scores = self.chooser(logits, places, is_final, text.token_ids)
        finals = [
            row
            for row, pending in enumerate(running)
            if pending is not None and self._advance(row, pending, tokens[row::size], first)
        ]
        if finals:
            last = (self.num_steps - first) * size
            if self.watch is not None:
                self.watch.look(logits[last:][finals])
            text.accept(finals, scores[last:], logits[last:])

    def _advance(self, row, pending, tokens, first):
        """Move a prompt on. tokens: what each pass predicts, from pass `first` on. Whether it has a new true token."""
        predicted = {index: tokens[index - first] for index in pending.next_passes}
        drafted = self._ask_source(row, pending, predicted) if self.chooses_drafts else None
        limit = self.num_columns - 1  # the last token of all needs no pass
        num_drafts = min(self.num_drafts, pending.num_worthwhile)
        final = pending.advance(predicted, self.num_steps, num_drafts, limit, self.corrects, drafted)
        if final is not None and self.chooser.noise is not None:
            self.chooser.noise.forget((row, pending.column - self.shift))
        if pending.next_passes[-1] == 0:  # a token that has just come
            self._write(row, pending.column - self.shift + len(pending.tokens) - 1, pending.tokens[-1])
        return final is not None

    def _ask_source(self, row, pending, predicted):
        """The source's token in place of pass 0's, or None. Those in place of later passes' go into `predicted`."""
        known = self.known_tokens[row][: pending.column - self.shift]
        drafted = None
        for index, pass_index in enumerate(pending.next_passes):
            if pass_index < self.num_steps:
                token = self.source.token(row, pass_index, known + pending.tokens[: index + 1], predicted[pass_index])
                if token is not None and pass_index == 0:
                    drafted = int(token)
                elif token is not None:
                    predicted[pass_index] = int(token)
        return drafted


def speculative_sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    call: Any,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """transformers' `_sample` by the wave.

    Args:
        call: the GenerationCall; is told the `acceptance_rate`.
        others: as `_sample` has them.

    Returns:
        What `_sample` returns.

    Raises:
        PonderingError: something that drafts do not go with.
    """
    model_kwargs.pop("tokenizer", None)  # which has told the stopping criteria what it had to
    _check_call(synced_gpus, model_kwargs)
    _check_backbone(model.backbone, input_ids.shape[1], stopping_criteria.max_length, model_kwargs)
    check_wrapping(model)
    text = GrowingText(input_ids, stopping_criteria, generation_config, streamer)
    try:
        verify_wave_once(model)
        with AdapterRows(model):
            speculation = Speculation(
                model, input_ids, logits_processor, generation_config, call, text, model_kwargs
            ).run()
    finally:
        without_inference_tensors(model)
    call.acceptance_rate = speculation.acceptance_rate
    if streamer is not None:
        streamer.end()
    sequences = text.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences
    length = min([*text.lengths, sequences.shape[1]]) + speculation.shift - 1
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=text.up_to(sequences.shape[1], text.scores),
        logits=text.up_to(sequences.shape[1], text.logits),
        **{CACHE_NAME: speculation.wave.cache.give_back(length)},
    )


def check_settings(generation_mode: Any, generation_config: GenerationConfig) -> None:
    """Raise for settings of transformers' `generate` that drafts do not go with.

    Args:
        generation_mode: transformers' GenerationMode.
        generation_config: of the call.
    """
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
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(generation_config, name, None):
            raise PonderingError(f"`{name}` needs one forward pass a token: leave out `num_draft_tokens`")


def _check_backbone(backbone, prompt_length, max_length, model_kwargs):
    """Raise where tokens that run ahead would change what the backbone computes for the others."""
    name = backbone.config.model_type
    if not takes_cache(backbone):
        raise PonderingError(f"`num_draft_tokens` needs a cache, but model_type {name!r} keeps none: leave it out")
    mask_kind(backbone)  # raises where the wave cannot make a mask
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


def _check_call(synced_gpus, model_kwargs):
    if synced_gpus:
        raise PonderingError("`num_draft_tokens` does not go with `synced_gpus`, where each process has its own speed")
    cache = given_cache(model_kwargs)
    if cache is not None:
        check_step_cache(cache)
    for name, value in model_kwargs.items():
        if name not in _MODEL_ARGUMENTS and value is not None:
            raise PonderingError(f"`{name}` does not reach drafted tokens: leave it out, or `num_draft_tokens`")
