"""The numbers of a lens, against the plain way: the full logits of every pass."""

import dataclasses
import io
import json
import math

import checkpoints
import pytest
import tiny
import torch
from rich.console import Console
from rich.text import Text
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import ponder_hf
from ponder_hf import PonderingError, PonderingExit
from ponder_hf.lenses import MEASURES, read_passes, readings
from ponder_hf.lenses.table import print_table


TEXT = "once upon a time there was one cat and two dogs"


def all_logits(model, ids, steps=None):
    """(S + 1, T, V)."""
    with torch.no_grad():
        output = model(ids[None], output_pondering=True, use_cache=False, pondering_steps=steps)
    return torch.cat([*output.pondering_logits, output.logits])


def reference(logits, ids):
    """Every measure but the share, from full logits (S + 1, T, V), by formulas of their own."""
    p = logits.softmax(-1)
    of_next = p[:, :-1].gather(-1, ids[1:].expand(len(p), -1)[..., None])
    order = logits[:, :-1].argsort(-1, descending=True)
    return {
        "entropy": torch.special.entr(p).sum(-1),
        "probability": of_next.squeeze(-1),
        "rank": 1 + (order == ids[1:, None]).double().argmax(-1).double(),
        "divergence": functional.kl_div(p.log(), p[-1:].expand_as(p), reduction="none").sum(-1),
    }


def changed_model(model_type, fields, dtype=torch.float64):
    model = tiny.pondering_model(model_type, dtype, pondering_steps=2, **fields)
    if model.pondering_gate is not None:
        torch.nn.init.normal_(model.pondering_gate.weight)
    return model


@pytest.mark.parametrize("chunk", [1, 500, 1 << 24], ids=["one token", "some tokens", "all tokens"])
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("gpt_neox", {"pondering_gate": "zero_init"}),
        ("qwen2", {"pondering_gate": "zero_init_matrix"}),
        ("gemma2", {"pondering_temperature": 0.7}),  # caps, scaled embeddings
        ("granite", {"pondering_top_k": 5}),
        ("cohere", {"embedding_scale": 3.0, "input_scale": 2.0}),
        ("opt", {}),  # embeddings of another width than the states
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value), "plain"),
)
def test_against_all_logits(monkeypatch, model_type, fields, chunk):
    # The real chunk has millions of numbers. How many there are changes no result, so nothing else could choose it.
    monkeypatch.setattr(readings, "_LARGEST_CHUNK", chunk)
    model, ids = changed_model(model_type, fields), tiny.token_ids(9)
    logits = all_logits(model, ids)
    found = read_passes(model.train(), ids, top_tokens=4)
    assert model.training
    for name, expected in reference(logits, ids).items():
        torch.testing.assert_close(getattr(found, name)[:, : expected.shape[1]], expected)
    assert found.probability[:, -1].isnan().all()
    assert found.rank[:, -1].isnan().all()
    probabilities, token_ids = logits.softmax(-1).topk(4)
    assert torch.equal(found.top_ids, token_ids)
    torch.testing.assert_close(found.top_probabilities, probabilities)
    assert torch.equal(found.drafts, token_ids[:-1, :, 0])


def test_share_of_pondering_in_the_input():
    model, ids = changed_model("llama", {"pondering_gate": "zero_init", "embedding_scale": 2.0}), tiny.token_ids(9)
    logits = all_logits(model, ids)
    table = model.get_input_embeddings().weight
    first = inputs = 2.0 * table[ids]
    shares = read_passes(model, ids).share
    for index in range(3):
        pondered, own = (inputs - first).norm(dim=-1), first.norm(dim=-1)
        torch.testing.assert_close(shares[index], (pondered / (pondered + own)).detach())
        inputs = inputs + model.pondering_gate.weight * 2.0 * (logits[index].softmax(-1) @ table)
    assert not shares[0].any()


