"""Whatever wraps a model or its parts: hooks, replaced forward passes, mixed precision, adapters for each row."""

import contextlib
import copy
import functools

import accelerate.state
import elsewhere
import pytest
import strategies
import tiny
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn.utils import spectral_norm

from ponder_hf import PonderingError
from ponder_hf.modeling import pondering_backbone
from ponder_hf.modeling.pondering_backbone import backbone_logits, bare_table, embedding_table
from ponder_hf.modeling.pondering_generate_exits import CRITERIA, PonderingExit


# Rows of the embedding table are the rows of the module, whatever hooks say about tokens that are fed in.


def wrap_with(**settings):
    def wrap(model):
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return adapted.eval()

    return wrap


class Doubled(torch.nn.Module):
    """An embedding module of a class of its own."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.weight = embedding, embedding.weight

    def forward(self, token_ids):
        return 2 * self.embedding(token_ids)


def double(model):
    model.set_input_embeddings(Doubled(model.get_input_embeddings()))
    return model


def replace_forward(model):
    module = model.get_input_embeddings()
    forward = module.forward
    module.forward = lambda token_ids: 2 * forward(token_ids)
    return model


def normalise(model):
    spectral_norm(model.get_input_embeddings(), n_power_iterations=1)
    return model.eval()


WRAPPED = {
    "bare": lambda model: model,
    "LoRA": wrap_with(target_modules=["embed_tokens"]),
    "saved whole": wrap_with(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "some tokens trained": wrap_with(target_modules=["q_proj"], trainable_token_indices=[5, 9]),
    "a class of its own": double,
    "another forward pass": replace_forward,
    "offloaded": lambda model: cpu_offload(model, torch.device("cpu")),
    "a norm before": normalise,
}


def neftune(module, arguments, output):
    """What Trainer's `neftune_noise_alpha` sets, without its check for training: it wants three dimensions."""
    size = output.size(1) * output.size(2)
    return output + 5.0 / size**0.5


TOKEN_HOOKS = {
    "adds": ("register_forward_hook", lambda module, arguments, output: output + 0.5),
    "adds in place": ("register_forward_hook", lambda module, arguments, output: output.add_(0.5)),
    "NEFTune": ("register_forward_hook", neftune),
    "other ids": ("register_forward_pre_hook", lambda module, arguments: ((arguments[0] + 1) % tiny.VOCAB_SIZE,)),
    "partial": ("register_forward_hook", functools.partial(lambda module, *_, by: _[1] * by, by=3.0)),
}


# Where hooks lie: on the module that the model asks, or before it is wrapped on what PEFT and offloading call.
PLACES = [(name, "outside") for name in WRAPPED] + [(name, "inside") for name in ("LoRA", "a class of its own")]


@pytest.mark.parametrize("hook", TOKEN_HOOKS.values(), ids=TOKEN_HOOKS)
@pytest.mark.parametrize(("wrapping", "where"), PLACES, ids=lambda value: value)
def test_hooks_about_tokens_reach_tokens_and_no_rows(wrapping, where, hook):
    torch.manual_seed(0)
    wrap = WRAPPED[wrapping]
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=2)
    kind, function = hook
    ids = tiny.token_ids(2, 7)
    hooked = model.get_input_embeddings()
    model = getattr(wrap(model), "get_base_model", lambda: model)()
    hooked = model.get_input_embeddings() if where == "outside" else hooked
    with torch.no_grad():
        expected_rows = model.get_input_embeddings()(torch.arange(tiny.VOCAB_SIZE)).clone()
        torch.testing.assert_close(embedding_table(model.backbone, ids.device), expected_rows)
        kernel = model.pondering_kernel
        handle = getattr(hooked, kind)(function)
        inputs = model.get_input_embeddings()(ids).clone()
        assert (inputs - expected_rows[ids]).abs().max() > 1e-3
        output = model(ids).logits
        torch.testing.assert_close(embedding_table(model.backbone, ids.device), expected_rows)
        assert model.pondering_kernel == kernel
        drafted = model.generate(ids, num_draft_tokens=2, max_new_tokens=6, do_sample=False, eos_token_id=None)
        plain = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        handle.remove()
        # The same by hand: these inputs, and rows without the hook.
        expected = tiny.plain_pondering_of(model.backbone, inputs, expected_rows, 2)
    torch.testing.assert_close(output, expected)
    assert drafted.tolist() == plain.tolist()


