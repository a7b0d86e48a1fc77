"""The wave: the passes of successive tokens in one batched forward pass.

Pass i of a token needs pass i - 1 of the same token, and pass i of the tokens before it. So pass S of token t, pass
S - 1 of token t + 1, ... and pass 0 of token t + S may all run at once, as soon as somebody guesses the tokens t + 1
.. t + S. One such batched forward pass is a tick. While the guesses are right each tick finishes a token; a wrong one
is replaced, what was in flight behind it is abandoned, and the replacement begins again with pass 0:

    tick          n         n + 1     n + 2     n + 3
    pass 0      t + 2       t + 3     t + 4     t + 3'     the guess of t + 3 was wrong
    pass 1      t + 1       t + 2     t + 3       -
    pass 2        t         t + 1     t + 2       -

Passes are batch rows (pondering_wave_cache.py); masks and positions are those of an ordinary left-padded batch.
"""

import inspect
import itertools
import math

import torch

from .pondering_backbone import run_backbone
from .pondering_errors import PonderingError
from .pondering_vocabulary_embedding import PonderingEmbedding
from .pondering_wave_cache import WaveCache


SOURCE = 0.5  # the rank of a draft that its source puts in place of pass 0's prediction; pass i has rank i


class Flight:
    """The tokens of one prompt that are under way: the newest true one and the drafts behind it, oldest first.

    column: of the first. tokens: their ids, in successive columns. stages: the pass that each runs next, falling.
    ranks: who gave each of them. opinions: what else was said of its place so far, {rank: token}.
    num_verdicts, num_hits: how often the last pass met a draft, and how often the draft was right.
    """

    worth = 0.3  # a draft is worth its row in the batch where the ones before it have this chance to be right
    memory = 0.9  # how much of a running mean a new observation leaves

    def __init__(self, column, token):
        self.column, self.tokens, self.stages, self.ranks, self.opinions = column, [token], [0], [None], [{}]
        self.num_verdicts = self.num_hits = 0
        self.hit_rate = 1.0  # of late
        # (later rank, earlier rank): where they differ, how much more often the later one is right, -1 .. 1.
        self.advantages = {}

    def advantage(self, rank, other):
        """How much better than `other` this rank is where they differ. Later passes begin with a good name."""
        return self.advantages.get((rank, other), 0.5 if SOURCE not in (rank, other) else 0.0)

    @property
    def num_worthwhile(self):
        """How many drafts in a row are worth their rows, at the rate of late; never fewer than two."""
        if self.hit_rate >= 1:
            return math.inf
        return 1 + int(math.log(self.worth) / math.log(max(self.hit_rate, self.worth)))

    def settle(self, predicted, num_steps, num_drafts, num_columns, corrects=True, drafted=None):
        """Move on by one tick.

        Args:
            predicted: for each pass, the token that it now predicts to follow the one that it has just run.
            num_steps: S.
            num_drafts: how many drafts may be under way.
            num_columns: drafts stay below this column.
            corrects: whether a pass before the last one may replace a draft that it does not predict. It does so
                unless it was wrong more often than not of late where it differed from whoever gave the draft.
            drafted: the draft that its source would put in place of what pass 0 predicts, or None.

        Returns:
            The next true token, where a token has come out of pass S, or None.
        """
        tokens, stages = self.tokens, self.stages
        final = predicted[num_steps] if stages[0] == num_steps else None
        settled = 0 if final is None else 1
        if final is not None and len(tokens) > 1:
            self._learn(final)
        for index, stage in enumerate(stages):
            is_last, is_final = index + 1 == len(tokens), stage == num_steps
            token, rank = predicted[stage], stage
            opinions = {} if is_last else self.opinions[index + 1]
            opinions[rank] = token
            if is_last:
                may = is_final or (index + 1 - settled <= num_drafts and self.column + index + 1 < num_columns)
                if stage == 0 and not is_final and drafted not in (None, token):
                    opinions[SOURCE] = drafted
                    if self.advantage(SOURCE, 0) >= 0:
                        token, rank = drafted, SOURCE
            else:
                may = tokens[index + 1] != token and (
                    is_final or (corrects and self.advantage(rank, self.ranks[index + 1]) >= 0)
                )
            if may:
                behind = slice(index + 1, None)
                tokens[behind], stages[behind] = [token], [-1]
                self.ranks[behind], self.opinions[behind] = [rank], [opinions]
            if may or is_last:
                break
        self.stages = [stage + 1 for stage in stages[settled:]]
        self.tokens, self.ranks, self.opinions = tokens[settled:], self.ranks[settled:], self.opinions[settled:]
        self.column += settled
        return final

    def _learn(self, final):
        """From the true token in the place of the first draft: how good the draft and the opinions of it were."""
        is_right, opinions = self.tokens[1] == final, self.opinions[1]
        self.num_verdicts += 1
        self.num_hits += is_right
        self.hit_rate += (1 - self.memory) * (is_right - self.hit_rate)
        for other, rank in itertools.combinations(sorted(opinions), 2):
            if opinions[rank] != opinions[other]:
                now = (opinions[rank] == final) - (opinions[other] == final)
                before = self.advantage(rank, other)
                self.advantages[rank, other] = before + (1 - self.memory) * (now - before)


