"""The model card: written from facts, brought up to date at every push, and never over what a person wrote.

Facts come from a checkpoint's files, its base's card and a Trainer; nothing is guessed. The text lies in sections,
each between `<!-- section: NAME -->` and `<!-- /section -->`. A comment at the end of the card holds a hash of every
section and every key of the metadata as they were written. What no longer has its hash was edited, and what is gone
was taken out: both are left as they are. So is everything outside the sections.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import EntryNotFoundError, validate_repo_id

from ponder_hf import __version__
from ponder_hf.conversion.files import ADAPTER_CONFIG, CONFIG, has_tokenizer, read_json
from ponder_hf.conversion.stored_weights import DTYPE_NAMES, read_headers, shard_names
from ponder_hf.errors import first_line
from ponder_hf.modeling import PonderingError
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS, PonderingConfig
from ponder_hf.vllm import TESTED_BACKBONES

from .code import code_of, installed_code, sha256


if TYPE_CHECKING:  # it takes a while to import
    from transformers import Trainer


TEMPLATE = Path(__file__).with_name("card.md")
CARD = "README.md"

_PASS = re.compile(r"eval_pass_(\d+)_(loss|accuracy|agreement)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SECTION = re.compile(r"<!-- section: (\w+) -->\n(.*?)<!-- /section -->\n?", re.DOTALL)
_STATE = re.compile(r"\n*<!-- ponder_hf wrote (\{.*?\}) -->\n?", re.DOTALL)
# What transformers and peft write by themselves; nobody's words are lost with it.
_GENERIC = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated.",
    "This model card has been generated automatically according to the information the Trainer had access to",
)


@dataclass(frozen=True)
class Facts:
    """What a card may say. None or empty: not known, and the card is silent about it.

    Attributes:
        fields: pondering fields that are not at their defaults.
        licence: the keys license, license_name and license_link.
        training: words to what they were.
        evaluated_on: the id of a data set.
        pass_losses: held-out loss in nats per token of pass 0 .. S.
        pass_accuracies, pass_agreements: shares of tokens, of each pass: predicted, and as the last pass predicts.
        code: the shipped files to their SHA-256.
        release: whose they are, where they are those of this release.
        is_served_by_vllm: whether the plug-in is tested with such a backbone, of which the weights are as they were
            trained.
    """

    name: str | None = None
    repository: str | None = None
    backbone: str | None = None
    num_layers: int | None = None
    parameters: int | None = None
    dtype: str | None = None
    pondering_steps: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    is_adapter: bool = False
    has_tokenizer: bool = False
    base_model: str | None = None
    licence: dict[str, Any] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    evaluated_on: str | None = None
    evaluation_loss: float | None = None
    pass_losses: tuple[float, ...] = ()
    pass_accuracies: tuple[float, ...] = ()
    pass_agreements: tuple[float, ...] = ()
    code: dict[str, str] = field(default_factory=dict)
    release: str | None = None
    is_served_by_vllm: bool = False
    more_tags: tuple[str, ...] = ()

    @property
    def passes(self) -> int | None:
        return None if self.pondering_steps is None else self.pondering_steps + 1

    @property
    def perplexity(self) -> float | None:
        return None if self.evaluation_loss is None else math.exp(self.evaluation_loss)

    @property
    def tags(self) -> list[str]:
        tags = ["pondering", "text-generation", self.backbone]
        tags += ["lora", "peft"] if self.is_adapter else ["custom_code"]
        return list(dict.fromkeys(tag for tag in [*tags, *self.more_tags] if tag))

    @property
    def evaluation_results(self) -> list[EvalResult] | None:
        """The evaluation as huggingface_hub's EvalResults."""
        if self.evaluation_loss is None:
            return None
        name = self.evaluated_on
        perplexities = [math.exp(loss) for loss in self.pass_losses]
        of_passes = {
            "perplexity": perplexities,
            "accuracy": self.pass_accuracies,
            "agreement": self.pass_agreements,
        }
        found = [("loss", "", self.evaluation_loss), ("perplexity", "", math.exp(self.evaluation_loss))]
        found += [
            (metric, f" of pass {index}", value)
            for metric, values in of_passes.items()
            for index, value in enumerate(values)
        ]
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=name or "text",
                dataset_name=name or "held-out text",
                metric_type=metric,
                metric_name=f"held-out {metric}{which}",
                metric_value=round(value, 4),
            )
            for metric, which, value in found
        ]