@pytest.mark.parametrize("wrap", [WRAPPED[name] for name in ("LoRA", "saved whole")], ids=["LoRA", "saved whole"])
def test_a_table_asked_past_hooks_has_gradients(wrap):
    torch.manual_seed(0)
    model = wrap(tiny.pondering_model("llama", torch.float64, pondering_steps=1)).train()
    other = copy.deepcopy(model)
    other.get_base_model().get_input_embeddings().register_forward_hook(lambda module, arguments, output: output + 0.0)
    ids = tiny.token_ids(2, 7)
    for one in (model, other):
        one(input_ids=ids, labels=ids).loss.backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(twin.grad, parameter.grad, msg=name)


def test_hooks_that_fetch_a_weight_run_while_those_about_tokens_do_not():
    model = tiny.pondering_model("llama")
    module = model.get_input_embeddings()
    whole, seen = module.weight.data, []

    def gather(module, arguments):
        module.weight.data = whole

    def release(module, arguments, output):
        module.weight.data = torch.empty(0)

    gather.__module__ = release.__module__ = "deepspeed.runtime.zero.parameter_offload"
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
    module.register_forward_hook(lambda *_: seen.append(1))
    release(module, None, None)
    assert bare_table(model.backbone) is None
    assert torch.equal(embedding_table(model.backbone), whole)
    assert module.weight.numel() == 0
    assert not seen


# Drafts call the decoder and the head, never the model: what stands around the model is honoured or refused.


def draft_or_not(model, **settings):
    """Greedy tokens with drafts and without, of a ragged batch; logits of each token are kept."""
    prompts, mask = tiny.left_padded([tiny.token_ids(6), tiny.token_ids(4, seed=4)])
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    settings |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    return [model.generate(input_ids=prompts, num_draft_tokens=drafts, **settings) for drafts in (0, 2)]