@pytest.mark.parametrize("criterion", ["kl", "entropy", "argmax"])
def test_the_first_token_stops_where_its_exit_says(criterion):
    """Of the first token: nothing before it, which might have stopped, can change its passes."""
    model = tiny.pondering_model("llama", torch.float64, base_changes={"scale": 6.0}, pondering_steps=3)
    texts = [tiny.token_ids(3, seed=seed) for seed in range(12)]
    found = [read_passes(model, ids) for ids in texts]
    distances = torch.stack([each.distances[criterion][:3, 0] for each in found])
    threshold = distances[distances < 1 if criterion == "argmax" else distances.isfinite()].median().item()
    for ids, each in zip(texts, found, strict=True):
        steps = []
        leave = PonderingExit.read(criterion, threshold)
        leave.record = steps.append
        with torch.no_grad():
            model(ids[None], pondering_exit=leave)
        assert each.stops(criterion, threshold)[0] == steps[0][0, 0]
    stops = [int(each.stops(criterion, threshold)[0]) for each in found]
    assert len(set(stops)) > 1, "the threshold tells nothing apart"


def test_no_more_logits_than_of_a_chunk_are_made(monkeypatch):
    monkeypatch.setattr(readings, "_LARGEST_CHUNK", 3 * tiny.VOCAB_SIZE)
    model = tiny.pondering_model("gpt2", pondering_steps=2)
    model(tiny.token_ids(1, 4))  # it checks itself
    sizes, calls, whole = [], [], readings.backbone_logits
    monkeypatch.setattr(
        readings, "backbone_logits", lambda backbone, states: sizes.append(states.shape[1]) or whole(backbone, states)
    )
    model.backbone.base_model.register_forward_hook(lambda *_: calls.append(1))
    read_passes(model, tiny.token_ids(10))
    assert len(calls) == 3
    assert sizes == [3, 3, 3] * 3 + [1, 1, 1]


def test_draft_heads_say_what_they_would_draft():
    model, ids = tiny.pondering_model("gpt_neox", torch.float64, pondering_steps=2, draft_heads=2), tiny.token_ids(9)
    torch.nn.init.normal_(model.draft_heads.down)
    states = []
    hook = model.backbone.base_model.register_forward_hook(lambda *a: states.append(a[2].last_hidden_state[0]))
    found = read_passes(model, ids)
    hook.remove()
    with torch.no_grad():
        expected = model.get_output_embeddings()(model.draft_heads(torch.stack(states[:2]), 0)).argmax(-1)
    assert torch.equal(found.drafts, expected)
    assert not torch.equal(found.drafts, found.top_ids[:-1, :, 0])
    assert ponder_hf.lens(model, checkpoints.word_tokenizer(), TEXT).draft_source == "heads"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    return checkpoints.save_base_and_model(tmp_path_factory.mktemp("lens"))


@pytest.fixture
def tokenizer():
    return checkpoints.word_tokenizer()


def test_a_checkpoint_s_own_code_and_an_adapter_give_the_same(made_once, tokenizer):
    peft = pytest.importorskip("peft", reason="needs ponder-hf[train]")
    ours = AutoModelForCausalLM.from_pretrained(made_once / "model")
    # By the path that transformers takes where ponder_hf has registered nothing.
    own_code = get_class_from_dynamic_module("modeling_pondering.PonderingForCausalLM", str(made_once / "model"))
    theirs = own_code.from_pretrained(made_once / "model")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(made_once / "model"),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"]),
    )
    expected = ponder_hf.lens(ours, tokenizer, TEXT, name="model").to_dict()
    assert type(theirs).__module__.startswith("transformers_modules")
    assert ponder_hf.lens(theirs, tokenizer, TEXT, name="model").to_dict() == expected
    assert ponder_hf.lens(adapted, tokenizer, TEXT, name="model").to_dict() == expected


