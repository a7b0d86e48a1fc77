"""Everything that the demo checks and loads before it writes anything."""

import dataclasses
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.conversion import check_tokenizer, load_tokenizer, open_checkpoint
from ponder_hf.conversion.load_model import understand_plain
from ponder_hf.conversion.whole_folder import check_destination
from ponder_hf.data.blocks import Blocks, pack_all
from ponder_hf.errors import fitting, reading, understanding
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS
from ponder_hf.modeling.pondering_backbone_checkpoint import is_authors_config

from .corpus import Corpus, byte_tokenizer, own_text, pieces, standard_library
from .experiment import FULL, QUICK, Size, make_base, spread


_PACKAGES = ("accelerate", "matplotlib")
_PROMPTS = ("def ", "import ")  # for a model of Python's source files
_PROMPT_TOKENS = 16  # for any other: the beginnings of held-out blocks
_MORE_TEXT = 2  # times the text that is trained on must be left for a model that gets fresh text


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose; see `ponder-hf demo --help`. None: the demo's own choice."""

    output: str = "ponder-demo"
    overwrite: bool = False
    text: tuple[str, ...] = ()
    text_field: str = "text"
    base: str | None = None
    pondering_steps: int = 3
    pondering_gate: str = "zero_init_matrix"
    text_blocks: int | None = None
    seed: int = 0
    steps: int | None = None
    base_steps: int | None = None
    learning_rate: float | None = None
    quick: bool = False
    device: str | None = None

    @property
    def pondering_fields(self) -> dict[str, Any]:
        return {"pondering_steps": self.pondering_steps, "pondering_gate": self.pondering_gate}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the experiment needs.

    Args:
        base: a plain model, with random weights where none was given.
        blocks: all text that there is to train on.
        text_blocks: how many of these the models see, again and again.
        more_text: the others, in an order by the seed; None where they are not many more.
        watched: the held-out blocks that losses are measured on.
        bytes_per_token: of the held-out text.
    """

    options: Options
    size: Size
    learning_rate: float
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    blocks: Blocks
    text_blocks: int
    more_text: Blocks | None
    watched: Blocks
    bytes_per_token: float
    prompts: tuple[str, ...]

    @property
    def base_is_given(self) -> bool:
        return self.options.base is not None

    def text(self, number: int) -> Blocks:
        """The first so many blocks, in an order by the seed."""
        return Blocks(self.blocks.rows[:number]).shuffled(self.options.seed)


def prepare(options: Options) -> Setup:
    """Check the options, read the text, and load the base or make one.

    Raises:
        PonderingError: something cannot be used. Nothing was written.
    """
    size = QUICK if options.quick else FULL
    _check_options(options)
    if options.text:
        corpus = own_text(options.text, options.text_field, size.characters)
    else:
        corpus = standard_library(size.characters)
    if options.base is None:
        learning_rate = size.learning_rate
        tokenizer = byte_tokenizer(size.positions)
        base = make_base(size, len(tokenizer), options.seed)
    else:
        learning_rate = size.given_learning_rate
        tokenizer, base = _load_base(options)
        positions = getattr(base.config, "max_position_embeddings", None) or size.block_size
        size = dataclasses.replace(size, block_size=min(size.block_size, positions))
    blocks = pack_all(pieces(corpus.training), tokenizer, size.block_size, "the text")
    text_blocks = min(options.text_blocks or size.text_blocks, len(blocks))
    held_out = pack_all(pieces(corpus.held_out), tokenizer, size.block_size, "the held-out part of the text")
    more_rows = blocks.rows[text_blocks:]
    watched = spread(held_out, size.held_out_blocks)
    held_out_text = tokenizer.decode(held_out.rows.flatten().tolist(), skip_special_tokens=True)
    return Setup(
        options=options,
        size=size,
        learning_rate=options.learning_rate or learning_rate,
        corpus=corpus,
        tokenizer=tokenizer,
        base=base,
        blocks=blocks,
        text_blocks=text_blocks,
        more_text=Blocks(more_rows).shuffled(options.seed) if len(more_rows) >= _MORE_TEXT * text_blocks else None,
        watched=watched,
        bytes_per_token=len(held_out_text.encode("utf-8")) / held_out.rows.numel(),
        prompts=_choose_prompts(options, tokenizer, watched),
    )


def _check_options(options):
    for name in ("pondering_steps", "pondering_gate"):
        PONDERING_FIELDS[name][1](name, getattr(options, name))
    for name in ("steps", "base_steps", "text_blocks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise PonderingError(f"`{name}` must be at least 1, got {value}")
    if options.base is not None and options.base_steps is not None:
        raise PonderingError("`base_steps` is for the demo's own base; one that is given is not trained: leave it out")
    rate = options.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise PonderingError(f"`learning_rate` must be a finite number > 0, got {rate}")
    if not 0 <= options.seed < 2**32:
        raise PonderingError(f"`seed` must be at least 0 and below 2 ** 32, got {options.seed}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PonderingError(f'the demo needs {" and ".join(missing)}: pip install "ponder-hf[train,viz]"')
    base_folder = options.base if options.base and Path(options.base).expanduser().is_dir() else None
    destination = check_destination(options.output, options.overwrite, base_folder)
    for path in options.text:
        if destination in Path(os.path.realpath(Path(path).expanduser())).parents:
            raise PonderingError(f"{path} lies in {options.output}, which would be replaced: give another output")


def _load_base(options):
    """The tokenizer and the plain model, in float32, of the checkpoint that the user named."""
    found = open_checkpoint(options.base)
    if found.is_pondering or is_authors_config(found.config):
        raise PonderingError(f"{found.name} ponders already: give a plain checkpoint as the base")
    tokenizer = load_tokenizer(found)
    with understanding(found.name):
        config = PonderingConfig.from_dict({"base_config": found.config, **options.pondering_fields})
    check_tokenizer(tokenizer, config, found.name)
    understand_plain(found, options.pondering_fields)
    with reading(found.name), fitting(found.name):
        model = PonderingForCausalLM.from_base(found.folder, dtype=torch.float32, **options.pondering_fields)
    return tokenizer, model.to_base().eval()


def _choose_prompts(options, tokenizer, watched):
    if not options.text:
        return _PROMPTS
    rows = watched.rows[[0, len(watched) // 2], :_PROMPT_TOKENS].tolist()
    return tuple(dict.fromkeys(tokenizer.decode(row, skip_special_tokens=True) for row in rows))
