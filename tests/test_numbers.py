"""Numbers at the edge: forbidden tokens, NaN, overflow, vocabularies of one, and tensors with nothing in them."""

import itertools
import math

import pytest
import tiny
import torch
from checkpoints import change_tensors, run

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.evaluation.passes import measure_passes
from ponder_hf.lenses.readings import read_passes
from ponder_hf.training.draft_heads import draft_head_loss, train_draft_heads


pytest_plugins = ["refusals"]

FORBIDDEN = {
    "the first half": lambda: torch.arange(tiny.VOCAB_SIZE) < tiny.VOCAB_SIZE // 2,
    "the second half": lambda: torch.arange(tiny.VOCAB_SIZE) >= tiny.VOCAB_SIZE // 2,
    "the last three": lambda: torch.arange(tiny.VOCAB_SIZE) >= tiny.VOCAB_SIZE - 3,
    "all but one": lambda: torch.arange(tiny.VOCAB_SIZE) != 77,
    "every other": lambda: torch.arange(tiny.VOCAB_SIZE) % 2 == 0,
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}
NAN = float("nan")


@pytest.fixture(params=[1, 4], ids="{} threads".format)
def threads(request):
    """Few tokens meet one part of the vocabulary in each thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def forbidding(case, dtype=torch.float32):
    """A plain model with a head's bias that forbids some tokens, and which those are."""
    # No padding token: the reference looks the table up, where the row of one would have no gradient.
    base, forbidden = tiny.base_model("phi", dtype, pad_token_id=None), FORBIDDEN[case]()
    with torch.no_grad():
        base.lm_head.bias[forbidden] = -math.inf
    return base, forbidden


@pytest.mark.parametrize("case", FORBIDDEN)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_forbidden_tokens_have_no_share_in_pondering(case, dtype, shape, threads):
    """Logits, loss and gradients against float64 and nothing but the backbone's own forward pass."""
    base, forbidden = forbidding(case, dtype)
    model, ids = PonderingForCausalLM.from_base(base, pondering_steps=2), tiny.token_ids(*shape)
    labels = torch.full_like(ids, int((~forbidden).nonzero()[0]))
    output = model.train()(ids, labels=labels)
    if shape[1] > 1:
        output.loss.backward()
        found = [parameter.grad.double() for parameter in base.parameters()]
    logits = output.logits.double()
    assert torch.equal(logits.isneginf(), forbidden.expand_as(logits))
    base.double().zero_grad()
    expected = tiny.plain_pondering(base, ids, 2)
    allowed = ~forbidden
    assert (logits - expected)[..., allowed].abs().max() < TOLERANCES[dtype]
    if shape[1] == 1:
        return
    targets = labels[:, 1:].flatten()
    torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), targets).backward()
    for gradient, parameter in zip(found, base.parameters(), strict=True):
        assert gradient.isfinite().all()
        scale = 1 + parameter.grad.abs().max()
        assert (gradient - parameter.grad).abs().max() / scale < TOLERANCES[dtype]


@pytest.mark.parametrize("top_k", [None, 1, 8, tiny.VOCAB_SIZE], ids=str)
@pytest.mark.parametrize("case", FORBIDDEN)
def test_forbidden_tokens_are_never_generated(case, top_k):
    """With a cache, drafts, samples and beams; greedy text is that of no cache."""
    base, forbidden = forbidding(case)
    model = PonderingForCausalLM.from_base(base, pondering_steps=2, pondering_top_k=top_k)
    ids = tiny.token_ids(2, 3)
    settings = {"max_new_tokens": 5, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **settings)
    greedy = [{}, {"num_draft_tokens": 2}]
    for more in [*greedy, {"do_sample": True}, {"do_sample": True, "num_draft_tokens": 2}]:
        text = model.generate(ids, **settings, **more)
        assert not forbidden[text[:, 3:]].any(), more
        assert more not in greedy or torch.equal(text, expected), more


@pytest.mark.parametrize("case", FORBIDDEN)
@pytest.mark.parametrize("criterion", ["kl", "entropy", "argmax"])
def test_tokens_stop_pondering_where_some_are_forbidden(case, criterion):
    base, _ = forbidding(case)
    model, ids = PonderingForCausalLM.from_base(base, pondering_steps=3), tiny.token_ids(2, 3)
    exits = {"pondering_exit_criterion": criterion, "pondering_exit_threshold": 1e4}
    output = model.generate(ids, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True, **exits)
    assert (output.pondering_steps_used == (1 if criterion == "kl" else 0)).all()