def test_a_plain_model_has_one_pass(made_once, tokenizer):
    plain = AutoModelForCausalLM.from_pretrained(made_once / "base")
    pondering = AutoModelForCausalLM.from_pretrained(made_once / "model")
    found, expected = (ponder_hf.lens(model, tokenizer, TEXT).to_dict() for model in (plain, pondering))
    assert found["pondering_steps"] == found["trained_steps"] == 0
    for name in ("probability", "rank", "entropy"):
        assert found[name] == expected[name][:1]


def test_more_steps_than_the_model_s_own(made_once, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made_once / "model")
    own, more = (ponder_hf.lens(model, tokenizer, TEXT, pondering_steps=steps) for steps in (None, 5))
    assert (own.pondering_steps, more.pondering_steps, more.trained_steps) == (2, 5, 2)
    torch.testing.assert_close(more.readings.entropy[:3], own.readings.entropy)


def test_what_it_writes_is_looked_at_too(made_once, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made_once / "model")
    found = ponder_hf.lens(model, tokenizer, "once upon a", max_new_tokens=4)
    assert found.prompt_tokens == 3
    assert found.token_ids[3:] == model.generate(torch.tensor([found.token_ids[:3]]), max_new_tokens=4)[0, 3:].tolist()
    assert found.readings.rank[-1, 2:-1].tolist() == [1.0] * 4, "greedily written tokens are the most probable ones"


def test_as_a_dict_and_as_a_frame(made_once, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made_once / "model")
    found = ponder_hf.lens(model, tokenizer, TEXT, top_tokens=3, name="mine")
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    tokens = TEXT.split()
    assert content["tokens"] == tokens
    assert content["next_tokens"] == [*tokens[1:], None]
    assert all(len(content[name]) == 3 and {len(row) for row in content[name]} == {11} for name in MEASURES)
    assert content["rank"][0][-1] is content["probability"][0][-1] is None
    assert {len(top) for row in content["top"] for top in row} == {3}
    assert content["exits"]["kl"]["distance"][0] == [None] * 11
    frame = found.to_frame()
    assert len(frame) == 3 * 11
    row = frame[(frame["pass"] == 1) & (frame["position"] == 4)].iloc[0]
    assert (row["token"], row["next_token"]) == ("there", "was")
    assert row["predicted"] == content["top"][1][4][0]["token"]
    for name in MEASURES:
        assert row[name] == content[name][1][4]
    assert frame["rank"].isna().sum() == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pondering_steps": -1}, "`pondering_steps` must be an integer >= 0"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be at least 0, got -1"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1"),
        ({"top_tokens": 0}, "`top_tokens` must be at least 1"),
        ({"exit_thresholds": {"kk": 1}}, "must be one of 'kl', 'entropy', 'argmax'"),
        ({"exit_thresholds": {"kl": math.nan}}, "must be a finite number >= 0"),
        ({"text": " "}, "the text is empty to this tokenizer"),
        ({"text": "cat " * 65}, "has 65 tokens, and a lens looks at 64 by itself: give `max_tokens`"),
    ],
)
def test_what_cannot_be_used_is_refused(made_once, tokenizer, settings, message):
    model = AutoModelForCausalLM.from_pretrained(made_once / "model")
    with pytest.raises(PonderingError, match=message):
        ponder_hf.lens(model, tokenizer, **{"text": TEXT, **settings})


def test_positions_that_the_model_has_not_are_refused(tokenizer):
    model = tiny.pondering_model("gpt2")
    ponder_hf.lens(model, tokenizer, "cat " * 60, max_new_tokens=4)
    with pytest.raises(PonderingError, match="65 tokens are more than the 64 positions"):
        ponder_hf.lens(model, tokenizer, "cat " * 60, max_new_tokens=5)
    with pytest.raises(PonderingError, match="66 tokens are more than the 64 positions"):
        ponder_hf.lens(model, tokenizer, "cat " * 70, max_tokens=66)
    assert len(ponder_hf.lens(model, tokenizer, "cat " * 70, max_tokens=10).token_ids) == 10


