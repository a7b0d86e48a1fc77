"""PonderingForCausalLM and PonderingModel: what every argument and field does, against the equations."""

import sys

import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForCausalLM

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM, PonderingModel
from ponder_hf.callbacks import pondering_statistics
from ponder_hf.data.blocks import Blocks
from ponder_hf.evaluation import evaluate_passes
from ponder_hf.modeling.pondering_backbone import verify_backbone
from ponder_hf.modeling.pondering_generate_wave import verify_wave_once
from ponder_hf.training.draft_heads import train_draft_heads
from ponder_hf.training.initialisation import initialise


@pytest.fixture
def input_ids():
    return tiny.token_ids(2, 9)


def written_out(model, input_ids):
    """The equations of the method with every field, by the backbone's own forward pass. Logits of all passes."""
    config, backbone = model.config, model.backbone
    table = backbone.get_input_embeddings().weight
    hidden_inputs = config.input_scale * config.embedding_scale * table[input_ids]
    all_logits = []
    for _ in range(config.pondering_steps + 1):
        logits = backbone(inputs_embeds=hidden_inputs, use_cache=False).logits
        all_logits.append(logits)
        if config.pondering_top_k is not None:
            smallest = logits.topk(config.pondering_top_k).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        weights = (logits / config.pondering_temperature).softmax(-1)
        embedding = weights @ (config.embedding_scale * table)
        if config.pondering_gate in ("zero_init", "random_signs"):
            embedding = model.pondering_gate.weight * embedding
        if config.pondering_gate == "zero_init_matrix":
            embedding = embedding @ model.pondering_gate.weight.T
        hidden_inputs = hidden_inputs + embedding
    return all_logits