def facts_of_folder(folder: str | os.PathLike, repository: str | None = None) -> Facts:
    """What the files of a checkpoint say. `repository`: the Hub id that it will have."""
    folder = Path(folder)
    known = Facts(
        name=(repository or folder.resolve().name).rpartition("/")[2],
        repository=repository,
        has_tokenizer=has_tokenizer(folder),
    )
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return replace(known, is_adapter=True, base_model=hub_id(base))
    config = read_json(folder / CONFIG)
    base = config.get("base_config", {})
    tensors = read_headers(folder).values() if shard_names(folder) else ()  # a checkpoint may be sharded otherwise
    dtypes = {tensor.dtype for tensor in tensors}
    defaults = {name: default for name, (default, _) in PONDERING_FIELDS.items()}
    code = {name: content for name, content in code_of(folder).items() if "/" not in name}
    return replace(
        known,
        backbone=base.get("model_type"),
        num_layers=PonderingConfig.from_dict(config).num_hidden_layers,
        # Quantised weights are stored as integers and scales, which are not what anybody calls parameters.
        parameters=None if "quantization_config" in config else sum(math.prod(each.shape) for each in tensors) or None,
        dtype=DTYPE_NAMES.get(next(iter(dtypes))) if len(dtypes) == 1 else None,
        pondering_steps=config["pondering_steps"],
        fields={n: config[n] for n in defaults if n in config and config[n] != defaults[n] and n != "pondering_steps"},
        base_model=hub_id(base.get("_name_or_path")),
        code={name: sha256(content) for name, content in code.items()},
        release=__version__ if code == installed_code() else None,
        is_served_by_vllm=base.get("model_type") in TESTED_BACKBONES and "quantization_config" not in config,
    )


def hub_id(name: Any) -> str | None:
    """`name` if it can be a model's id on the Hub: of two parts, and no folder here."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def with_base_card(facts: Facts) -> Facts:
    """Add what the base's own card says that holds for the new model too: licence and languages.

    A base that the Hub does not know is no base that a card may name.
    """
    if facts.base_model is None:
        return facts
    try:
        HfApi().model_info(facts.base_model)
    except (HfHubHTTPError, OSError):
        return replace(facts, base_model=None)
    try:
        data = ModelCard.load(facts.base_model).data.to_dict()
    except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError):
        return facts  # no card, none that can be read, or one behind a gate
    licence = {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    languages = data.get("language") or ()
    return replace(
        facts,
        licence=facts.licence or licence,
        languages=facts.languages or tuple([languages] if isinstance(languages, str) else languages),
    )


def with_training(facts: Facts, trainer: "Trainer") -> Facts:
    """Add what a Trainer did: its state, its arguments, and its last evaluation."""
    state, settings = trainer.state, trainer.args
    history = state.log_history
    evaluation: dict[str, float] = next((row for row in reversed(history) if "eval_loss" in row), {})
    passes: dict[str, list[float]] = {name: [] for name in ("loss", "accuracy", "agreement")}
    found = [(match, value) for key, value in evaluation.items() if (match := _PASS.fullmatch(key))]
    for match, value in sorted(found, key=lambda each: int(each[0][1])):
        passes[match[2]].append(value)
    rows = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    training = {}
    if state.global_step:
        training = {
            "optimiser steps": f"{state.global_step:,}",
            "epochs": f"{state.epoch:.2f}" if state.epoch else None,
            "rows in a step": rows,
            "peak learning rate": f"{settings.learning_rate:g}",
            # Of PonderingTrainer, where S is not the same in every step.
            "pondering steps in training": _in_words(getattr(trainer, "sampled_steps", None)),
            "schedule": getattr(settings.lr_scheduler_type, "value", settings.lr_scheduler_type),
            "optimiser": getattr(settings.optim, "value", settings.optim),
            "weight decay": f"{settings.weight_decay:g}",
            "seed": settings.seed,
            "last training loss": next((f"{row['loss']:.4f}" for row in reversed(history) if "loss" in row), None),
        }
    return replace(
        facts,
        training={name: value for name, value in training.items() if value is not None},
        # Trainer's own number may contain the losses of earlier passes, weighted.
        evaluation_loss=passes["loss"][-1] if passes["loss"] else evaluation.get("eval_loss"),
        pass_losses=tuple(passes["loss"]),
        pass_accuracies=tuple(passes["accuracy"]),
        pass_agreements=tuple(passes["agreement"]),
    )


def _in_words(rule):
    """How S was chosen for each training step, or None where it was always the model's."""
    if rule is None or isinstance(rule, str):
        return rule
    return "drawn from 0, 1, ... with the weights " + ", ".join(f"{weight:g}" for weight in rule)


def render(facts: Facts) -> str:
    """A new card with what the facts say."""
    data = ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=facts.tags,
        base_model=facts.base_model,
        base_model_relation=None if facts.base_model is None else "adapter" if facts.is_adapter else "finetune",
        datasets=list(facts.datasets) or None,
        language=list(facts.languages) or None,
        eval_results=facts.evaluation_results,
        model_name=facts.name if facts.evaluation_results else None,
        **facts.licence,
    )
    text = str(ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), facts=facts))
    metadata, body = split(text)
    sections = {name: f"{content.strip()}\n" for name, content in _SECTION.findall(body) if content.strip()}
    body = "\n".join(_block(name, content) for name, content in sections.items())
    return _assemble(metadata, body, _state_of(metadata, sections))


