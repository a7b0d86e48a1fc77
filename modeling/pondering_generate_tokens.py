"""Choosing tokens from logits and keeping the text while tokens are drafted (pondering_generate_speculation.py).

Whatever is drafted, the text is the one that plain pondering would have given. Greedy decoding takes the best score.
Sampling does as well, after adding noise to the scores: the largest of score + Gumbel noise is a sample from the
softmax of the scores. The noise of a token's place is drawn once and the same for a draft and for the final choice, so
both choose alike wherever their scores are alike, and the final choice is a sample that no draft can bias.
"""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .pondering_errors import PonderingError


# transformers' processors that only look at the scores, and those that also look at the tokens before. Drafts are
# processed with these; any other kind might keep a state (guidance and SynthID's watermark do), so it sees only final
# scores, once each and in order, and of a single prompt.
_OF_SCORES = frozenset(
    f"{name}LogitsWarper" for name in "Temperature TopK TopP TopH MinP Typical Epsilon Eta".split()
) | frozenset(("InfNanRemoveLogitsProcessor", "LogitNormalization", "SuppressTokensLogitsProcessor"))
_OF_TOKENS = frozenset(
    f"{name}LogitsProcessor"
    for name in "MinLength MinNewTokensLength RepetitionPenalty NoRepeatNGram SequenceBias NoBadWords ForcedBOSToken "
    "ForcedEOSToken SuppressTokensAtBegin Watermark PrefixConstrained EncoderRepetitionPenalty "
    "EncoderNoRepeatNGram".split()
) | frozenset(("ExponentialDecayLengthPenalty",))

Place = tuple[int, int]  # where a token stands or would stand: (prompt, column of the text)


class PredictionWatch:
    """Notes whether a model predicts anything but a distribution: greedy decoding would choose a token all the same.

    Of the first new token all logits are looked at, of later ones a single logit. That one is NaN wherever the hidden
    state is, and a hidden state that was NaN once stays so in the keys and values of its position.
    """

    def __init__(self) -> None:
        self._is_wrong: torch.Tensor | None = None

    def look(self, logits: torch.Tensor) -> None:
        """At the logits (B, V) of the last pass for a new token of each row.

        Raises:
            PonderingError: they are the first, and have NaN, infinity, or no token that may come.
        """
        if self._is_wrong is None:
            self._is_wrong = ~logits.logsumexp(-1).isfinite().all()
            self.check()
        else:
            self._is_wrong = self._is_wrong | logits[:, 0].isnan().any()

    def note(self, logits: torch.Tensor) -> None:
        """The largest of each row of logits (..., V), for `check`. Nothing waits for the device: a graph takes it."""
        is_wrong = ~logits.amax(-1).isfinite().all()
        if self._is_wrong is None:
            self._is_wrong = is_wrong
        else:
            self._is_wrong.logical_or_(is_wrong)

    def check(self) -> None:
        """Raise a PonderingError where something else than a distribution was predicted. Waits for the device."""
        if self._is_wrong is not None and self._is_wrong:
            raise PonderingError(
                "the model predicts NaN or infinity: get its weights again, or load it in float32 "
                "(`remove_invalid_values=True` goes on all the same)"
            )


class GumbelNoise:
    """Noise for each place of each prompt, the same however often it is asked for.

    Each prompt has a generator of its own, which draws for its places in order, so what is drafted changes nothing.
    """

    def __init__(self, num_prompts: int, device: torch.device) -> None:
        seed = int(torch.randint(1 << 31, ()))  # from the global state: torch.manual_seed decides
        # Generators of a CPU take the lower 32 bits of a seed.
        self.generators = [torch.Generator(device).manual_seed(seed + prompt) for prompt in range(num_prompts)]
        self.device = device
        self.drawn: dict[Place, torch.Tensor] = {}

    def rows(self, places: list[Place], vocab_size: int) -> torch.Tensor:
        """(n, V), for n places."""
        for place in places:
            if place not in self.drawn:
                waiting = torch.empty(vocab_size, device=self.device)
                waiting.exponential_(generator=self.generators[place[0]])
                self.drawn[place] = waiting.log_().neg_()
        return torch.stack([self.drawn[place] for place in places])

    def forget(self, place: Place) -> None:
        """This place is decided."""
        self.drawn.pop(place, None)