@pytest.mark.parametrize("case", FORBIDDEN)
def test_forbidden_tokens_are_measured(case):
    """Entropies, divergences and what draft heads learn from are those of the allowed tokens alone."""
    base, forbidden = forbidding(case)
    model, ids = PonderingForCausalLM.from_base(base, pondering_steps=2), tiny.token_ids(2, 5)
    model.add_draft_heads()
    allowed = model(ids, output_pondering=True)
    passes = torch.stack([*allowed.pondering_logits, allowed.logits])[..., ~forbidden].detach().double()
    log_p = passes.log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    divergences = (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1)
    measured = measure_passes(model, ids, labels=torch.full_like(ids, int((~forbidden).nonzero()[0])), entropies=True)
    torch.testing.assert_close(measured.entropies, entropies, atol=1e-4, rtol=0)
    readings = read_passes(model, ids[0])
    torch.testing.assert_close(readings.entropy, entropies[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(readings.divergence, divergences[:, 0], atol=1e-4, rtol=0)
    loss, _ = draft_head_loss(model, ids)
    # A head that is new predicts what its pass predicts.
    torch.testing.assert_close(loss.item(), divergences[:-1].mean().item(), atol=1e-3, rtol=0)


GENERATING = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 2},
    "drafted": {"num_draft_tokens": 2},
    "drafted and sampled": {"num_draft_tokens": 2, "do_sample": True},
    "exits": {"pondering_exit_criterion": "entropy", "pondering_exit_threshold": 0.5},
}


def spoil_head(model):
    model.get_output_embeddings().weight.fill_(NAN)


def spoil_row_of_head(model):
    model.get_output_embeddings().weight[9] = NAN


def spoil_embedding(model):
    model.get_input_embeddings().weight[5] = NAN


def overflow(model):
    weight = model.half().get_output_embeddings().weight
    weight.copy_(weight.sign() * 6e4)


@pytest.mark.parametrize(
    ("spoil", "ways"),
    [
        pytest.param(spoil, ways, id=f"{spoil.__name__}-{ways}")
        for spoil in (spoil_head, spoil_row_of_head, spoil_embedding, overflow)
        for ways in GENERATING
        if (spoil, ways) != (overflow, "exits")  # tokens stop before a pass in which numbers overflow
    ],
)
def test_text_is_not_made_of_nan(spoil, ways):
    """Plain greedy decoding would give a text all the same; who asks for it gets it."""
    model = tiny.pondering_model(pondering_steps=2)
    with torch.no_grad():
        spoil(model)
    ids = tiny.token_ids(2, 4)
    settings = {"max_new_tokens": 4, "eos_token_id": None, **GENERATING[ways]}
    with pytest.raises(PonderingError, match="predicts NaN or infinity"):
        model.generate(ids, **settings)
    if spoil is not overflow and ways == "greedy":
        assert model.generate(ids, remove_invalid_values=True, **settings).shape == (2, 8)


@pytest.mark.parametrize("ways", GENERATING)
def test_nan_that_comes_late_is_noticed(ways):
    """Token 5 is fed in first when it has been generated: the prompt's prediction is a good one."""
    model = tiny.pondering_model(pondering_steps=0)
    with torch.no_grad():
        spoil_embedding(model)
    only_five = [token for token in range(tiny.VOCAB_SIZE) if token != 5]
    settings = {"suppress_tokens": only_five, "eos_token_id": None, **GENERATING[ways]}
    ids = tiny.token_ids(1, 4).clamp(min=6)
    if ways != "beams":  # two beams need two tokens
        assert model.generate(ids, max_new_tokens=1, **settings).shape == (1, 5)
        with pytest.raises(PonderingError, match="predicts NaN or infinity"):
            model.generate(ids, max_new_tokens=6, **settings)


def test_the_command_line_writes_no_text_of_nan(place, check_refused):
    change_tensors(place / "pondering", lambda tensors: tensors["backbone.embed_out.weight"].fill_(NAN))
    for more in ([], ["--do-sample"], ["--num-draft-tokens", "2"]):
        check_refused("generate", "pondering", "--prompt", "once upon", "--json", *more, words=["predicts NaN"])


@pytest.mark.parametrize("had_heads", [False, True], ids=["new heads", "heads"])
def test_draft_heads_do_not_learn_nan(had_heads):
    """Where all is NaN the best tokens are the same: an agreement of 1. The model stays what it was."""
    model = tiny.pondering_model(pondering_steps=2, **({"draft_heads": 1} if had_heads else {}))
    with torch.no_grad():
        spoil_head(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PonderingError, match="in step 1 is nan"):
        train_draft_heads(model, tiny.token_ids(4, 6), steps=3)
    assert model.config.draft_heads == (1 if had_heads else 0)
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_figures_of_nan_are_nan():
    """No accuracy of 0.0 and no agreement of 1.0, also where only one of the passes is NaN."""
    model, ids = tiny.pondering_model(pondering_steps=2), tiny.token_ids(2, 5)

    def spoil_step(module, arguments, output):
        passes.append(output)
        if len(passes) == 2:
            output.last_hidden_state.fill_(NAN)

    passes = []
    good = measure_passes(model, ids).sums().figures()
    model.backbone.base_model.register_forward_hook(spoil_step)
    first, *others = measure_passes(model, ids).sums().figures()
    assert first["accuracy"] == good[0]["accuracy"]
    assert first["loss"] == good[0]["loss"]
    assert math.isnan(first["agreement"])
    for name in ("loss", "perplexity", "accuracy", "agreement"):
        assert all(math.isnan(each[name]) for each in others)


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi", "gemma2", "opt"])
@pytest.mark.parametrize("top_k", [None, 1, tiny.VOCAB_SIZE], ids=str)
def test_batches_and_texts_with_nothing_in_them(model_type, top_k):
    """Where the plain model computes, so does the pondering one, forward and backward, and the other way round."""
    base = tiny.base_model(model_type)
    model = PonderingForCausalLM.from_base(base, pondering_steps=2, pondering_top_k=top_k)

    def outcome(each, ids, **settings):
        try:
            output = each(ids, **settings)
            if output.loss is not None:
                output.loss.backward()
            return output.logits.shape
        except Exception as error:
            return type(error)

    for shape in itertools.product((0, 1, 2), (0, 1, 3)):
        ids = tiny.token_ids(*shape)
        for settings in ({}, {"use_cache": False}, {"labels": ids}):
            assert outcome(model, ids, **settings) == outcome(base, ids, **settings), (shape, settings)
    for shape in ((0, 3), (2, 0)):
        with pytest.raises(PonderingError, match="the prompt is empty"):
            model.generate(tiny.token_ids(*shape), max_new_tokens=2)


