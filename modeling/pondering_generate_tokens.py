"""From logits to text while tokens are drafted: choosing tokens, and when to stop.

Whatever is drafted, the text is the one that plain pondering would have given. Greedy decoding takes the best score.
Sampling does as well, after adding noise to the scores: the largest of score + Gumbel noise is a sample from the
softmax of the scores. The noise of a token's place is drawn once and the same for a draft and for the final choice, so
both choose alike wherever their scores are alike, and the final choice is a sample that no draft can bias.
"""

import torch


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