class Wave:
    """The model's side of the wave: runs ticks.

    Args:
        model: a PonderingForCausalLM.
        past_key_values: its step cache after the prompt.
        num_steps: S.
        attention_mask: (B, T) of the prompt, or None.
        position_ids: (B, T) of the prompt, or None.
        num_columns: how many columns there will be at most.
        draft_source: see pondering_drafts.py.
        autocast: (whether it is on, its dtype) in which the model's forward pass computes; None: as here and now.
    """

    def __init__(
        self,
        model,
        past_key_values,
        num_steps,
        attention_mask,
        position_ids,
        num_columns,
        draft_source,
        autocast=None,
    ):
        self.model, self.backbone, self.num_steps = model, model.backbone, num_steps
        config = model.config
        self.cache = WaveCache(past_key_values, config.num_hidden_layers, num_steps + 1, num_columns)
        self.batch_size, self.prompt_length = self.cache.batch_size, self.cache.prompt_length
        self.draft_source, self.autocast = draft_source, autocast
        self.num_ticks = self.num_rows_run = 0
        # Where it computes, which is not where its weights wait while it does not (offloading).
        self.device = past_key_values.layers[0].keys.device
        has_hooks = any(hasattr(part, "_hf_hook") for part in model.modules())
        self.mode = torch.no_grad if has_hooks else torch.inference_mode  # hooks put weights in while a module runs
        self.input_embeddings = model.get_input_embeddings()
        self.embedding = PonderingEmbedding(self.backbone, config)
        num_rows = self.batch_size * (num_steps + 1)
        self.inputs = None  # x of each row in the coming tick: (rows, d)
        self.row_ids = torch.arange(num_rows, device=self.device)
        self.columns = torch.arange(self.prompt_length, device=self.device)
        self.offsets = self._position_offsets(attention_mask, position_ids)
        self.is_padding = None
        if attention_mask is not None and not bool(attention_mask.all()):
            self.is_padding = ~attention_mask.to(self.device).bool().repeat(num_steps + 1, 1)
        self.mask_kind = mask_kind(self.backbone)
        self.window = getattr(self.backbone.config, "sliding_window", None)

    def _position_offsets(self, attention_mask, position_ids):
        """What to add to a column to get its position: (rows, 1)."""
        if position_ids is not None:
            last = position_ids[:, -1].expand(self.batch_size)
        elif attention_mask is not None:
            last = (attention_mask.long().sum(-1) - 1).clamp(min=0)
        else:
            last = torch.full((self.batch_size,), self.prompt_length - 1)
        offsets = last.to(self.device) - (self.prompt_length - 1)
        return offsets.repeat(self.num_steps + 1).unsqueeze(1)

    def tick(self, flights, entering):
        """Run the next pass of everything in flight.

        Args:
            flights: a Flight, or None, for each of the B prompts.
            entering: (B,) token ids, for pass 0.

        Returns:
            (first, logits): logits (n, B, V) of passes first, first + 1, ..., of the drafts' source but for the last
            pass S. What belongs to no token is meaningless.
        """
        with self.mode():
            if self.autocast is None:
                return self._tick(flights, entering)
            enabled, dtype = self.autocast
            with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
                return self._tick(flights, entering)

    def _tick(self, flights, entering):
        self.num_ticks += 1
        columns, first, last = self._layout(flights)
        size = self.batch_size
        rows = slice(first * size, (last + 1) * size)
        self.num_rows_run += len(columns)
        if first == 0:
            config = self.model.config
            embedded = self.input_embeddings(entering.unsqueeze(1)).squeeze(1)
            if self.inputs is None:
                self.inputs = embedded.new_zeros(len(self.row_ids), embedded.shape[1])
            self.inputs[:size] = _scaled(embedded, config.input_scale * config.embedding_scale)
        hidden_states = run_backbone(
            self.backbone,
            self.inputs[rows].unsqueeze(1),
            past_key_values=self.cache.layers,
            use_cache=True,
            **self._place(rows, columns),
        ).last_hidden_state.squeeze(1)
        num_pondering = size * (min(last + 1, self.num_steps) - first)
        pondering_states, last_states = hidden_states[:num_pondering], hidden_states[num_pondering:]
        drafted = self.draft_source(pondering_states.view(-1, size, hidden_states.shape[-1]), first)
        # The passes' own predictions are drafts where the source gives none, and what is pondered over, which goes
        # without their logits where it can.
        without_logits = not self.embedding.makes_use_of_logits(pondering_states)
        drafted_states = pondering_states if drafted is None else drafted.flatten(0, 1).to(hidden_states.device)
        states = [drafted_states, last_states]
        if drafted is not None and not without_logits:
            states.insert(0, pondering_states)
        logits = self.embedding.logits(torch.cat(states))
        if without_logits and num_pondering:
            self._ponder(rows.start, self.embedding(pondering_states.unsqueeze(0))[0])
        elif num_pondering:
            self._ponder(rows.start, self.embedding.of_logits(logits[:num_pondering]))
        logits = logits[-len(hidden_states) :]
        return first, logits.view(-1, size, logits.shape[-1])

    def _layout(self, flights):
        """(column of each row or -1, first pass, last pass) of the passes that have something to run."""
        size = self.batch_size
        first = min(flight.stages[-1] for flight in flights if flight is not None)
        last = max(flight.stages[0] for flight in flights if flight is not None)
        columns = [-1] * (size * (last - first + 1))
        for prompt, flight in enumerate(flights):
            if flight is not None:
                for index, stage in enumerate(flight.stages):
                    columns[(stage - first) * size + prompt] = flight.column + index
        return columns, first, last

    def _place(self, rows, columns):
        """Set the cache's place; the mask and the positions for the backbone."""
        length = max(columns) + 1
        unused = self.cache.reserve(length)
        if len(self.columns) < length:
            self.columns = torch.arange(2 * length, device=self.device)
        # A row without a token reads the prompt's last column: one value at least must not be masked.
        first_read = self.prompt_length - 1
        where = torch.tensor(
            [
                [unused if column < 0 else column for column in columns],
                [max(column, first_read) for column in columns],
            ],
            device=self.device,
        )
        writes, reads = where.unsqueeze(-1).unbind()
        self.cache.set_place(rows, self.row_ids[rows], writes[:, 0], length)
        hidden = self.columns[:length] > reads
        if self.is_padding is not None:
            hidden[:, : self.prompt_length] |= self.is_padding[rows]
        return {"attention_mask": self._mask(hidden, reads, length), "position_ids": reads + self.offsets[rows]}

    def _mask(self, hidden, reads, length):
        if self.mask_kind == "flat":
            return (~hidden).long()
        if self.mask_kind == "full":
            return self._shaped(hidden)
        windowed = self._shaped(hidden | (self.columns[:length] <= reads - self.window))
        if self.mask_kind == "window":
            return windowed
        return {"full_attention": self._shaped(hidden), "sliding_attention": windowed}

    def _shaped(self, hidden):
        """(rows, length) to (rows, 1, 1, length), as attention adds it: every layer would make that of booleans."""
        dtype = self.inputs.dtype
        return hidden.to(dtype).mul_(torch.finfo(dtype).min)[:, None, None]

    def _ponder(self, start, embedding):
        """Make the inputs of the following passes. embedding: (n, d), of the rows from `start` on."""
        stop = start + len(embedding)
        embedding = self.model.finish_embedding(embedding).to(self.inputs.device)
        self.inputs[start + self.batch_size : stop + self.batch_size] = self.inputs[start:stop] + embedding

    def give_back(self, length):
        """The step cache with `length` columns."""
        return self.cache.give_back(length)