def test_a_plain_model_takes_no_steps_and_a_broken_one_is_told(tokenizer):
    model = tiny.pondering_model("llama")
    with pytest.raises(PonderingError, match="this is a plain one"):
        ponder_hf.lens(model.backbone, tokenizer, TEXT, pondering_steps=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(PonderingError, match="predicts NaN"):
        ponder_hf.lens(model, tokenizer, TEXT)


# In the terminal and as a figure.


def printed(look, width, encoding="utf-8", **settings):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width)
    print_table(look, console=console, **settings)
    console.file.flush()
    return raw.getvalue().decode(encoding).splitlines()


@pytest.fixture(scope="module")
def look():
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", base_changes={"scale": 6.0}, pondering_steps=3)
    return ponder_hf.lens(model, checkpoints.word_tokenizer(), TEXT, name="mine", max_new_tokens=2)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_table_fits_its_width_and_has_every_number(look, width, measure):
    lines = printed(look, width, measure=measure)[2:]
    assert max(map(len, lines)) <= width
    assert sum(line.split().count("pass") for line in lines) == 4
    text = "\n".join(lines)
    for value in look.measure(measure).flatten().tolist():
        assert value != value or MEASURES[measure].write(value) in text
    assert width < 80 or text.count(" token ") == 1, "all passes beside each other"


def test_a_terminal_without_these_characters_gets_others(look):
    assert any("*" in line for line in printed(look, 80, "ascii"))
    assert any("✓" in line for line in printed(look, 80))


def test_colours_of_the_table_can_be_read(look):
    def luminance(colour):
        parts = [part / 255 for part in colour.get_truecolor()]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    passes, tokens = look.readings.probability.shape
    values = torch.linspace(0, 1, tokens * passes).view(tokens, passes).t()  # rising from cell to cell
    rising = dataclasses.replace(look, readings=dataclasses.replace(look.readings, probability=values))
    file = io.StringIO()
    print_table(rising, console=Console(file=file, width=200, force_terminal=True, color_system="truecolor"))
    cells = [span.style for span in Text.from_ansi(file.getvalue()).spans if span.style.bgcolor is not None]
    assert len(cells) == values.numel()
    lights = []
    for style in cells:
        paper, ink = luminance(style.bgcolor), luminance(style.color)
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.5, style
        lights.append(paper)
    assert lights == sorted(lights)


@pytest.mark.parametrize("count", [1, 11, 45])
def test_heat_maps_show_the_numbers(tokenizer, count):
    model = tiny.pondering_model("llama", pondering_steps=2)
    found = ponder_hf.lens(model, tokenizer, " ".join(["cat"] * count), name="costs $5 or $6")
    figure = found.figure()
    maps = [axis for axis in figure.axes if axis.images]
    lines = -(-count // 40)
    assert len(maps) == 5 * lines
    for index, name in enumerate(MEASURES):
        shown = [axis.images[0].get_array().filled(math.nan) for axis in maps[index * lines : (index + 1) * lines]]
        expected = found.measure(name)
        torch.testing.assert_close(torch.cat([*map(torch.from_numpy, shown)], 1), expected, equal_nan=True)
        assert MEASURES[name].title in maps[index * lines].get_title(loc="left")
    figure.savefig(io.BytesIO(), format="png")
    assert len(found.figure(["rank"]).axes) == lines + 1
    with pytest.raises(PonderingError, match="there is no measure 'ranks': the measures are probability"):
        found.figure(["ranks"])


def test_the_lightness_of_the_figure_s_colours_only_rises(look):
    colours = torch.tensor(look.figure(["probability"]).axes[0].images[0].get_cmap()(range(256)))[:, :3]
    grey = colours @ torch.tensor([0.299, 0.587, 0.114], dtype=colours.dtype)
    assert (grey.diff() > -1e-3).all()
    assert grey[-1] - grey[0] > 0.6