class TokenChooser:
    """From logits to tokens: transformers' processors, noise where tokens are sampled, the largest."""

    def __init__(
        self, logits_processor: LogitsProcessorList, do_sample: bool, num_prompts: int, device: torch.device
    ) -> None:
        kinds = [type(processor).__name__ for processor in logits_processor]
        others = [kind for kind in kinds if kind not in _OF_SCORES | _OF_TOKENS]
        if others and num_prompts > 1:  # it would be called for each prompt apart, and its state is of all of them
            raise PonderingError(
                f"`num_draft_tokens` does not go with {others[0]} for {num_prompts} prompts at once, each of which "
                "has a speed of its own: give one prompt at a time, or leave out one of the two"
            )
        self.processors = logits_processor
        self.draft_processors = type(logits_processor)(
            processor
            for processor, kind in zip(logits_processor, kinds, strict=True)
            if kind in _OF_SCORES | _OF_TOKENS
        )
        self.only_scores = all(kind in _OF_SCORES for kind in kinds)
        self.noise = GumbelNoise(num_prompts, device) if do_sample else None

    def __call__(
        self, logits: torch.Tensor, places: Sequence[Place | None], is_final: list[bool], token_ids: torch.Tensor
    ) -> tuple[list[int], torch.Tensor]:
        """Choose a token for each place.

        Args:
            logits: (n, V), float32.
            places: n of them, or None where there is nothing to choose.
            is_final: n booleans: whether it is the last pass that has given these logits.
            token_ids: (B, columns), the prompts, what is decided and, behind it, what is under way.

        Returns:
            (tokens, scores): a list of n ids, and (n, V) processed logits.
        """
        scores = self._process(logits, places, is_final, token_ids) if len(self.processors) else logits
        noisy = scores
        if self.noise is not None:
            asked = {index: place for index, place in enumerate(places) if place is not None}
            noisy = scores.clone()
            noisy[list(asked)] += self.noise.rows(list(asked.values()), scores.shape[-1])
        return noisy.argmax(-1).tolist(), scores

    def _process(self, logits, places, is_final, token_ids):
        if self.only_scores:
            return self.processors(token_ids[:1].expand(len(logits), -1), logits.clone())
        scores, groups = logits.clone(), {}
        for index, place in enumerate(places):
            if place is not None:
                groups.setdefault((not is_final[index], place[1]), []).append(index)
        for (is_draft, column), indices in sorted(groups.items()):
            # Whole batches, as some processors tell the prompts of a batch apart by their row.
            prompts = [places[index][0] for index in indices]
            whole = logits.new_zeros(len(token_ids), logits.shape[-1])
            whole[prompts] = logits[indices]
            processors = self.draft_processors if is_draft else self.processors
            # Guidance gives scores in the model's dtype.
            scores[indices] = processors(token_ids[:, :column], whole)[prompts].to(scores.dtype)
        return scores


class GrowingText:
    """What has been generated, row by row, and what transformers' `generate` does with it: stops, scores, a streamer.

    Rows of a batch may be of different lengths while they grow.

    Attributes:
        token_ids: (B, columns), with room for more, and drafts behind what is decided.
        lengths: how many tokens of each row are decided, the prompt included.
        scores, logits: {column: (B, V)}, processed and raw ones of the last pass; None where nobody wants them.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        self.stopping_criteria, self.streamer = stopping_criteria, streamer
        self.batch_size, self.prompt_length = input_ids.shape
        pad_token = generation_config.pad_token_id
        if pad_token is None:  # as transformers pads
            pad_token = generation_config.eos_token_id
        self.pad_token = 0 if pad_token is None else int(torch.as_tensor(pad_token).flatten()[0])
        self.token_ids = input_ids.long()
        self.reserve(self.prompt_length + 64)
        self.lengths = [self.prompt_length] * self.batch_size
        self.finished_at: dict[int, int] = {}  # the length at which a row was told to stop
        self.pads_finished = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        self.num_streamed = self.prompt_length
        wanted = generation_config.return_dict_in_generate
        self.scores: dict | None = {} if wanted and generation_config.output_scores else None
        self.logits: dict | None = {} if wanted and generation_config.output_logits else None

    def reserve(self, length: int) -> None:
        """Make room for so many tokens a row."""
        if length > self.token_ids.shape[1]:
            more = self.token_ids.new_full((self.batch_size, length), self.pad_token)
            self.token_ids = torch.cat([self.token_ids, more], dim=1)

    def is_done(self, row: int) -> bool:
        """Whether this row needs no more tokens: as in transformers, without an eos token rows go on together."""
        if row not in self.finished_at:
            return False
        if self.pads_finished or self.lengths[row] == self.stopping_criteria.max_length:
            return True
        are_all_told = len(self.finished_at) == self.batch_size
        return are_all_told and self.lengths[row] >= max(self.finished_at.values())

    @property
    def all_done(self) -> bool:
        """Whether no row needs more tokens."""
        return all(self.is_done(row) for row in range(self.batch_size))

    def accept(self, rows: Sequence[int], scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Take note that the token behind the end of these rows, which stands in `token_ids`, is a true one.

        Args:
            rows: of the batch.
            scores, logits: (B, V), processed and raw ones of the last pass.
        """
        for row in rows:
            for kept, values in ((self.scores, scores), (self.logits, logits)):
                if kept is not None:
                    column = kept.setdefault(self.lengths[row], values.new_zeros(self.batch_size, values.shape[-1]))
                    column[row] = values[row]
            self.lengths[row] += 1
        lengths = sorted({self.lengths[row] for row in rows})
        stops = [self.stopping_criteria(self.token_ids[:, :end], self.up_to(end, self.scores)) for end in lengths]
        told = torch.stack(stops).tolist()  # at once, as each look waits for the device
        for row in rows:
            if told[lengths.index(self.lengths[row])][row]:
                self.finished_at.setdefault(row, self.lengths[row])
        if self.streamer is not None:  # a token is put out when every row has it
            ready = min((length for row, length in enumerate(self.lengths) if not self.is_done(row)), default=None)
            for column in self.sequences(ready)[:, self.num_streamed :].cpu().unbind(1):
                self.streamer.put(column)
                self.num_streamed += 1

    def up_to(self, length: int, kept: dict | None) -> tuple[torch.Tensor, ...] | None:
        """What was kept (`scores` or `logits`) of all tokens up to this length, as transformers has it."""
        return None if kept is None else tuple(kept[column] for column in range(self.prompt_length, length))

    def sequences(self, width: int | None = None) -> torch.Tensor:
        """(B, width) of what was generated, finished rows padded. None: as wide as it is once all is done."""
        if width is None:
            width = max(self.lengths if self.pads_finished else self.finished_at.values())
        token_ids = self.token_ids[:, :width].clone()
        for row, length in enumerate(self.lengths):
            token_ids[row, length:] = self.pad_token
        return token_ids