def without_inference_tensors(model):
    """The model, with every tensor that a module has replaced in inference mode (some rotations do) as a usual one."""
    for part in model.modules():
        for tensors in (part._buffers, part.__dict__):
            for name, value in tensors.items():
                if torch.is_tensor(value) and value.is_inference():
                    tensors[name] = value.clone()
    return model


def mask_kind(backbone):
    """What kind of mask the backbone's layers take when each row of a batch stands at a column of its own.

    "full": (rows, 1, 1, columns). "window": the same, for sliding windows in all layers. "mixed": both, as a dict by
    the kind of layer. "flat": (rows, columns), for attention that makes its own masks or biases.
    """
    config = backbone.config
    if config.model_type == "gpt_neo":
        raise PonderingError(
            "`num_draft_tokens` does not work with model_type 'gpt_neo', whose local attention counts columns from "
            "the end of the cache: set num_draft_tokens=0"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds:
        raise PonderingError("`num_draft_tokens` does not work with chunked attention: set num_draft_tokens=0")
    has_windows = "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None)
    decoder = backbone.base_model
    has_alibi = getattr(config, "alibi", False) or "position_ids" not in inspect.signature(decoder.forward).parameters
    if has_alibi or config._attn_implementation not in ("sdpa", "eager"):
        if has_windows:
            raise PonderingError(
                f"`num_draft_tokens` needs attn_implementation 'sdpa' or 'eager' with sliding windows, "
                f"not {config._attn_implementation!r}"
            )
        return "flat"
    if not has_windows:
        return "full"
    return "mixed" if kinds else "window"


def _scaled(tensor, factor):
    return tensor if factor == 1 else tensor * factor
