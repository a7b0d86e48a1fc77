"""What `ponder-hf train` can be told beyond transformers' TrainingArguments."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS

from .gate import check_factor
from .sampled_steps import check_rule


DTYPES = ("float32", "bfloat16", "auto")
INITIALISATIONS = ("authors", "transformers")


@dataclass
class TrainOptions:
    """One training run.

    Args:
        source: what to start from: a plain base, which is made to ponder, or a pondering checkpoint. A folder or a Hub
            id. None: from scratch, by `config`.
        output: the folder of the run: its checkpoints, and at the end the model.
        data: text files, folders of them, or data sets; see ponder_hf.data.load_blocks.
        fields: pondering fields that were asked for; see PonderingConfig.
        arguments: fields of TrainingArguments that were asked for. All others are as the recipe has them.
        config: a config.json, or the folder or Hub id that has one, plain or pondering: train it from scratch.
        tokenizer: a folder or Hub id with a tokenizer, where `source` or `config` has none or another is wanted.
        revision: branch, tag or commit of `source` on the Hub.
        initialisation: of a model from scratch: "authors" or "transformers".
        dtype: of the weights: "float32", "bfloat16", or "auto", as they are stored.
        block_size: tokens in a row; None: as many as the model has positions, at most 2048.
        text_field: of .jsonl and .parquet files and data sets.
        data_name, split: the configuration and the split of a data set.
        streaming: read the data while training, and never hold it whole. Needs a number of steps.
        shuffle_buffer: streaming, from how many blocks the next one is drawn; 0: in the order of the text.
        validation: files or data sets to evaluate on.
        validation_split: the split of a data set in `validation`; None: "validation" for those of the Hub.
        held_out: without `validation`, the share of the blocks, or their number, to keep apart and evaluate on.
        lora: train a low-rank adapter in place of all weights.
        lora_r, lora_alpha, lora_dropout, lora_target_modules: of the adapter; see peft's LoraConfig.
        draft_heads: train draft heads (modeling/pondering_generate_drafts.py) for a pondering model that stays as is.
        gate_learning_rate_factor: times the learning rate of the model is that of its gate. None: as
            GATE_LEARNING_RATE_FACTOR in gate.py says for a gate of factors from 0, and 1 for the others.
        sampled_steps: S of each training step: "growing", 1, 2, ... up to the model's S, each for an equal
            part of the run; or weights of S = 0, 1, ... to draw it by. None: always the model's S.
        merge: at the end, save the model with the adapter merged into it.
        resume: continue the run in `output`: "last", or the folder of one of its checkpoints.
        overwrite: replace `output` where it is not empty.
        given: the names of those options that were asked for; a resumed run takes all others from its checkpoint.
    """

    source: str | None = None
    output: str | None = None
    data: list = field(default_factory=list)
    fields: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    config: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    initialisation: str = "authors"
    dtype: str = "float32"
    block_size: int | None = None
    text_field: str = "text"
    data_name: str | None = None
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = 0
    validation: list = field(default_factory=list)
    validation_split: str | None = None
    held_out: float | int | None = None
    lora: bool = False
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    lora_target_modules: list = field(default_factory=list)
    draft_heads: bool = False
    gate_learning_rate_factor: float | None = None
    sampled_steps: str | list[float] | None = None
    merge: bool = False
    resume: str | None = None
    overwrite: bool = False
    given: frozenset = frozenset()

    def check(self) -> None:
        """Raise a PonderingError for what can be seen to be wrong without looking at any file."""
        for name, value in self.fields.items():
            PONDERING_FIELDS[name][1](name, value)
        for name in ("lora_r", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PonderingError(f"`{name}` must be at least 1, got {value}")
        if not self.lora_alpha > 0:
            raise PonderingError(f"`lora_alpha` must be > 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise PonderingError(f"`lora_dropout` must be at least 0 and less than 1, got {self.lora_dropout}")
        if self.gate_learning_rate_factor is not None:
            check_factor(self.gate_learning_rate_factor)
        if self.sampled_steps is not None:
            check_rule(self.sampled_steps)
        if self.shuffle_buffer and not self.streaming:
            raise PonderingError("`shuffle_buffer` is for streaming; otherwise all blocks are shuffled: leave it out")
        for name, choices in (("dtype", DTYPES), ("initialisation", INITIALISATIONS)):
            if getattr(self, name) not in choices:
                raise PonderingError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._check_together()

    def _check_together(self):
        if not self.output:
            raise PonderingError("no folder to write: give one as `output`")
        if self.resume and self.overwrite:
            raise PonderingError("`resume` and `overwrite` contradict each other: give one of them")
        if self.resume is None:
            if (self.source is None) == (self.config is None):
                raise PonderingError(
                    "give either `source`, a model to start from, or `config`, one to train from scratch"
                )
            if not self.data:
                raise PonderingError("no data to train on: give files or data sets as `data`")
            for name, needed in _NEEDS.items():
                if getattr(self, name) != getattr(type(self)(), name) and not getattr(self, needed):
                    raise PonderingError(f"`{name}` says nothing without `{needed}`: give both, or leave it out")
        if self.validation and self.held_out is not None:
            raise PonderingError("`validation` and `held_out` are two ways to say one thing: give one of them")
        if self.lora and self.config is not None:
            raise PonderingError("`lora` adapts a trained model, `config` makes a new one: give `source` instead")
        if self.draft_heads and (self.config is not None or self.lora):
            other = "lora" if self.lora else "config"
            raise PonderingError(
                f"`draft_heads` trains nothing else: leave out `{other}`, and train draft heads for the model later"
            )
        for name in ("gate_learning_rate_factor", "sampled_steps"):
            if self.draft_heads and getattr(self, name) is not None:
                raise PonderingError(f"`draft_heads` trains nothing else: leave out `{name}`")
        if self.merge and not self.lora:
            raise PonderingError("`merge` merges an adapter, but there is none: add `lora`, or leave it out")

    def as_dict(self) -> dict[str, Any]:
        """Everything as values that JSON can hold."""
        return {name: getattr(self, name) for name in (*OPTION_NAMES, "fields")}

    @property
    def folder(self) -> Path:
        """The output as an absolute path."""
        return Path(str(self.output)).expanduser().absolute()

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.validation) or self.held_out is not None


# What would be passed over in silence without the other. A resumed run has the other from its checkpoint.
_NEEDS = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), "lora"),
    "initialisation": "config",
    "validation_split": "validation",
}
_OTHERS = ("fields", "arguments", "given")
OPTION_NAMES = tuple(each.name for each in dataclasses.fields(TrainOptions) if each.name not in _OTHERS)