def check_drafts(model, **settings):
    """Drafts change neither tokens nor, within float32, logits. Returns the tokens."""
    plain, drafted = draft_or_not(model, **settings)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(torch.stack(drafted.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    return plain.sequences.tolist()


def small(**fields):
    torch.manual_seed(0)
    return tiny.pondering_model("llama", pondering_steps=2, **fields)


BIAS = torch.arange(tiny.VOCAB_SIZE) * 0.1


def biased(module, arguments, output):
    output.logits = output.logits + BIAS
    return output


def biased_with_kwargs(module, arguments, kwargs, output):
    return biased(module, arguments, output)


def other_ids(module, arguments, kwargs):
    return arguments, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % tiny.VOCAB_SIZE}


def replace(name):
    def change(model):
        method = getattr(model, name)

        @functools.wraps(method)
        def other(*arguments, **kwargs):
            return method(*arguments, **kwargs)

        setattr(model, name, other)

    return change


def override(name):
    def change(model):
        def other(self, *arguments, **kwargs):
            return getattr(super(type(self), self), name)(*arguments, **kwargs)

        model.__class__ = type("Mine", (type(model),), {name: other})

    return change


class Looking(ModelHook):
    """A hook in accelerate's way."""

    def post_forward(self, module, output):
        return biased(module, None, output)


AROUND = {
    "forward hook": (lambda model: model.register_forward_hook(biased), "hook biased on the model"),
    "forward hook with kwargs": (
        lambda model: model.register_forward_hook(biased_with_kwargs, with_kwargs=True),
        "hook biased_with_kwargs on the model",
    ),
    "hook before": (
        lambda model: model.register_forward_pre_hook(other_ids, with_kwargs=True),
        "hook other_ids on the model",
    ),
    "partial hook": (
        lambda model: model.register_forward_hook(functools.partial(biased)),
        "hook biased on the model",
    ),
    "forward replaced": (replace("forward"), "`forward`, which was replaced"),
    "ponder replaced": (replace("ponder"), "`ponder`, which was replaced"),
    "inputs replaced": (replace("prepare_inputs_for_generation"), "`prepare_inputs_for_generation`, which was"),
    "forward overridden": (override("forward"), "`forward`, which was replaced"),
    "call overridden": (override("__call__"), "`__call__`, which was replaced"),
    "ponder overridden": (override("ponder"), "`ponder`, which was replaced"),
    "hook of accelerate's kind": (lambda model: add_hook_to_module(model, Looking()), "accelerate's hook Looking"),
}


@pytest.mark.parametrize(("change", "words"), AROUND.values(), ids=AROUND)
def test_what_may_change_the_model_s_logits_is_refused_by_drafts(change, words):
    model = small()
    change(model)
    with pytest.raises(PonderingError, match=f"`num_draft_tokens` does not .*{words}.*num_draft_tokens=0"):
        draft_or_not(model)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules_are_refused_by_drafts(register):
    model = small()
    handle = getattr(torch.nn.modules.module, register)(lambda *_: None)
    try:
        with pytest.raises(PonderingError, match=r"`num_draft_tokens` does not run the hook .* of all modules"):
            draft_or_not(model)
    finally:
        handle.remove()
    check_drafts(model)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_prompt_learning_is_refused_by_drafts_and_works_without(kind):
    sizes = {"num_virtual_tokens": 4, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    model = get_peft_model(small(), kind(task_type="CAUSAL_LM", **sizes)).eval()
    with pytest.raises(PonderingError, match=r"PEFT's .*_TUNING, whose virtual tokens drafts do not see"):
        model.generate(input_ids=tiny.token_ids(1, 5), num_draft_tokens=2, max_new_tokens=2)
    check_drafts(model.get_base_model())  # as PEFT leaves it


def steering(module, arguments, output):
    return output + 0.7


def steer_layers(model):
    for layer in model.backbone.model.layers:
        layer.mlp.register_forward_hook(steering)


def steer_decoder(model):
    def steer(module, arguments, output):
        output.last_hidden_state = output.last_hidden_state + 0.3
        return output

    model.backbone.model.register_forward_hook(steer)


def other_decoder(model):
    forward = model.backbone.model.forward

    def other(*arguments, **kwargs):
        output = forward(*arguments, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.backbone.model.forward = other


def other_head(model):
    forward = model.get_output_embeddings().forward
    model.get_output_embeddings().forward = lambda hidden_states: forward(hidden_states) + BIAS


def other_gate(model):
    model.pondering_gate.forward = lambda embedding: embedding * 0.3


def last_word(module, arguments, output):
    output[:, :, 7] += 2.0
    return output


INSIDE = {
    "layers": steer_layers,
    "decoder": steer_decoder,
    "another decoder": other_decoder,
    "head": lambda model: model.get_output_embeddings().register_forward_hook(last_word),
    "before the head": lambda model: model.get_output_embeddings().register_forward_pre_hook(
        lambda module, arguments: (arguments[0] * 1.5,)
    ),
    "another head": other_head,
    "gate": lambda model: model.pondering_gate.register_forward_hook(steering),
    "another gate": other_gate,
}


@pytest.mark.parametrize("change", INSIDE.values(), ids=INSIDE)
def test_what_is_changed_within_the_model_is_honoured_everywhere(change):
    """Plain text, drafts, exits, continuous batching and `base_model` are the same function."""
    model = small(pondering_gate="zero_init").double()
    torch.nn.init.constant_(model.pondering_gate.weight, 0.8)
    ids = tiny.token_ids(1, 6)
    with torch.no_grad():
        before = model(ids).logits
        change(model)
        expected = model(ids).logits
        assert (expected - before).abs().max() > 1e-3
        exit = {"pondering_exit": PonderingExit(CRITERIA["kl"](), 0.0)}
        torch.testing.assert_close(model(ids, **exit).logits, expected)
        head = model.get_output_embeddings()
        torch.testing.assert_close(head(model.base_model(ids).last_hidden_state), expected)
    tokens = check_drafts(model)
    assert tokens[0] == strategies.recomputed(model, ids[0], 9).tolist()
    strategies.continuous_batching(model)


@pytest.mark.parametrize("change", [AROUND[name][0] for name in ("forward hook", "forward replaced")])
def test_what_is_changed_around_the_model_is_honoured_by_exits_and_continuous_batching(change):
    model = small().double()
    ids = tiny.token_ids(1, 6)
    exit = {"pondering_exit": PonderingExit(CRITERIA["kl"](), 0.0)}
    with torch.no_grad():
        change(model)
        if "forward" in model.__dict__:
            forward = model.forward
            model.forward = lambda *arguments, **kwargs: biased(model, arguments, forward(*arguments, **kwargs))
        torch.testing.assert_close(model(ids, **exit).logits, model(ids).logits)
    strategies.continuous_batching(model)


def forget_precision():
    """What accelerate keeps for a whole process; a Trainer of another test may have left it."""
    for state in (accelerate.state.AcceleratorState, accelerate.state.PartialState):
        state._reset_state()


def mixed_precision(model):
    forget_precision()
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    finally:
        forget_precision()


def autocast_around(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


@pytest.mark.parametrize("prepare", [mixed_precision, autocast_around])
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_drafts_compute_in_the_mixed_precision_of_the_model(prepare):
    """Every product of every layer, in every tick, is in bfloat16 as it is without drafts."""
    model = prepare(small(base_changes={"num_hidden_layers": 1}))
    dtypes = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, arguments, output: dtypes.append(output.dtype))
    plain, drafted = draft_or_not(model)
    assert set(dtypes) == {torch.bfloat16}
    assert (plain.logits[0] - drafted.logits[0]).abs().max() == 0  # of the prompt
    for column in range(9):  # as far as the texts are the same, logits are as near as bfloat16 allows
        same = (plain.sequences[:, : 6 + column] == drafted.sequences[:, : 6 + column]).all(1)
        for row in same.nonzero().flatten().tolist():
            one, other = plain.logits[column][row], drafted.logits[column][row]
            assert (one - other).abs().max() <= 5e-2 * one.abs().max()
    assert same.any()


def lora(model):
    return wrap_with(target_modules=["q_proj", "embed_tokens", "lm_head"])(model)


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    return model


def dispatched(model):
    return cpu_offload(model, torch.device("cpu"))


def as_if_sharded(model):
    def before(module, arguments):
        pass

    before.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    model.register_forward_pre_hook(before)
    return model


HARMLESS = [lora, checkpointed, compiled, dispatched, as_if_sharded, torch.compile]


@pytest.mark.parametrize("wrap", HARMLESS, ids=lambda wrap: wrap.__name__)
def test_what_leaves_the_model_what_it_is_goes_on_with_drafts(wrap):
    model = wrap(small())
    # That a compiler stands around the model counts, not what it makes of it, which takes half a minute.
    with torch.compiler.set_stance("force_eager") if wrap is compiled else contextlib.nullcontext():
        check_drafts(model)
        check_drafts(model)  # PEFT leaves things behind


# An adapter for each row


def two_adapters(model, **settings):
    """Adapters "a" and "b" of the same places, with weights of their own."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    adapted = get_peft_model(model, config, adapter_name="a")
    adapted.add_adapter("b", config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


MIXED = {
    "layers": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}
WAYS = {
    "plain": {},
    "drafts": {"num_draft_tokens": 2},
    "exits that stop nothing": {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.0},
    "exits": {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 1e-3},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("settings", MIXED.values(), ids=MIXED)
def test_each_row_has_its_own_adapter_in_every_way_to_generate(settings, way):
    model = small(pondering_gate="zero_init", base_changes={"tie_word_embeddings": False}).double()
    torch.nn.init.constant_(model.pondering_gate.weight, 0.8)
    model = two_adapters(model, **settings).double()
    lengths, names = (6, 4, 7, 5), ["a", "b", "__base__", "b"]
    rows = [tiny.token_ids(length, seed=length) for length in lengths]
    prompts, mask = tiny.left_padded(rows)
    kept = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **way}
    kept |= {"return_dict_in_generate": True, "output_logits": True}
    mixed = model.generate(input_ids=prompts, attention_mask=mask, adapter_names=names, **kept)
    for index, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=rows[index][None], **kept)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=rows[index][None], **kept)
        assert mixed.sequences[index, 7:].tolist() == alone.sequences[0, lengths[index] :].tolist()
        assert mixed.pondering_steps_used[index].tolist() == alone.pondering_steps_used[0].tolist()
        if "num_beams" not in way:
            for column in range(7):
                torch.testing.assert_close(mixed.logits[column][index], alone.logits[column][0])
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    if way.get("pondering_exit_threshold"):
        assert len(mixed.pondering_steps_used.unique()) > 1


def test_adapters_of_the_embedding_for_several_rows_are_refused_by_name():
    model = two_adapters(small(), target_modules=["embed_tokens"])
    ids = tiny.token_ids(2, 5)
    with pytest.raises(PonderingError, match="`adapter_names` for several rows does not work with adapters of the"):
        model.generate(input_ids=ids, adapter_names=["a", "b"], max_new_tokens=2)
    model = two_adapters(small(), target_modules=["embed_tokens"])  # PEFT leaves its hooks behind after an error
    mixed = model.generate(input_ids=ids[:1], adapter_names=["b"], max_new_tokens=5, do_sample=False)
    model.set_adapter("b")
    assert mixed.tolist() == model.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False).tolist()


def test_what_else_peft_gives_each_row_is_refused_by_drafts_and_exits():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    model = get_peft_model(small(), config).eval()
    ids = tiny.token_ids(2, 5)
    ids[:, 3] = 5
    for way in ("drafts", "exits"):
        with pytest.raises(PonderingError, match="something of its own for each row by PEFT"):
            model.generate(input_ids=ids, max_new_tokens=2, **WAYS[way])


# Accessors, and what never runs


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma2"])
def test_the_decoder_with_the_head_gives_the_logits(model_type):
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=2)
    ids = tiny.token_ids(2, 6)
    with torch.no_grad():
        states = model.get_decoder()(input_ids=ids).last_hidden_state
        expected = model(ids).logits
        torch.testing.assert_close(backbone_logits(model.backbone, states), expected)
        assert (backbone_logits(model.backbone, model.backbone.get_decoder()(ids)[0]) - expected).abs().max() > 1e-3
    passes = model.get_decoder()
    assert passes.get_decoder() is passes
    assert model.get_encoder() is model  # which says that there is none


PUT_ON_THE_BACKBONE = {
    "a hook on": lambda backbone: backbone.register_forward_hook(biased),
    "a hook on ": lambda backbone: backbone.register_forward_pre_hook(lambda *_: None),
    "another forward pass of": replace("forward"),
}


@pytest.mark.parametrize("what", PUT_ON_THE_BACKBONE)
def test_what_is_put_around_the_backbone_never_runs_and_a_warning_says_so(what, monkeypatch):
    said = []
    monkeypatch.setattr(pondering_backbone.logger, "warning_once", said.append)
    model = small()
    ids = tiny.token_ids(1, 6)
    expected = model(ids).logits
    assert not said
    PUT_ON_THE_BACKBONE[what](model.backbone)
    assert torch.equal(model(ids).logits, expected)
    check_drafts(model)
    assert said[0].startswith(f"{what.strip()} `model.backbone` never runs")


@pytest.mark.parametrize("wrap", [dispatched, compiled, as_if_sharded, autocast_around])
def test_what_is_harmless_around_the_backbone_is_not_warned_of(wrap, monkeypatch):
    said = []
    monkeypatch.setattr(pondering_backbone.logger, "warning_once", said.append)
    model = small()
    wrap(model.backbone)
    model(tiny.token_ids(1, 6))
    assert not said


# Arguments: the checkpoint. Where ponder_hf is not: the same rules by the checkpoint's own code.
BY_ITS_OWN_CODE = """
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ids = torch.tensor([[5, 9, 14, 31, 7], [8, 3, 22, 40, 11]])
KEPT = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

def load():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model

def check_drafts(model, **more):
    plain = model.generate(input_ids=ids, **KEPT, **more).tolist()
    assert model.generate(input_ids=ids, num_draft_tokens=2, **KEPT, **more).tolist() == plain
    return plain

def check_refused(model, words):
    try:
        model.generate(input_ids=ids, num_draft_tokens=2, **KEPT)
    except Exception as error:
        assert type(error).__name__ == "PonderingError" and words in str(error), error
    else:
        raise AssertionError("not refused: " + words)

model = load()
check_drafts(model)
model.register_forward_hook(lambda *_: None)
check_refused(model, "on the model, which may change")
model = load()
forward = model.forward
model.forward = lambda *arguments, **kwargs: forward(*arguments, **kwargs)
check_refused(model, "`forward`, which was replaced")

model, dtypes = Accelerator(mixed_precision="bf16", cpu=True).prepare(load()), set()
for module in model.modules():
    if isinstance(module, torch.nn.Linear):
        module.register_forward_hook(lambda module, arguments, output: dtypes.add(output.dtype))
model.generate(input_ids=ids, num_draft_tokens=2, **KEPT)
assert dtypes == {torch.bfloat16}, dtypes

bare, wrapped = load(), get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]))
for model in (bare, wrapped.eval()):
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output + output.size(2) / 64)
torch.testing.assert_close(bare(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=1e-4, atol=1e-4)

config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
model = get_peft_model(load(), config, adapter_name="one")
model.add_adapter("two", config)
for name, parameter in model.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter, std=0.3)
mixed = check_drafts(model.eval(), adapter_names=["one", "two"])
model.set_adapter("two")
assert model.generate(input_ids=ids, **KEPT).tolist()[1] == mixed[1]

model = load()
states = model.get_decoder()(input_ids=ids).last_hidden_state
torch.testing.assert_close(model.get_output_embeddings()(states), model(ids).logits)
"""


@pytest.mark.slow
def test_the_same_rules_hold_by_the_code_of_a_checkpoint(tmp_path):
    small().save_pretrained(tmp_path / "model")
    elsewhere.run(BY_ITS_OWN_CODE, tmp_path / "home", tmp_path / "model")
