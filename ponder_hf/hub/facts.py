"""What is known about a model, for its card: from its files, its base's card and a Trainer. Nothing is guessed."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import EntryNotFoundError, validate_repo_id

from ponder_hf import __version__
from ponder_hf.conversion.files import has_tokenizer, read_json
from ponder_hf.conversion.stored_weights import read_headers, shard_names
from ponder_hf.modeling.configuration_pondering import PONDERING_FIELDS, PonderingConfig

from .code import code_of, installed_code, sha256


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PASS = re.compile(r"eval_pass_(\d+)_loss")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Facts:
    """What a card may say. None or empty: not known, and the card is silent about it.

    fields: pondering fields that are not at their defaults. licence: the keys license, license_name and license_link.
    training: words to what they were. pass_losses: held-out loss in nats per token of pass 0 .. S. code: the shipped
    files to their SHA-256; release: whose they are, where they are those of this release.
    evaluated_on: the id of a data set.
    """

    name: str | None = None
    repository: str | None = None
    backbone: str | None = None
    num_layers: int | None = None
    parameters: int | None = None
    dtype: str | None = None
    pondering_steps: int | None = None
    fields: dict = field(default_factory=dict)
    is_adapter: bool = False
    has_tokenizer: bool = False
    base_model: str | None = None
    licence: dict = field(default_factory=dict)
    languages: tuple = ()
    datasets: tuple = ()
    data: tuple = ()
    training: dict = field(default_factory=dict)
    evaluation_loss: float | None = None
    pass_losses: tuple = ()
    code: dict = field(default_factory=dict)
    release: str | None = None
    more_tags: tuple = ()
    evaluated_on: str | None = None

    @property
    def passes(self):
        return None if self.pondering_steps is None else self.pondering_steps + 1

    @property
    def perplexity(self):
        return None if self.evaluation_loss is None else math.exp(self.evaluation_loss)

    @property
    def tags(self):
        tags = ["pondering", "text-generation", self.backbone]
        tags += ["lora", "peft"] if self.is_adapter else ["custom_code"]
        return list(dict.fromkeys(tag for tag in [*tags, *self.more_tags] if tag))

    @property
    def evaluation_results(self):
        """The evaluation as huggingface_hub's EvalResults."""
        if self.evaluation_loss is None:
            return None
        name = self.evaluated_on
        where = {"dataset_type": name or "text", "dataset_name": name or "held-out text"}
        where["task_type"] = "text-generation"
        numbers = {"loss": self.evaluation_loss, "perplexity": self.perplexity}
        return [
            EvalResult(**where, metric_type=name, metric_name=f"held-out {name}", metric_value=round(value, 4))
            for name, value in numbers.items()
        ]


def facts_of_folder(folder, repository=None):
    """What the files of a checkpoint say. `repository`: the Hub id that it will have."""
    folder = Path(folder)
    known = Facts(
        name=(repository or folder.resolve().name).rpartition("/")[2],
        repository=repository,
        has_tokenizer=has_tokenizer(folder),
    )
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return replace(known, is_adapter=True, base_model=hub_id(base))
    config = read_json(folder / "config.json")
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
        dtype=DTYPES.get(next(iter(dtypes))) if len(dtypes) == 1 else None,
        pondering_steps=config["pondering_steps"],
        fields={n: config[n] for n in defaults if n in config and config[n] != defaults[n] and n != "pondering_steps"},
        base_model=hub_id(base.get("_name_or_path")),
        code={name: sha256(content) for name, content in code.items()},
        release=__version__ if code == installed_code() else None,
    )


def hub_id(name):
    """`name` if it can be a model's id on the Hub: of two parts, and no folder here."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def with_base_card(facts):
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


def with_training(facts, trainer):
    """Add what a Trainer did: its state, its arguments, and its last evaluation."""
    state, settings = trainer.state, trainer.args
    history = state.log_history
    evaluation = next((row for row in reversed(history) if "eval_loss" in row), {})
    passes = sorted((int(match[1]), value) for key, value in evaluation.items() if (match := _PASS.fullmatch(key)))
    rows = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    training = {}
    if state.global_step:
        training = {
            "optimiser steps": f"{state.global_step:,}",
            "epochs": f"{state.epoch:.2f}" if state.epoch else None,
            "rows in a step": rows,
            "peak learning rate": f"{settings.learning_rate:g}",
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
        evaluation_loss=passes[-1][1] if passes else evaluation.get("eval_loss"),
        pass_losses=tuple(value for _, value in passes),
    )
