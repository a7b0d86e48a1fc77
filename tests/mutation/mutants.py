"""The small ways in which the code is broken, and the tests that must notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change of the code.

    Args:
        file: what is changed, below the repository's root.
        before: a piece of it that stands there once.
        after: what is put in its place.
        tests: the test files that must fail, below tests/.
        in_vllm: they run in the environment of `make vllm`.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    in_vllm: bool = False

    @property
    def name(self) -> str:
        """As it is shown and asked for."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}: {before} -> {after or 'nothing'}"


def _of(file: str, tests: str, *changes: tuple[str, str], in_vllm: bool = False) -> list[Mutant]:
    return [Mutant(file, before, after, tuple(tests.split()), in_vllm) for before, after in changes]


MUTANTS = [
    # The passes
    *_of(
        "modeling/modeling_pondering.py",
        "test_model.py test_fidelity.py test_generation.py test_equality.py",
        ("self.config.input_scale * self.config.embedding_scale)", "self.config.embedding_scale)"),
        ("embedding = scaled(embedding, self.config.embedding_scale)", "embedding = scaled(embedding, 1.0)"),
        ("return embedding if self.pondering_gate is None else self.pondering_gate(embedding)", "return embedding"),
        ("hidden_inputs = hidden_inputs + embedding.to", "hidden_inputs = hidden_inputs - embedding.to"),
        (
            "hidden_inputs = hidden_inputs + embedding.to",
            "hidden_inputs = self.first_input(inputs_embeds) + embedding.to",
        ),
        ("output = run_pass(num_steps, **recording)", "output = run_pass(max(num_steps - 1, 0), **recording)"),
        ("for step in range(num_steps):", "for step in range(num_steps - 1):"),
        ("loss = loss + weight * sum(step_losses) / num_steps", "loss = loss + weight * sum(step_losses)"),
        ("if step_losses and weight and self.training:", "if step_losses and weight:"),
        ("else call.steps\n", "else self.config.pondering_steps\n"),
        ("wanted = not self.training and getattr", "wanted = getattr"),
        ("hidden_states[:, kept]))", "hidden_states))"),
    ),
    *_of(
        "modeling/modeling_pondering.py",
        "test_packing.py",
        ('wanted and not are_packed(kwargs["position_ids"], kwargs["attention_mask"])', "wanted"),
    ),
    *_of(
        "modeling/modeling_pondering.py",
        "test_trl.py test_model.py",
        ("self.config, self.backbone, self.pondering_gate\n", "self.config, self.backbone, None\n"),
    ),
    *_of(
        "modeling/modeling_pondering.py",
        "test_experts.py",
        ("router_logits, mask, num_steps + 1)", "router_logits, mask, num_steps)"),
    ),
    *_of(
        "modeling/configuration_pondering.py",
        "test_config.py test_model.py",
        (
            'GATES = ("none", "zero_init", "zero_init_matrix", "random_signs")',
            'GATES = ("none", "zero_init", "random_signs")',
        ),
    ),
    # The caches
    *_of(
        "modeling/pondering_cache.py",
        "test_generation.py test_equality.py test_bad_prompt.py",
        (
            "first = pass_index * num_layers\n    view = cache_class(",
            "first = max(pass_index - 1, 0) * num_layers\n    view = cache_class(",
        ),
        ("layers[slot % num_layers]) for", "layers[0]) for"),
        ("if theirs.dtype != own.dtype or not torch.equal(theirs, own):", "if theirs.dtype != own.dtype:"),
        ("if len(layers) != num_layers * num_passes:\n        raise", "if False:\n        raise"),
    ),
    *_of(
        "modeling/pondering_cache.py",
        "test_paged.py",
        ("first = pass_index * num_layers\n    view = copy.copy(cache)", "first = 0\n    view = copy.copy(cache)"),
        ("config.num_hidden_layers *= self.num_steps + 1", "config.num_hidden_layers *= self.num_steps"),
        ("if self.looks and self.num_calls", "if False and self.num_calls"),
    ),
    *_of(
        "modeling/pondering_generate.py",
        "test_paged.py",
        ("        call.check_predictions()\n        return results", "        return results"),
    ),
    *_of(
        "modeling/pondering_vocabulary_embedding.py",
        "test_model.py",
        ("2 * torch.randint(2, self", "torch.randint(2, self"),
        ('self.has_signs = kind == "random_signs"', "self.has_signs = False"),
    ),
    # Early exits
    *_of(
        "modeling/pondering_generate_exits.py",
        "test_adaptive.py",
        ("return (log_p.exp() * (log_p - log_q))", "return (log_q.exp() * (log_q - log_p))"),
        ("return distances < self.threshold", "return distances <= self.threshold"),
        ("distance.where(token_ids == previous_logits.argmax(-1), 1).clamp(min=0)", "distance.clamp(min=0)"),
        ("return -(log_p.exp() * log_p)", "return (log_p.exp() * log_p)"),
        ("self._fill(index + 1)", "self._fill(index + 2)"),
        ("masked_fill(mask & ~going_on, index)", "masked_fill(mask & ~going_on, index + 1)"),
        ("order.where(self.mask.gather(1, order), order[:, :1])", "order"),
        ("mask.masked_scatter(mask, ~stops) & ~padding", "mask.masked_scatter(mask, ~stops)"),
        ("else old[places]) + self.model", "else old[places]) - self.model"),
    ),
    # The wave, drafts and what comes out
    *_of(
        "modeling/pondering_generate_wave.py",
        "test_wave.py",
        ("= one.column + index\n", "= one.column + index + 1\n"),
        ("hidden = columns_read > reads", "hidden = columns_read > reads + 1"),
        ("(columns_read <= reads - self.window)", "(columns_read < reads - self.window)"),
        ("hidden[:, : self.prompt_length] |= self.is_padding[rows]", "pass"),
        ("self.inputs[next_pass] = self.inputs[here] + embedding", "self.inputs[next_pass] = embedding"),
        ("(attention_mask.long().sum(-1) - 1)", "attention_mask.long().sum(-1)"),
        ("self.inputs[:size] = self.model.first_input(embedded)", "self.inputs[:size] = embedded"),
        ("self.model.finish_embedding(embedding).to", "embedding.to"),
    ),
    *_of(
        "modeling/pondering_generate_wave.py",
        "test_speculation.py test_wave.py",
        ("new = slice(self.prompt_length, length)", "new = slice(self.prompt_length, length - 1)"),
    ),
    *_of(
        "modeling/pondering_generate_drafts.py",
        "test_drafts.py test_wave.py",
        ("return token_ids[start // _BYTES + size]", "return token_ids[start // _BYTES + size - 1]"),
        ("while start % _BYTES and start >= 0:", "while False:"),
        ("is_right, guesses = self.tokens[1] == final,", "is_right, guesses = self.tokens[1] != final,"),
        ("drafted = states + torch.baddbmm", "drafted = torch.baddbmm"),
        ("weight[first_pass : first_pass + num_heads]", "weight[:num_heads]"),
        ("self.num_hits += is_right", "self.num_hits += 1"),
    ),
    *_of(
        "modeling/pondering_generate_tokens.py",
        "test_speculation.py",
        ("waiting.log_().neg_()", "waiting.log_()"),
        ("manual_seed(seed + prompt)", "manual_seed(seed)"),
        ("if place not in self.drawn:", "if True:"),
        ("processors(token_ids[:, :column], whole)", "processors(token_ids[:, : column - 1], whole)"),
        ("token_ids[row, length:] = self.pad_token", "pass"),
        (">= max(self.finished_at.values())", "> max(self.finished_at.values())"),
        ("column[row] = values[row]", "column[row] = values[0]"),
    ),
    *_of(
        "modeling/pondering_generate_speculation.py",
        "test_speculation.py test_wave.py",
        ("self.shift = cache.get_seq_length() - text.prompt_length", "self.shift = 0"),
        ("+ speculation.shift - 1", "+ speculation.shift"),
        ("first + index // size == self.num_steps for", "first + index // size == self.num_steps - 1 for"),
    ),
    # The vocabulary
    *_of(
        "modeling/pondering_vocabulary.py",
        "test_kernels.py test_embedding.py test_backbones.py",
        ("scores = torch.tanh(scores / self.cap) * self.cap", "scores = torch.tanh(scores / self.cap)"),
        ("gradient.mul_(1 - torch.tanh", "gradient.mul_(1 + torch.tanh"),
        ("scores if self.factor == 1 else scores * self.factor", "scores"),
        ("gradient if self.factor == 1 else gradient.mul_(self.factor)", "gradient"),
        ("return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype", "return dtype"),
    ),
    *_of(
        "modeling/pondering_vocabulary_embedding.py",
        "test_embedding.py test_kernels.py test_model.py test_backbones.py",
        (
            "logits if temperature == 1 else logits / temperature",
            "logits if temperature == 1 else logits * temperature",
        ),
        (".mul_(weights).div_(temperature)", ".mul_(weights)"),
        ("mean = (wide(gradient) * wide(embedding)).sum(-1, keepdim=True)", "mean = wide(gradient)[:, :1] * 0"),
        ("if needs_bias:\n", "if False:\n"),
        (
            "return scaled(embedding.view(*hidden_states.shape[:-1], -1), scale)",
            "return embedding.view(*hidden_states.shape[:-1], -1)",
        ),
        (
            "return scaled(embedding.view(*logits.shape[:-1], -1), scale)",
            "return embedding.view(*logits.shape[:-1], -1)",
        ),
        ("whole = config.pondering_top_k in (None, len(self.table[0]))", "whole = True"),
        ("return functional.linear(embedding, self.weight)", "return functional.linear(embedding, self.weight.t())"),
        ("flat.topk(top_k, dim=-1, sorted=False)", "flat.topk(top_k, dim=-1, sorted=False, largest=False)"),
    ),
    *_of(
        "modeling/pondering_vocabulary_loss.py",
        "test_loss.py test_kernels.py test_model.py test_output.py",
        ("gradient.new_full((), -1.0)", "gradient.new_full((), -0.9)"),
        ("counts = targets != ignore_index", "counts = targets != -1"),
        ("value=ignore_index)[..., 1:]", "value=ignore_index)[..., :-1]"),
        ("count = (flat_labels != ignore_index).sum() if", "count = len(flat_labels) if"),
        ("if self._logits is None:\n", "if True:\n"),
    ),
    # The backbone
    *_of(
        "modeling/pondering_backbone.py",
        "test_backbones.py test_kernels.py",
        ("logits = logits / divisor", "logits = logits * divisor"),
        ("logits = torch.tanh(logits / cap) * cap", "logits = torch.tanh(logits / cap)"),
        ('or 1.0) / (getattr(config, "logits_scaling"', 'or 1.0) * (getattr(config, "logits_scaling"'),
        (
            "return module.weight, scale.to(module.weight.dtype) if torch.is_tensor(scale) else scale",
            "return module.weight, 1.0",
        ),
    ),
    # Conversion
    *_of(
        "conversion/stored_weights.py",
        "test_conversion.py test_bad_checkpoint.py test_bad_input.py",
        ("return reduce(torch.promote_types, dtypes)", "return sorted(dtypes, key=str)[0]"),
        ("if size < end_of_header:", "if False:"),
        ('if tensor.dtype.startswith(("F8", "F4", "F6")):', "if False:"),
    ),
    *_of(
        "conversion/export.py",
        "test_conversion.py",
        ("scale = config.embedding_scale * config.input_scale", "scale = config.embedding_scale"),
        ("ponders = False", "pass"),
    ),
    *_of(
        "conversion/convert.py",
        "test_conversion.py test_cli.py",
        ("        copy_files(names, found.folder, folder)\n", "        pass\n"),
        (
            "model = load_plain(found, empty_backbone, {**pondering_fields, **reading_arguments})",
            "model = load_plain(found, empty_backbone, {**reading_arguments})",
        ),
    ),
    *_of(
        "conversion/whole_folder.py",
        "test_writer.py test_full_disk.py test_bad_input.py",
        ("if aside.exists() and not path.exists():", "if False:"),
        ("if any(path.iterdir()) and not overwrite:", "if False:"),
        (
            "            _clean_up_after_killed_runs(path)\n            partial.mkdir()\n",
            "            partial.mkdir()\n",
        ),
        ("if path in source.parents:", "if False:"),
        ("if num_bytes > free:", "if False:"),
    ),
    # The plug-in for vLLM
    *_of(
        "ponder_hf/vllm/model.py",
        "test_vllm_backbones.py",
        ("embedding = self.pondering_gate(embedding)", "pass"),
        ("hidden_inputs = hidden_inputs + embedding", "hidden_inputs = hidden_inputs - embedding"),
        ("scaled(self.embedding(hidden_states), config.embedding_scale)", "self.embedding(hidden_states)"),
        (
            "scaled(inputs_embeds, config.input_scale * config.embedding_scale)",
            "scaled(inputs_embeds, config.embedding_scale)",
        ),
        in_vllm=True,
    ),
    *_of(
        "ponder_hf/vllm/attention.py",
        "test_vllm_backbones.py",
        ("if self.current_pass.index == 0:", "if True:"),
        ("self.later_passes[self.current_pass.index - 1]", "self.later_passes[0]"),
        in_vllm=True,
    ),
    *_of(
        "ponder_hf/vllm/vocabulary.py",
        "test_vllm_backbones.py",
        ("logits if self.temperature == 1 else logits / self.temperature", "logits"),
        (
            "_weighted_rows(table, rows, torch.softmax(scores, dim=-1))",
            "_weighted_rows(table, rows, scores.sigmoid())",
        ),
        in_vllm=True,
    ),
]