FIELDS = {
    "pondering_steps": 2,
    "pondering_top_k": 3,
    "pondering_temperature": 0.5,
    "embedding_scale": 3.0,
    "input_scale": 2.0,
    "pondering_gate": "zero_init",
}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_changes_the_output_as_the_equations_say(field, input_ids):
    base = tiny.base_model(dtype=torch.float64)
    plain = PonderingForCausalLM.from_base(base, pondering_steps=3)
    changed = PonderingForCausalLM.from_base(base, **{"pondering_steps": 3, field: FIELDS[field]})
    if field == "pondering_gate":
        torch.nn.init.normal_(changed.pondering_gate.weight)
    with torch.no_grad():
        logits = changed(input_ids).logits
        torch.testing.assert_close(logits, written_out(changed, input_ids)[-1], rtol=1e-9, atol=1e-9)
        assert (logits - plain(input_ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("gate", ["zero_init", "zero_init_matrix", "random_signs"])
def test_all_fields_together(input_ids, gate):
    model = tiny.pondering_model("gpt2", torch.float64, **{**FIELDS, "pondering_gate": gate})
    if gate != "random_signs":
        torch.nn.init.normal_(model.pondering_gate.weight)
    with torch.no_grad():
        output = model(input_ids, output_pondering=True)
        expected = written_out(model, input_ids)
    assert len(output.pondering_logits) == 2
    for logits, wanted in zip((*output.pondering_logits, output.logits), expected, strict=True):
        assert logits.shape == (2, 9, tiny.VOCAB_SIZE)
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_steps_of_one_call(input_ids, steps):
    model = tiny.pondering_model(pondering_steps=2)
    other = PonderingForCausalLM.from_base(model.backbone, pondering_steps=steps)
    with torch.no_grad():
        output = model(input_ids, pondering_steps=steps, output_pondering=True)
        assert torch.equal(output.logits, other(input_ids).logits)
    assert len(output.pondering_logits) == steps
    assert model.config.pondering_steps == 2


@pytest.mark.parametrize("steps", [-1, 1.0, True, "2"], ids=repr)
def test_wrong_steps_of_one_call(input_ids, steps):
    with pytest.raises(PonderingError, match="`pondering_steps` must be an integer >= 0"):
        tiny.pondering_model()(input_ids, pondering_steps=steps)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_intermediate_loss(input_ids, weight, training):
    """In evaluation it stands beside the loss, which is the last pass's, so that other weights can be compared."""
    model = tiny.pondering_model(dtype=torch.float64, pondering_steps=3, intermediate_loss_weight=weight)
    model.train(training)
    output = model(input_ids, labels=input_ids, output_pondering=True)
    losses = [
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        for logits in written_out(model, input_ids)
    ]
    torch.testing.assert_close(output.pondering_losses, tuple(losses), rtol=1e-9, atol=0)
    counted = weight if training else 0
    torch.testing.assert_close(output.loss, losses[-1] + counted * sum(losses[:-1]) / 3, rtol=1e-9, atol=0)
    by_default = model(input_ids, labels=input_ids)
    assert torch.equal(by_default.loss, output.loss)
    assert by_default.pondering_losses == (output.pondering_losses if weight else None)


def test_another_loss_that_the_user_puts_in(input_ids):
    """`loss_function` of a model of transformers may be set; every pass is then measured by it."""

    def squared(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        assert logits.shape == (*labels.shape, vocab_size)
        return logits.square().mean() / (num_items_in_batch or 1)

    base = tiny.base_model()
    base.loss_function = squared
    expected = base(input_ids, labels=input_ids, num_items_in_batch=7).loss
    model = PonderingForCausalLM.from_base(base, pondering_steps=0)
    model.loss_function = squared
    torch.testing.assert_close(model(input_ids, labels=input_ids, num_items_in_batch=7).loss, expected)
    output = model(input_ids, labels=input_ids, pondering_steps=2, output_pondering=True)
    for loss, logits in zip(output.pondering_losses, (*output.pondering_logits, output.logits), strict=True):
        torch.testing.assert_close(loss, logits.square().mean())


def test_frozen_parts_keep_their_modes(input_ids, monkeypatch):
    """Whoever evaluates gives each part its own mode back."""
    base = tiny.base_model("llama").train()
    base.model.layers[0].eval()
    for checking in (PonderingForCausalLM, verify_wave_once):
        monkeypatch.setattr(sys.modules[checking.__module__], "TESTED", frozenset())
    model = PonderingForCausalLM.from_base(base, pondering_steps=1, pondering_gate="zero_init", draft_heads=1)
    modes = [part.training for part in model.modules()]
    assert not any(part.training for part in base.model.layers[0].modules())
    assert model.training
    assert model.backbone.lm_head.training
    assert model.pondering_gate.training
    verify_backbone(model.backbone)
    verify_wave_once(model)
    assert model._wave_is_verified  # it has run
    evaluate_passes(model, Blocks(input_ids))
    train_draft_heads(model, input_ids, steps=1, rows=1)
    pondering_statistics(model, input_ids)
    assert [part.training for part in model.modules()] == modes


def test_loss_keywords_reach_the_loss(input_ids):
    model = tiny.pondering_model(intermediate_loss_weight=0.5, pondering_steps=2).train()
    labels = input_ids.clone()
    labels[0, :5] = -100
    count = (labels[:, 1:] != -100).sum()
    mean = model(input_ids, labels=labels).loss
    torch.testing.assert_close(model(input_ids, labels=labels, num_items_in_batch=count).loss, mean)
    torch.testing.assert_close(model(input_ids, labels=labels, num_items_in_batch=2 * count).loss, mean / 2)
    ignored = labels.where(labels != -100, 3)
    torch.testing.assert_close(
        model(input_ids, labels=ignored, ignore_index=3).loss,
        model(input_ids, labels=ignored.where(ignored != 3, -100)).loss,
    )


def test_positions_without_a_label_do_not_count(input_ids):
    model = tiny.pondering_model()
    labels = torch.full_like(input_ids, -100)
    labels[0, 5] = input_ids[0, 5]
    logits = model(input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 4:5], input_ids[0, 5:6])
    torch.testing.assert_close(model(input_ids, labels=labels).loss, expected)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3])], ids=str)
