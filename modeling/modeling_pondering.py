"""Pondering language models: a causal language model that runs several times before each token.

With token embeddings E, the backbone's decoder f and head W (arXiv 2505.20674, where steps and passes are counted):

    x^0     = input_scale * embedding_scale * e^0
    p^i     = softmax(W f(x^i) / temperature)                 i = 0 .. S-1
    t^i     = p^i (embedding_scale * E)
    x^(i+1) = x^i + t^i                                       or x^i + g * t^i or x^i + G t^i with a gate
    logits  = W f(x^S)

This file holds only that. The backbone is transformers' own model, unchanged; what is particular to it is in
pondering_backbone.py. Positions and masks are the tokens' own, the same in every pass.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .configuration_pondering import PonderingConfig, check_steps, check_vocabulary
from .pondering_backbone import (
    TESTED,
    auxiliary_loss,
    backbone_class,
    backbone_logits,
    backbone_readout,
    run_backbone,
    takes_cache,
    verify_backbone,
    warn_of_what_never_runs,
)
from .pondering_backbone_checkpoint import (
    NeverSaved,
    load_backbone,
    names_in_memory,
    read_base_config,
    split_arguments,
    understand_config,
)
from .pondering_cache import CACHE_NAME, are_packed, given_cache, mark_owner, paged_pass, pass_cache, step_cache
from .pondering_errors import INSTALL_TESTED, PonderingError, did_you_mean, untested_version
from .pondering_generate import PonderingGenerationMixin, current_call, keep_settings
from .pondering_generate_drafts import DraftHeads
from .pondering_generate_exits import PassesWithExits, PonderingExit
from .pondering_vocabulary import scaled
from .pondering_vocabulary_embedding import PonderingEmbedding, PonderingGate, make_gate
from .pondering_vocabulary_loss import (
    PonderingCausalLMOutput,
    causal_lm_loss,
    linear_causal_lm_loss,
    logits_on_demand,
)


# isort: split
# Only so that these files ship: transformers 4.57 follows no imports but those of this file. pondering_vocabulary_cpu
# also puts its functions in place when it is imported.
from .pondering_generate_speculation import speculative_sample  # noqa: F401
from .pondering_generate_tokens import TokenChooser  # noqa: F401
from .pondering_generate_wave import Wave  # noqa: F401
from .pondering_vocabulary_cpu import fast_layers  # noqa: F401


try:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError:
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = None

logger = logging.get_logger(__name__)

# What a class of transformers says about itself. The rest (layers that must not be split, plans of parallelism)
# transformers gathers from the backbone by itself, since 5.0 all of it.
_SAID_BY_CLASSES = (
    "_can_compile_fullgraph _compatible_flash_implementations _is_stateful _keep_in_fp32_modules "
    "_keep_in_fp32_modules_strict _skip_keys_device_placement _supports_attention_backend _supports_context_parallel "
    "_supports_flash_attn _supports_flex_attn _supports_sdpa supports_gradient_checkpointing"
).split()
_LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


class PonderingPreTrainedModel(PreTrainedModel):
    """A backbone, perhaps a gate and draft heads, and the passes over them. Both model classes have the same weights.

    `config.base_config` and the backbone's own `config` are one object.
    """

    config_class = PonderingConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # Until there is a backbone, which checks for itself, with the message that users know; then what its class says.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PonderingConfig) -> None:
        super().__init__(config)
        self.backbone = backbone_class(config.base_config)(config.base_config)
        # Masks that `generate` prepares must be of the kind that the backbone's layers expect.
        self.config._attn_implementation_internal = self.backbone.config._attn_implementation
        # What computes experts, which `generate` of transformers 5.0 changes for a time, where there are any.
        experts = getattr(self.backbone.config, "_experts_implementation", None)
        if experts is not None:
            self.config._experts_implementation_internal = experts
        for name in _SAID_BY_CLASSES:
            if hasattr(self.backbone, name):
                setattr(self, name, getattr(self.backbone, name))
        tied = getattr(self.backbone, "_tied_weights_keys", None)
        if isinstance(tied, dict):  # as since transformers 5.0; PEFT asks the outermost model which weights are one
            self._tied_weights_keys = {f"backbone.{name}": f"backbone.{source}" for name, source in tied.items()}
        self.pondering_gate = make_gate(config.pondering_gate, self.embedding_size)
        self.draft_heads = DraftHeads(config.draft_heads, self.state_size) if config.draft_heads else None
        if self.draft_heads is not None:
            self.draft_heads.requires_grad_(False)  # trained by themselves, from a frozen model
        is_untested = config.base_config.model_type not in TESTED
        self._needs_verification = is_untested or untested_version() is not None
        self.post_init()
        if is_untested and self.device.type != "meta":
            self._verify_once()  # otherwise at the first forward pass, when the weights are there

    def _get_name(self):
        # Trainer looks for it in a table of names; FSDP2 makes a class of its own and puts its name in front.
        return super()._get_name().removeprefix("FSDP")

    def _init_weights(self, module):
        if isinstance(module, (PonderingGate, DraftHeads)):  # the backbone initialises its own weights
            module.reset()

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """vLLM and SGLang ask this before they run a model of transformers with one cache for each of its layers.

        Raises:
            PonderingError: always, as the passes would overwrite each other's keys and values there.
        """
        raise PonderingError(
            "pondering models need a cache for each pass, which this engine does not give by itself: for vLLM install "
            'the plug-in, pip install "ponder-hf[vllm]"; other engines cannot serve them'
        )

    @classmethod
    def _can_set_experts_implementation(cls):
        # transformers looks for the word in this file; the backbone is asked by itself, as about attention.
        return True

    def _set_gradient_checkpointing(self, enable=True, **kwargs):
        if enable and self.config.pondering_steps and _has_activated_lora(self):
            raise PonderingError(
                "gradient checkpointing does not go with activated LoRA (`alora_invocation_tokens`) here: PEFT takes "
                "it off a layer after one backward pass, where a pondering model's layers have S + 1, and gradients "
                "would be wrong; leave one of the two out"
            )
        # Every layer runs S + 1 times with the same weights: DDP fails on them ("marked as ready twice") where
        # checkpointing is reentrant, as it is by default before transformers 5.
        checkpoint = kwargs.get("gradient_checkpointing_func")
        if getattr(checkpoint, "keywords", {}).get("use_reentrant") and _in_several_processes():
            logger.warning_once("gradient checkpointing in several processes: `use_reentrant=False` is used instead")
            kwargs["gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, **kwargs)

    def _verify_once(self):
        if self._needs_verification:
            version = untested_version()
            try:
                verify_backbone(self.backbone)
            except PonderingError as error:
                if version is None:
                    raise
                raise PonderingError(f"{error}; under transformers {version}: {INSTALL_TESTED}") from error
            self._needs_verification = False

    @property
    def embedding_size(self) -> int:
        """Width of the embeddings that the backbone takes; OPT's can differ from its hidden size."""
        embedding = self.backbone.get_input_embeddings()
        return getattr(embedding, "embedding_dim", None) or embedding.weight.shape[1]

    @property
    def state_size(self) -> int:
        """Width of the last hidden states, which the head reads."""
        return self.backbone.get_output_embeddings().weight.shape[1]

    @property
    def pondering_kernel(self) -> str:
        """How the pondering embedding is computed: "top_k", "vocabulary" or "plain"; see PonderingEmbedding."""
        return PonderingEmbedding(self.backbone, self.config).kernel

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """As transformers', to a vocabulary that has at least `pondering_top_k` entries.

        Raises:
            PonderingError: it would have fewer; nothing has changed then.
        """
        top_k, size = self.config.pondering_top_k, new_num_tokens
        if size is not None and pad_to_multiple_of:
            size += -size % pad_to_multiple_of
        if size is not None and top_k is not None and size < top_k:
            raise PonderingError(
                f"`pondering_top_k` is {top_k}, more than the {size} entries that the vocabulary would have: set "
                f"`model.config.pondering_top_k` to {size} or less first, or to None for the whole vocabulary"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def get_decoder(self) -> PreTrainedModel:
        """The model without its head: all passes."""
        return self

    def get_encoder(self, modality: str | None = None) -> PreTrainedModel:
        """There is none: the model itself then, as transformers and PEFT have it."""
        return self

    @classmethod
    def from_base(cls, base: Any, **arguments: Any) -> "PonderingPreTrainedModel":
        """Make a pondering model from a plain one, keeping every weight and its dtype.

        Args:
            base: a Hub id, a folder (a plain checkpoint, or one that the authors' implementation wrote), or a causal
                language model of transformers. A model is used as it is, not copied.
            arguments: pondering fields (see PonderingConfig); for an id or a folder how to load it: revision, token,
                cache_dir, local_files_only, force_download, proxies, subfolder, variant, dtype (or torch_dtype),
                device_map, max_memory, offload_folder, attn_implementation; and how to read config.json:
                `authors=True` for a model of the authors' whose flags are missing there (S = 3, embedding_scale
                sqrt(d), input_scale S, where no field says otherwise), `ignore_fields`, a list of fields to leave
                out, and `ignore_code=True` for a checkpoint that names code of its own, which is left behind.

        Raises:
            PonderingError: the base cannot ponder, lacks weights or has unknown ones, or an argument is wrong.
            OSError: there is no such checkpoint.
        """
        loading, reading, fields = split_arguments(arguments)
        if isinstance(base, PreTrainedModel):
            _check_base_model(base, loading)
            raw = base.config.to_dict()
            raw.pop("quantization_config", None)  # a model that runs may be quantised
            found, _ = understand_config("the base", raw, fields, **{**reading, "ignore_code": True})
            config = PonderingConfig(base.config, **{**found, **fields})
            backbone = base
        elif isinstance(base, str) or hasattr(base, "__fspath__"):
            base_config, found = read_base_config(base, fields, **reading, **loading)
            config = PonderingConfig(base_config, **{**found, **fields})
            backbone = load_backbone(base, base_config, found, **loading)
        else:
            raise PonderingError(
                f"the base must be a folder, a Hub id or a model of transformers, got {type(base).__name__}"
                + (": merge the adapter first, by its merge_and_unload()" if hasattr(base, "merge_and_unload") else "")
            )
        return cls._around(backbone, config)

    @classmethod
    def _around(cls, backbone, config):
        config._name_or_path = NeverSaved()
        # Built without memory first: the backbone's random weights would be thrown away.
        with torch.device("meta"):
            model = cls(config)
        model.backbone = backbone
        if model.pondering_gate is not None:
            table = backbone.get_input_embeddings().weight
            model.pondering_gate = make_gate(config.pondering_gate, model.embedding_size)
            model.pondering_gate.to(table.device, backbone.dtype)
        if model.draft_heads is not None:
            model.add_draft_heads(config.draft_heads)
        model._verify_once()
        if model.can_generate() and getattr(backbone, "generation_config", None) is not None:
            model.generation_config = backbone.generation_config
        model.config.dtype = backbone.dtype
        # The backbone's parts keep their modes, of which some may be frozen. And no post_init: it would initialise
        # modules that the user put in.
        model.training = backbone.training
        for part in (model.pondering_gate, model.draft_heads):
            if part is not None:
                part.train(backbone.training)
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; draft heads do not learn with the model, and loading would make them."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.draft_heads is not None:
            model.draft_heads.requires_grad_(False)
        return loaded

    def add_draft_heads(self, num_passes: int | None = None) -> None:
        """Give the first `num_passes` passes new draft heads (pondering_generate_drafts.py), or all but the last.

        They start as the passes' own predictions; `ponder_hf.training.draft_heads` trains them.
        """
        config = self.config
        config.draft_heads = config.pondering_steps if num_passes is None else num_passes
        self.draft_heads = None
        if config.draft_heads:
            weight = self.backbone.get_output_embeddings().weight
            self.draft_heads = DraftHeads(config.draft_heads, self.state_size).to(weight.device, self.backbone.dtype)
            self.draft_heads.requires_grad_(False)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', under the class's own name.

        FSDP2 makes a subclass within torch for each sharded module; transformers would name that one in config.json
        and write torch's files beside it instead of these.
        """
        check_vocabulary(self.config)
        current = type(self)
        self.__class__ = next(parent for parent in current.__mro__ if not parent.__module__.startswith("torch."))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = current

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """As torch's, and takes the official names of weights too: Trainer resumes by reading a file into this."""
        return super().load_state_dict(names_in_memory(self, state_dict), *args, **kwargs)

    def to_base(self) -> PreTrainedModel:
        """The plain backbone, an instance of its own transformers class: the same weights, no copy."""
        if getattr(self, "generation_config", None) is not None:
            self.backbone.generation_config = self.generation_config
        return self.backbone

    def ponder(
        self,
        inputs_embeds: torch.Tensor,
        num_steps: int,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        on_hidden_states: Callable[[torch.Tensor], None] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run passes 0 .. S and give back the last one's output.

        Args:
            inputs_embeds: (B, T, d), token embeddings as the backbone's embedding module gives them.
            num_steps: S.
            past_key_values: a cache of S + 1 passes (pondering_cache.py), where `use_cache` is true.
            on_hidden_states: called with the last hidden states (B, T, d) of each pass but the last, in order.
            kwargs: `attention_mask`, `position_ids` and what else the backbone's decoder takes; `paged_cache` is that
                of continuous batching.

        Returns:
            transformers' output of the backbone's decoder in pass S, with `last_hidden_state` (B, T, d). A mixture of
            experts that is asked for them gives the `router_logits` of all passes, those of layer l in pass i at
            i * L + l.
        """
        config, router_logits = self.config, []
        if kwargs.get("output_router_logits") is None:
            kwargs.pop("output_router_logits", None)
            if getattr(config.base_config, "output_router_logits", False):
                kwargs["output_router_logits"] = True  # before transformers 5 not every decoder asks its configuration
        recording = {key: kwargs.pop(key) for key in ("output_hidden_states", "output_attentions") if key in kwargs}
        only_last = dict.fromkeys(recording, False)  # where the configuration asks for them, each pass would record
        paged_cache = kwargs.pop("paged_cache", None)

        def run_pass(index, **extra):
            if paged_cache is not None:  # under the same name for every version of transformers that has such a cache
                extra["cache"] = paged_pass(paged_cache, index, config.num_hidden_layers, kwargs)
            elif use_cache:
                extra["past_key_values"] = pass_cache(past_key_values, index, config.num_hidden_layers)
            output = run_backbone(self.backbone, hidden_inputs, use_cache=use_cache, **kwargs, **extra)
            router_logits.extend(getattr(output, "router_logits", None) or ())
            return output

        pondering_embedding: Any = PonderingEmbedding(self.backbone, config) if num_steps else None
        hidden_inputs = self.first_input(inputs_embeds)
        for step in range(num_steps):
            hidden_states = run_pass(step, **only_last).last_hidden_state
            if on_hidden_states is not None:
                on_hidden_states(hidden_states)
            embedding = self.finish_embedding(pondering_embedding(hidden_states))
            # With a device_map head, gate and embedding may lie on different devices.
            hidden_inputs = hidden_inputs + embedding.to(hidden_inputs.device)
        output = run_pass(num_steps, **recording)
        if router_logits:
            output["router_logits"] = tuple(router_logits)
        return output

    def first_input(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """x^0 of token embeddings (..., d) as the embedding module gives them."""
        return scaled(inputs_embeds, self.config.input_scale * self.config.embedding_scale)

    def finish_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """What is added of a pondering embedding (..., d): scaled, and gated where there is a gate."""
        embedding = scaled(embedding, self.config.embedding_scale)
        return embedding if self.pondering_gate is None else self.pondering_gate(embedding)

    @torch.no_grad()
    def ponder_until_converged(
        self,
        inputs_embeds: torch.Tensor,
        num_steps: int,
        past_key_values: Cache | None,
        pondering_exit: PonderingExit,
        **kwargs: Any,
    ) -> PassesWithExits:
        """As `ponder`, but each token stops when it has converged. Gives back the PassesWithExits that have run."""
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.pop(name, False):
                raise PonderingError(f"`{name}` needs the same passes for every token: leave out the exit threshold")
        passes = PassesWithExits(self, num_steps, past_key_values, pondering_exit)
        return passes.run(self.first_input(inputs_embeds), **kwargs)

    def _current_call(self):
        # The call of `generate` that this forward pass belongs to, or None.
        call = None if torch.compiler.is_compiling() else current_call()
        return call if call is not None and call.model is self else None

    def _prepare(self, input_ids, inputs_embeds, past_key_values, use_cache, pondering_steps, kwargs):
        """Settle what `forward` was called with: (inputs_embeds, S, cache, use_cache, output switches in kwargs)."""
        cache = kwargs.pop("cache", None)
        if cache is not None and not isinstance(cache, Cache):
            kwargs["paged_cache"] = cache  # of continuous batching
        else:
            past_key_values = given_cache({"cache": cache, "past_key_values": past_key_values})
        if (input_ids is None) == (inputs_embeds is None):
            raise PonderingError("give exactly one of `input_ids` and `inputs_embeds`")
        _check_arguments(kwargs)
        self._verify_once()
        num_steps, call = pondering_steps, self._current_call()
        if num_steps is None:  # within `generate` whoever calls the model by itself, as guidance does, means its S
            num_steps = self.config.pondering_steps if call is None else call.steps
        check_steps("pondering_steps", num_steps)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if (
            call is not None
        ):  # accelerate puts it around `forward`; drafts, which do not call that, compute in the same
            kind = inputs_embeds.device.type
            call.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if not torch.compiler.is_compiling():
            warn_of_what_never_runs(self.backbone)
        if not takes_cache(self.backbone):
            use_cache, past_key_values = False, None
        elif past_key_values is not None:  # it is filled and read, whatever else is said: as plain models have it
            use_cache = True
        elif use_cache is None:  # training never reads a cache, and recomputed layers cannot fill one
            # Texts in one row are kept apart only where there is no cache.
            wanted = not self.training and getattr(self.config.base_config, "use_cache", True)
            use_cache = wanted and not are_packed(kwargs["position_ids"], kwargs["attention_mask"])
        for switch in ("output_hidden_states", "output_attentions"):
            if kwargs.get(switch) is None:
                kwargs[switch] = getattr(self.config, switch)
        if use_cache:
            past_key_values = step_cache(past_key_values, self.config.base_config, num_steps + 1)
            mark_owner(past_key_values, self.backbone)
        return inputs_embeds, num_steps, past_key_values, use_cache


class PonderingModel(PonderingPreTrainedModel):
    """The decoder after pondering, without the language-modelling output: what `AutoModel` loads."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pondering_steps: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Arguments as in PonderingForCausalLM.forward.

        Returns:
            What the backbone's decoder returns (BaseModelOutputWithPast, MoeModelOutputWithPast) in the last pass:
            `last_hidden_state` (B, T, d); with the cache and the `router_logits` of all passes (see `ponder`).
        """
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        inputs_embeds, num_steps, past_key_values, use_cache = self._prepare(
            input_ids, inputs_embeds, past_key_values, use_cache, pondering_steps, inputs
        )
        output = self.ponder(inputs_embeds, num_steps, past_key_values, use_cache, **inputs)
        if past_key_values is not None:
            output[CACHE_NAME] = past_key_values
        return output.to_tuple() if _wants_tuple(return_dict, self.config) else output


class PonderingForCausalLM(PonderingPreTrainedModel, PonderingGenerationMixin):
    """A causal language model that ponders `pondering_steps` times before each token."""

    @property
    def base_model(self) -> PonderingModel:
        """All passes without the logits: a PonderingModel of the very same modules.

        TRL computes its losses by calling this and multiplying with the head, so it must not be the bare backbone.
        """
        passes = PonderingModel.__new__(PonderingModel)
        nn.Module.__init__(passes)
        passes.config, passes.backbone, passes.pondering_gate = self.config, self.backbone, self.pondering_gate
        passes.training = self.training
        passes._verify_once = self._verify_once  # type: ignore[method-assign]
        return passes

    def get_decoder(self) -> PonderingModel:
        """As `base_model`: with the head it gives the logits. One pass alone is `backbone.get_decoder()`."""
        return self.base_model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pondering_steps: int | None = None,
        output_pondering: bool = False,
        pondering_exit: PonderingExit | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> PonderingCausalLMOutput | tuple:
        """Ponder over a batch of token sequences.

        Args:
            input_ids: (B, T), or inputs_embeds: (B, T, d) as the embedding module gives them, before any scaling.
            attention_mask: (B, T_past + T), 1 for tokens and 0 for padding.
            position_ids: (B, T).
            past_key_values: a cache of all passes; see pondering_cache.py. `cache` is another name of it.
            labels: (B, T), not shifted, -100 where no loss is wanted.
            logits_to_keep: the number of last positions to give logits for, or their indices; 0: all.
            pondering_steps: S for this call, in place of the configuration's.
            output_pondering: give logits (and with labels losses) of all passes.
            pondering_exit: a PonderingExit; each token stops pondering when it says so. Without gradients.
            kwargs: `num_items_in_batch`, `ignore_index` and `shift_labels` go to the loss, the rest to the backbone.

        Returns:
            PonderingCausalLMOutput: loss in nats per token, logits (B, T, V) or of the kept positions only. The loss
            is the last pass's; in training mode with `intermediate_loss_weight` times the mean of the others.
        """
        loss_arguments = {key: kwargs.pop(key) for key in _LOSS_ARGUMENTS if key in kwargs}
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        inputs_embeds, num_steps, past_key_values, use_cache = self._prepare(
            input_ids, inputs_embeds, past_key_values, use_cache, pondering_steps, inputs
        )
        needs_loss = labels is not None or loss_arguments.get("shift_labels") is not None
        weight = self.config.intermediate_loss_weight
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        step_logits: list[Any] = []
        step_losses: list[Any] = []
        loss_of: Any = partial(self._loss, labels=labels, loss_arguments=loss_arguments) if needs_loss else None
        if pondering_exit is not None and not hasattr(pondering_exit, "converged"):
            raise PonderingError(f"`pondering_exit` must be a PonderingExit, got {pondering_exit!r}")
        if pondering_exit is not None and num_steps:
            if output_pondering:
                raise PonderingError("`output_pondering` needs all passes of every token: leave out `pondering_exit`")
            result = self._run_with_exits(
                inputs_embeds, num_steps, past_key_values, pondering_exit, loss_of, kept, inputs
            )
            return result.to_tuple() if _wants_tuple(return_dict, self.config) else result

        def collect(hidden_states):
            if output_pondering:
                step_logits.append(backbone_logits(self.backbone, hidden_states[:, kept]))
            if needs_loss and (output_pondering or weight):
                step_losses.append(loss_of(hidden_states))

        output = self.ponder(inputs_embeds, num_steps, past_key_values, use_cache, on_hidden_states=collect, **inputs)
        hidden_states, router_logits = output.last_hidden_state, getattr(output, "router_logits", None)
        aux_loss: Any = None
        aux_weight: Any = None
        if router_logits is not None:
            mask = attention_mask[..., -hidden_states.shape[1] :] if torch.is_tensor(attention_mask) else None
            aux_loss, aux_weight = auxiliary_loss(self.backbone, router_logits, mask, num_steps + 1)
        loss: Any = None
        last_loss: Any = None
        if needs_loss:
            loss = last_loss = loss_of(hidden_states)
            if step_losses and weight and self.training:
                loss = loss + weight * sum(step_losses) / num_steps
            if aux_loss is not None:
                loss = loss + aux_weight * aux_loss.to(loss.device)
        head, kept_states = partial(backbone_logits, self.backbone), hidden_states[:, kept]
        on_demand = self.training and needs_loss and not torch.compiler.is_compiling()
        result = PonderingCausalLMOutput(
            loss=loss,
            logits=logits_on_demand(head, kept_states) if on_demand else head(kept_states),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE_NAME: past_key_values},
            pondering_logits=tuple(step_logits) if output_pondering else None,
            pondering_losses=(*step_losses, last_loss) if needs_loss and (output_pondering or weight) else None,
            aux_loss=aux_loss,
            router_logits=router_logits,
        )
        return result.to_tuple() if _wants_tuple(return_dict, self.config) else result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers does, in a way that settings of pondering in the generation configuration are read back."""
        keep_settings(self.generation_config)
        super().save_pretrained(*args, **kwargs)

    def _run_with_exits(self, inputs_embeds, num_steps, past_key_values, pondering_exit, loss_of, kept, inputs):
        if loss_of is not None and torch.is_grad_enabled():
            raise PonderingError(
                "a loss with `pondering_exit` has no gradient of the passes: leave out `pondering_exit` to train, "
                "or call this under torch.no_grad() to evaluate"
            )
        passes = self.ponder_until_converged(inputs_embeds, num_steps, past_key_values, pondering_exit, **inputs)
        with torch.no_grad():  # only the head's gradient would be left
            return PonderingCausalLMOutput(
                loss=None if loss_of is None else loss_of(passes.hidden_states),
                logits=passes.last_logits(kept),
                **{CACHE_NAME: past_key_values},
            )

    def _loss(self, hidden_states, labels, loss_arguments):
        if self.loss_function is not ForCausalLMLoss:  # the user put another one in, as in any model of transformers
            logits = backbone_logits(self.backbone, hidden_states)
            return self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments
            )
        readout = backbone_readout(self.backbone)
        if readout is not None:
            return linear_causal_lm_loss(hidden_states, readout, labels, **loss_arguments)
        return causal_lm_loss(backbone_logits(self.backbone, hidden_states), labels, **loss_arguments)


_PONDERING_ARGUMENTS = ("pondering_steps", "output_pondering", "pondering_exit")


def _check_arguments(kwargs):
    """Raise for a keyword about pondering that does not exist; a backbone would take it and do nothing."""
    for name in kwargs:
        is_ours = "ponder" in name or name in ("num_steps", "on_hidden_states")
        if is_ours or (not torch.compiler.is_compiling() and did_you_mean(name, _PONDERING_ARGUMENTS, cutoff=0.8)):
            hint = did_you_mean(name, _PONDERING_ARGUMENTS, "there are", cutoff=0.5)
            raise PonderingError(f"the forward pass takes no `{name}`: {hint}")


def _check_base_model(base, loading):
    """Raise unless this model can be a backbone as it is."""
    if base.config.model_type == PonderingConfig.model_type:  # also one of a checkpoint's own code
        raise PonderingError("the base is a pondering model already: use its to_base() to begin anew")
    if loading:
        raise PonderingError(f"`{next(iter(loading))}` is for loading a checkpoint; the base is a model already")
    expected = backbone_class(base.config)
    if not isinstance(base, expected):
        raise PonderingError(
            f"the base is a {type(base).__name__}, where a {expected.__name__} of transformers is needed: load it "
            "with AutoModelForCausalLM, without code of its own"
        )


def _has_activated_lora(model):
    return any(
        type(variant).__name__.startswith("ALora")
        for module in model.modules()
        for variant in getattr(module, "lora_variant", {}).values()
    )


def _in_several_processes():
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _wants_tuple(return_dict, config):
    return not (config.return_dict if return_dict is None else return_dict)


PonderingModel.register_for_auto_class("AutoModel")
PonderingForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# By these names Trainer knows whose labels to shift when it smooths them, and pipelines what a model is for.
if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES is None:
    logger.warning("this version of transformers may smooth the labels of pondering models without shifting them")
else:
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(PonderingConfig.model_type, PonderingForCausalLM.__name__)