@pytest.mark.parametrize("model_type", tiny.SPINE)
@pytest.mark.parametrize("top_k", [None, 1], ids=str)
def test_a_vocabulary_of_one(model_type, top_k):
    changes = {"vocab_size": 1, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    model = tiny.pondering_model(model_type, base_changes=changes, pondering_steps=2, pondering_top_k=top_k)
    ids = torch.zeros(2, 3, dtype=torch.long)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.loss.abs() < 1e-6
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    for ways in ("greedy", "without a cache", "sampled", "drafted", "drafted and sampled", "exits"):
        assert model.generate(ids, max_new_tokens=4, **GENERATING[ways]).tolist() == [[0] * 7] * 2


@pytest.mark.parametrize("top_k", [None, tiny.VOCAB_SIZE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_logits_give_the_mean_of_all_embeddings(dtype, top_k, threads):
    model = tiny.pondering_model(dtype=dtype, pondering_steps=1, pondering_top_k=top_k)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    inputs = []
    model.backbone.base_model.register_forward_pre_hook(
        lambda decoder, given, named: inputs.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tiny.token_ids(2, 3))
    mean = model.get_input_embeddings().weight.double().mean(0)
    first, second = (each.double() for each in inputs)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(second - first, mean.expand_as(first), atol=tolerance, rtol=0)


@pytest.mark.parametrize("top_k", [None, 1, 8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_logits_in_half_precision(dtype, top_k, threads):
    """Just below float16's largest number, and one token far above all others: its embedding is the sum."""
    model = tiny.pondering_model("phi", dtype, pondering_steps=1, pondering_top_k=top_k)
    with torch.no_grad():
        model.backbone.lm_head.bias.fill_(-6e4)
        model.backbone.lm_head.bias[50] = 6e4
    inputs = []
    model.backbone.base_model.register_forward_pre_hook(
        lambda decoder, given, named: inputs.append(named["inputs_embeds"]), with_kwargs=True
    )
    output = model(tiny.token_ids(2, 3))
    output.logits.logsumexp(-1).sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    first, second = (each.detach().double() for each in inputs)
    expected = model.get_input_embeddings().weight[50].double().expand_as(first)
    torch.testing.assert_close(second - first, expected, atol=2e-2, rtol=0)


def test_more_tokens_than_there_are_is_refused_by_name():
    with pytest.raises(PonderingError, match="pondering_top_k"):
        tiny.pondering_model(pondering_top_k=tiny.VOCAB_SIZE + 1)


@pytest.mark.parametrize("command", ["convert base out", "export pondering out", "push pondering me/it --dry-run"])
def test_nan_is_copied_and_told(place, capsys, command):
    name, source = {"convert": ("embed_out.weight", "base")}.get(
        command.split()[0], ("backbone.embed_out.weight", "pondering")
    )
    assert run(*command.split()) == 0
    assert "NaN" not in capsys.readouterr().err
    change_tensors(place / source, lambda tensors: tensors[name][0].fill_(-math.inf))
    assert run(*command.replace("out", "two").split()) == 0
    assert "NaN" not in capsys.readouterr().err, "which forbids a token"
    change_tensors(place / source, lambda tensors: tensors[name][0, 3:4].fill_(NAN))
    assert run(*command.replace("out", "three").split()) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "NaN" in line]
    (line,) = [line for line in lines if line.startswith("ponder-hf: warning: ")]
    assert f"{source} holds NaN in " in line


def test_doctor_knows_forbidden_tokens_from_nan(tmp_path, capsys):
    base, _ = forbidding("the first half")
    model = PonderingForCausalLM.from_base(base)
    model.save_pretrained(tmp_path / "model")
    assert run("doctor", "--checkpoint", tmp_path / "model") == 0
    with torch.no_grad():
        spoil_head(model)
    model.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert run("doctor", "--checkpoint", tmp_path / "model") == 2
    assert "predicts NaN" in capsys.readouterr().err