def test_logits_to_keep(input_ids, keep):
    model = tiny.pondering_model()
    whole = model(input_ids, labels=input_ids, output_pondering=True)
    part = model(input_ids, labels=input_ids, output_pondering=True, logits_to_keep=keep)
    positions = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(part.logits, whole.logits[:, positions])
    torch.testing.assert_close(part.pondering_logits[1], whole.pondering_logits[1][:, positions])
    assert torch.equal(part.loss, whole.loss)
    torch.testing.assert_close(model(input_ids, logits_to_keep=keep).logits, whole.logits[:, positions])


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "opt"])
def test_embeddings_in_place_of_ids(model_type, input_ids):
    model = tiny.pondering_model(model_type, embedding_scale=2.0, input_scale=1.5)
    embeddings = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(input_ids).logits)


@pytest.mark.parametrize("given", ["neither", "both"])
def test_ids_or_embeddings(given, input_ids):
    model = tiny.pondering_model()
    both = {"input_ids": input_ids, "inputs_embeds": model.get_input_embeddings()(input_ids)}
    with pytest.raises(PonderingError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(**(both if given == "both" else {}))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_hidden_states_and_attentions_are_the_last_pass_own(model_type, input_ids):
    base = tiny.base_model(model_type, attn_implementation="eager")
    model = PonderingForCausalLM.from_base(base, pondering_steps=2)
    switches = {"output_hidden_states": True, "output_attentions": True}
    seen = []
    base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    output = model(input_ids, **switches)
    expected = base(inputs_embeds=seen[2], **switches)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    pairs = zip(output.hidden_states + output.attentions, expected.hidden_states + expected.attentions, strict=True)
    for mine, wanted in pairs:
        torch.testing.assert_close(mine, wanted)
    assert model(input_ids).hidden_states is None


def test_a_tuple_where_wanted(input_ids):
    model = tiny.pondering_model()
    loss, logits, *_ = model(input_ids, labels=input_ids, return_dict=False)
    assert torch.equal(loss, model(input_ids, labels=input_ids).loss)
    assert torch.equal(logits, model(input_ids).logits)
    model.config.return_dict = False
    assert torch.equal(model(input_ids)[0], logits)


def test_from_base_leaves_modules_that_the_user_put_in(input_ids):
    base = tiny.base_model("llama", tie_word_embeddings=False)
    head = torch.nn.Linear(32, tiny.VOCAB_SIZE, bias=False)
    before = head.weight.clone()
    base.set_output_embeddings(head)
    model = PonderingForCausalLM.from_base(base, pondering_gate="zero_init")
    assert torch.equal(model.get_output_embeddings().weight, before)
    assert torch.equal(model(input_ids).logits, base(input_ids).logits)


def test_the_base_model_gives_the_last_hidden_state(tmp_path, input_ids):
    whole = tiny.pondering_model("llama", pondering_steps=2)
    whole.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is PonderingModel
    hidden_states = model(input_ids).last_hidden_state
    assert hidden_states.shape == (2, 9, 32)
    assert torch.equal(whole.get_output_embeddings()(hidden_states), whole(input_ids).logits)


def test_every_pass_has_the_same_positions_and_mask():
    model = tiny.pondering_model("gpt2", pondering_steps=3)
    ids, mask = tiny.left_padded([tiny.token_ids(6), tiny.token_ids(3)])
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    calls = []
    model.backbone.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    model(ids, attention_mask=mask, position_ids=position_ids)
    assert len(calls) == 4
    for call in calls:
        assert torch.equal(call["attention_mask"], mask)
        assert torch.equal(call["position_ids"], position_ids)


@pytest.mark.parametrize("model_type", tiny.SPINE)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("gate", ["zero_init", "zero_init_matrix"])
def test_a_closed_gate_is_the_base_bit_for_bit_and_learns(model_type, steps, gate):
    base = tiny.base_model(model_type)
    input_ids = tiny.token_ids(2, 9)
    expected = base(input_ids).logits
    model = PonderingForCausalLM.from_base(base, pondering_steps=steps, pondering_gate=gate)
    output = model(input_ids, labels=input_ids)
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    assert model.pondering_gate.weight.grad.abs().max() > 1e-6


def random_signs(seed, how):
    """The weights of a new gate, made in one of the ways in which models are made."""
    torch.manual_seed(seed)
    base = tiny.base_model("llama", hidden_size=64)
    torch.manual_seed(seed)
    if how == "from_base":
        model = PonderingForCausalLM.from_base(base, pondering_gate="random_signs")
    elif how == "from_config":
        model = AutoModelForCausalLM.from_config(PonderingConfig(base.config, pondering_gate="random_signs"))
    else:
        model = initialise(PonderingForCausalLM(PonderingConfig(base.config, pondering_gate="random_signs")))
    return model.pondering_gate.weight.detach()


@pytest.mark.parametrize("how", ["from_base", "from_config", "the authors' initialisation"])
def test_random_signs_are_those_of_the_seed(how):
    signs = random_signs(1, how)
    assert signs.unique().tolist() == [-1, 1]
    assert 16 < (signs == 1).sum() < 48
    assert torch.equal(signs, random_signs(1, how))
    assert not torch.equal(signs, random_signs(2, how))


def test_a_checkpoint_without_a_gate_gets_new_signs(tmp_path):
    tiny.pondering_model("llama").save_pretrained(tmp_path)
    loaded, report = PonderingForCausalLM.from_pretrained(
        tmp_path, pondering_gate="random_signs", output_loading_info=True
    )
    assert report["missing_keys"] == {"pondering_gate.weight"}
    assert loaded.pondering_gate.weight.unique().tolist() == [-1, 1]


def test_training_makes_no_cache_unless_it_is_asked_for(input_ids):
    model = tiny.pondering_model("llama")
    assert model(input_ids).past_key_values is not None
    model.train()
    assert model(input_ids).past_key_values is None
    assert model(input_ids, use_cache=True).past_key_values is not None


def test_from_base_uses_the_model_and_to_base_gives_it_back(input_ids):
    base = tiny.base_model("gpt2")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    expected = base(input_ids).logits
    model = PonderingForCausalLM.from_base(base, pondering_gate="zero_init")
    back = model.to_base()
    assert back is base
    assert all(torch.equal(value, before[key]) for key, value in back.state_dict().items())
    assert torch.equal(back(input_ids).logits, expected)


def test_from_base_refuses_what_it_cannot_use(tmp_path):
    base = tiny.base_model()
    model = PonderingForCausalLM.from_base(base)
    with pytest.raises(PonderingError, match="is a pondering model already"):
        PonderingForCausalLM.from_base(model)
    with pytest.raises(PonderingError, match="`ponderingsteps` is not a pondering field"):
        PonderingForCausalLM.from_base(base, ponderingsteps=2)
    with pytest.raises(PonderingError, match="`dtype` is for loading"):
        PonderingForCausalLM.from_base(base, dtype="float16")
    model.save_pretrained(tmp_path)
    with pytest.raises(PonderingError, match="is a pondering checkpoint already"):
        PonderingForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, PonderingForCausalLM], ids=lambda c: c.__name__)
