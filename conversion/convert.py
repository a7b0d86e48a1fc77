"""Make a pondering checkpoint from a plain one, or from one that the method's authors wrote."""

import json
import re
from contextlib import contextmanager

import torch
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.errors import fitting, reading, understanding
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS, unknown_field
from ponder_hf.modeling.pondering_backbone import backbone_class
from ponder_hf.modeling.pondering_backbone_checkpoint import AUTHORS_WEIGHTS, read_base_config, unflagged_weight
from ponder_hf.modeling.pondering_backbone_checkpoint import logger as from_base_logger

from .dtype import stored_dtype
from .headers import read_json
from .source import open_source
from .travel import TOKENIZER_CONFIG, TOKENIZER_FILES, copy_files, travelling_files
from .writer import check_destination, check_space, whole_folder


SHARD_SIZE = "5GB"
# Buffers that transformers once saved and that not every class lists as ignored.
_BUFFERS = (r"\.masked_bias$", r"rotary_emb\.inv_freq$")


def convert(
    source,
    destination,
    *,
    overwrite=False,
    max_shard_size=SHARD_SIZE,
    revision=None,
    authors=False,
    ignore_fields=(),
    ignore_code=False,
    **pondering_fields,
):
    """Write a pondering checkpoint that holds the weights of a plain one, in their dtype.

    Args:
        source: a folder or a Hub id: a causal language model of transformers, or a checkpoint of the authors', whose
            own pondering fields are kept where `pondering_fields` does not say otherwise.
        destination: the folder to write, whole or not at all.
        overwrite: replace a destination that is not empty.
        max_shard_size: of one file of weights, such as "5GB".
        revision: the branch, tag or commit of a model on the Hub.
        authors: it is a model of the authors' whose config.json lacks their flags: S = 3, embedding_scale =
            sqrt(hidden size) and input_scale = S, where neither config.json nor `pondering_fields` say otherwise.
        ignore_fields: names of fields of config.json to leave out.
        ignore_code: leave the source's own code behind.
        pondering_fields: see PonderingConfig.

    Returns:
        What was done, as a dict that JSON can hold. "warnings" says what may not be as it was meant.

    Raises:
        PonderingError: the source, the destination or a field cannot be used; nothing was written.
    """
    for name, value in pondering_fields.items():
        if name not in PONDERING_FIELDS:
            raise unknown_field(name)
        PONDERING_FIELDS[name][1](name, value)
    check_shard_size(max_shard_size)
    check_destination(destination, overwrite)
    found = open_source(source, revision)
    path = check_destination(destination, overwrite, found.folder)
    if found.is_pondering:
        raise PonderingError(
            f"{found.name} is a pondering checkpoint already: use it as it is, or get its plain backbone first, with "
            f"`ponder-hf export {found.name} DEST`"
        )
    reading_arguments = {"authors": authors, "ignore_fields": ignore_fields, "ignore_code": ignore_code}
    authors_fields, empty_model = understand_plain(found, pondering_fields, **reading_arguments)
    names = travelling_files(found.folder)
    check_space(path, found.num_bytes)
    model = load_converted(found, empty_model, {**pondering_fields, **reading_arguments})
    tokenizer_class = _unnamed_tokenizer(found) if any(name.name in TOKENIZER_FILES for name in names) else None
    if tokenizer_class is not None:
        model.config.tokenizer_class = tokenizer_class
    with whole_folder(destination, overwrite) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_files(names, found.folder, folder)
        if tokenizer_class is not None:
            _name_tokenizer(folder / TOKENIZER_CONFIG, tokenizer_class)
    return {
        "source": found.name,
        "revision": found.revision,
        "destination": str(path),
        "model_type": model.config.base_config.model_type,
        "authors_checkpoint": bool(authors_fields),
        "pondering": {name: getattr(model.config, name) for name in PONDERING_FIELDS},
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "files": sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()),
        "warnings": plain_warnings(found, authors_fields),
    }