def merge(new: str, old: str | None) -> str:
    """The card `new` with everything that a person wrote into the card `old`, and what only that one knows.

    Args:
        new: as `render` or `merge` gives it.
        old: any card; None: there is none.
    """
    if old is None or is_generic(old):
        return new
    (new_metadata, new_body), (old_metadata, old_body) = split(new), split(old)
    state = _state(old)
    written = state.get("sections")
    metadata, keys = _merged(new_metadata, old_metadata, state.get("metadata", {}), _hash_value)
    body = _STATE.sub("\n", old_body)
    if written is None:  # a card of a person's own: only its metadata is completed
        return _assemble(metadata, body, {"metadata": keys, "sections": None})
    new_sections, old_sections = dict(_SECTION.findall(new_body)), dict(_SECTION.findall(body))
    sections, hashes = _merged(new_sections, old_sections, written, _hash)

    def brought_up_to_date(found: re.Match) -> str:
        name, content = found.groups()
        return _block(name, new_sections.get(name, content)) if _hash(content) == written.get(name) else found[0]

    body = _SECTION.sub(brought_up_to_date, body)
    for name in sections:
        if name not in old_sections:
            body = _inserted(body, list(new_sections), name, sections[name])
    return _assemble(metadata, body, {"metadata": keys, "sections": hashes})


def _merged(new: Mapping, old: Mapping, written: Mapping, hash_of: Callable) -> tuple[dict, dict]:
    """Merge two sets of parts of a card by name.

    Args:
        new, old: the name of each part to its content.
        written: to the hash that it had when it was last written here.

    Returns:
        The parts of both; a person's edits, and that a part was taken out, win over `new`. And the hash of each part
        as it was last written here, of which a part that a person wrote has none that fits.
    """
    merged, hashes = dict(old), dict(written)
    for name, content in new.items():
        is_as_written = name in old and hash_of(old[name]) == written.get(name)
        if is_as_written or (name not in old and name not in written):
            merged[name], hashes[name] = content, hash_of(content)
        else:
            hashes.setdefault(name, hash_of(""))
    return merged, hashes


def _inserted(body: str, order: list[str], name: str, content: str) -> str:
    """The text with a new section behind the last one of those that come before it in the template."""
    earlier = order[: order.index(name)]
    at = max((found.end() for found in _SECTION.finditer(body) if found[1] in earlier), default=0)
    return f"{body[:at]}\n{_block(name, content)}\n{body[at:].lstrip()}"


def is_generic(card: str) -> bool:
    """Whether a library wrote the whole card, and not this one."""
    return not _STATE.search(card) and any(words in " ".join(card.split()) for words in _GENERIC)


def is_untouched(card: str) -> bool:
    """Whether a card is as it was written here, or by another library, without any edit by a person."""
    metadata, body = split(card)
    outside = _SECTION.sub("", _STATE.sub("", body)).strip()
    is_as_written = not outside and _state(card) == _state_of(metadata, dict(_SECTION.findall(body)))
    return is_as_written or is_generic(card)


def split(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card as a dict, and the text behind it.

    Raises:
        PonderingError: the metadata is no YAML.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n?(.*)", card, re.DOTALL)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise PonderingError(f"the metadata of {CARD} is no YAML ({first_line(error)}): correct it") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise PonderingError(f"the metadata of {CARD} is no list of keys and values: correct it")
    return metadata or {}, match[2]


def check(card: str) -> None:
    """Raise a PonderingError unless huggingface_hub understands the card's metadata."""
    try:
        ModelCard(card)
    except (ValueError, TypeError) as error:
        raise PonderingError(f"the metadata of {CARD} cannot be used: {first_line(error)}") from error


def _block(name: str, content: str) -> str:
    return f"<!-- section: {name} -->\n{content}<!-- /section -->\n"


def _assemble(metadata: dict, body: str, state: dict) -> str:
    """A whole card. state: the hashes of the metadata's keys and of the sections, None in a card of a person's own."""
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{header}\n---\n\n{body.strip()}\n\n<!-- ponder_hf wrote {json.dumps(state)} -->\n"


def _state_of(metadata: dict, sections: dict) -> dict:
    return {
        "metadata": {key: _hash_value(value) for key, value in metadata.items()},
        "sections": {name: _hash(content) for name, content in sections.items()},
    }


def _state(card: str) -> dict:
    match = _STATE.search(card)
    try:
        return json.loads(match[1]) if match else {}
    except json.JSONDecodeError:
        return {}


def _hash(text: str) -> str:
    return hashlib.sha256("\n".join(line.rstrip() for line in text.strip().splitlines()).encode()).hexdigest()[:12]


def _hash_value(value: Any) -> str:
    return _hash(json.dumps(value, sort_keys=True, default=str))