@pytest.mark.parametrize("gate", ["zero_init", "zero_init_matrix", "random_signs"])
def test_auto_classes_know_it(tmp_path, auto_class, gate, input_ids):
    model = tiny.pondering_model("gpt2", pondering_gate=gate, pondering_steps=2)
    torch.nn.init.normal_(model.pondering_gate.weight)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is PonderingForCausalLM
    assert not loaded.training
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


KERNELS = {"whole vocabulary": (None, "vocabulary"), "top-9": (9, "top_k"), "all of them": (131, "vocabulary")}


@pytest.mark.parametrize(("top_k", "kernel"), KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("model_type", sorted(set(tiny.CONFIGS) - {"mixtral"}))
def test_what_a_step_costs_does_not_change_what_it_gives(model_type, top_k, kernel, input_ids, monkeypatch):
    """The kernel that is chosen against asking every module: logits, losses and all gradients, with odd scales."""
    model = tiny.pondering_model(
        model_type,
        torch.float64,
        pondering_steps=2,
        pondering_top_k=top_k,
        pondering_temperature=0.7,
        embedding_scale=1.5,
        intermediate_loss_weight=0.3,
    )
    results = []
    for expected_kernel in (kernel, "plain"):
        if expected_kernel == "plain":
            for module in ("pondering_vocabulary_embedding", "modeling_pondering"):
                monkeypatch.setattr(f"ponder_hf.modeling.{module}.backbone_readout", lambda backbone: None)
        assert model.pondering_kernel == expected_kernel
        model.zero_grad()
        output = model(input_ids, labels=input_ids)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((output.logits, output.loss, gradients))
    (logits, loss, gradients), (plain_logits, plain_loss, plain_gradients) = results
    torch.testing.assert_close(logits, plain_logits, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-7, atol=0)
    for name, gradient in plain_gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)