@contextmanager
def _no_second_warning():
    """Within it `from_base` does not log what `plain_warnings` says, so that nobody reads it twice."""
    was_disabled, from_base_logger.disabled = from_base_logger.disabled, True
    try:
        yield
    finally:
        from_base_logger.disabled = was_disabled


def plain_warnings(found, authors_fields):
    """What may be another model than it is taken for: lines about the plain checkpoint `found`, a Source."""
    warnings = [unflagged_weight(found.tensors, authors_fields)]
    tokenizer_config = found.folder / TOKENIZER_CONFIG
    code = read_json(tokenizer_config).get("auto_map") if tokenizer_config.is_file() else None
    if code:
        warnings.append(
            f"the tokenizer of {found.name} has code of its own (`auto_map` in {TOKENIZER_CONFIG}), which is never "
            "run and stays behind: where transformers has no class for it, use the tokenizer of the source"
        )
    return [warning for warning in warnings if warning is not None]


def load_converted(found, empty_model, arguments, dtype=None):
    """The PonderingForCausalLM that holds the weights of the plain checkpoint `found`, a Source.

    What may not be as it was meant, `plain_warnings` says.

    Args:
        empty_model: as understand_plain gives it.
        arguments: of from_base: pondering fields, and how to read config.json.
        dtype: of the weights; None: as they are stored.

    Raises:
        PonderingError: the weights cannot be used.
    """
    stored = stored_dtype(found, _unused(found.tensors, empty_model))
    with reading(found.name), fitting(found.name), _no_second_warning():
        model = PonderingForCausalLM.from_base(found.folder, dtype=dtype or stored, **arguments)
    # The base's id on the Hub, for the model card; a path of this machine says nothing elsewhere.
    model.config.base_config._name_or_path = found.name if found.revision else ""
    return model


def understand_plain(found, pondering_fields, **reading_arguments):
    """What an authors' checkpoint says of pondering, and the backbone without weights; raise if none can be built.

    reading_arguments: `authors`, `ignore_fields` and `ignore_code`, as convert takes them.
    """
    with understanding(found.name):
        base_config, authors_fields = read_base_config(found.folder, pondering_fields, **reading_arguments)
        PonderingConfig(base_config, **{**authors_fields, **pondering_fields})
        model_class = backbone_class(base_config)
        with torch.device("meta"):
            empty_model = model_class(base_config)
    return authors_fields, empty_model


def _unused(names, empty_model):
    """Those of the stored `names` that are no weights: the model's class ignores them, or they are dropped here."""
    expected = set(empty_model.state_dict())
    prefix = empty_model.base_model_prefix
    ignored = (*(empty_model._keys_to_ignore_on_load_unexpected or ()), *_BUFFERS, *map(re.escape, AUTHORS_WEIGHTS))
    return {
        name
        for name in names
        if any(re.search(pattern, name) for pattern in ignored)
        # The patterns are loose: "attn.bias", a mask of GPT-2's, is also found in "c_attn.bias", a weight.
        and not {name, f"{prefix}.{name}"} & expected
    }


def _unnamed_tokenizer(found):
    """The class of the tokenizer where its own files do not name it, but config.json or the model_type; or None."""
    tokenizer_config = found.folder / TOKENIZER_CONFIG
    if tokenizer_config.is_file() and read_json(tokenizer_config).get("tokenizer_class") is not None:
        return None
    named = found.config.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(found.config.get("model_type"))
    return "PreTrainedTokenizerFast" if named == "TokenizersBackend" else named  # as transformers 4.57 calls it, too


def _name_tokenizer(path, tokenizer_class):
    """Name the class in tokenizer_config.json, where every transformers finds it without the model's configuration."""
    settings = read_json(path) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "tokenizer_class": tokenizer_class}, indent=2) + "\n", encoding="utf-8")


def check_shard_size(size):
    """Raise a PonderingError unless `size` is a number of bytes, or one with a unit such as "5GB"."""
    if not (isinstance(size, int) and size > 0) and not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*[KMGT]B", str(size), re.I):
        raise PonderingError(f"`max_shard_size` must be a size such as 5GB or 500MB, got {size!r}")