def _wrap_head(model):
    head = model.get_output_embeddings()
    wrapped = torch.nn.Sequential(head)
    wrapped.weight = head.weight
    model.set_output_embeddings(wrapped)


def _replace_forward(module):
    forward = module.forward
    module.forward = lambda *arguments: forward(*arguments)


OPAQUE = {
    "a head of another class": _wrap_head,
    "a hook before the head": lambda model: model.get_output_embeddings().register_forward_pre_hook(lambda *_: None),
    "a hook after the head": lambda model: model.get_output_embeddings().register_forward_hook(lambda *_: None),
    "a head with another forward pass": lambda model: _replace_forward(model.get_output_embeddings()),
    "an embedding with another forward pass": lambda model: _replace_forward(model.get_input_embeddings()),
}


@pytest.mark.parametrize("change", OPAQUE.values(), ids=OPAQUE)
def test_what_is_not_a_plain_matrix_is_asked_through_its_module(change, input_ids):
    model = tiny.pondering_model("llama", pondering_top_k=9)
    expected = model(input_ids, labels=input_ids)
    assert model.pondering_kernel == "top_k"
    change(model)
    assert model.pondering_kernel == "plain"
    output = model(input_ids, labels=input_ids)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


class Int8Embedding(torch.nn.Module):
    """Rows kept as int8 with one scale a row, as quantisers keep them."""

    def __init__(self, weight):
        super().__init__()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, token_ids):
        return self.weight[token_ids] * self.scale[token_ids]


@pytest.mark.parametrize("top_k", [None, 9])
def test_a_quantised_embedding_is_asked_through_its_module(top_k, input_ids):
    model = tiny.pondering_model("llama", pondering_top_k=top_k)
    quantised = Int8Embedding(model.get_input_embeddings().weight.detach())
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(quantised(torch.arange(tiny.VOCAB_SIZE)))
    expected = model(input_ids).logits
    model.set_input_embeddings(quantised)
    assert model.pondering_kernel == "plain"
    torch.testing.assert_close(model(input_ids).logits, expected)


def test_the_base_model_is_all_passes_on_the_same_modules(input_ids):
    model = tiny.pondering_model("gpt2", pondering_steps=2, pondering_gate="zero_init").train()
    torch.nn.init.constant_(model.pondering_gate.weight, 0.5)
    passes = model.base_model
    assert type(passes) is PonderingModel
    assert passes.training
    parameters = list(passes.parameters())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    hidden_states = passes(input_ids, use_cache=False).last_hidden_state
    assert hidden_states.requires_grad
    torch.testing.assert_close(model.get_output_embeddings()(hidden_states), model(input_ids).logits)
    assert passes.base_model is model.backbone
