"""Interventions in what a model ponders, each against pondering written out by hand."""

import checkpoints
import pytest
import tiny
import torch

import ponder_hf
from ponder_hf import PonderingError
from ponder_hf.lenses import interventions
from ponder_hf.lenses.interventions import Intervention, intervening


TEXT = "once upon a time there was one cat and two dogs"


@pytest.fixture
def model():
    made = tiny.pondering_model(
        "llama", torch.float64, pondering_steps=2, pondering_gate="zero_init", embedding_scale=2.0
    )
    torch.nn.init.normal_(made.pondering_gate.weight)
    return made


@pytest.fixture
def tokenizer():
    return checkpoints.word_tokenizer()


def by_hand(model, ids, change):
    """Logits (T, V) of the last pass, where `change(step, t)` replaces what each step adds, t (T, d)."""
    table = model.get_input_embeddings().weight
    inputs = 2.0 * table[ids][None]
    for step in range(2):
        logits = model.backbone(inputs_embeds=inputs, use_cache=False).logits
        added = model.pondering_gate.weight * 2.0 * (logits.softmax(-1) @ table)
        inputs = inputs + change(step, added[0])
    return model.backbone(inputs_embeds=inputs, use_cache=False).logits[0]


def intervened(model, ids, intervention):
    with torch.no_grad(), intervening(model, intervention):
        return model(ids[None], use_cache=False).logits[0]


def added_of_token(model, embedding):
    return model.pondering_gate.weight * 2.0 * embedding


@torch.no_grad()
def test_each_against_pondering_by_hand(model, tokenizer):
    ids, other = tiny.token_ids(7), tiny.token_ids(9, seed=1)
    table = model.get_input_embeddings().weight
    recorded = []
    by_hand(model, other, lambda step, added: recorded.append(added) or added)
    noise = [torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(5 + step))[0].double() for step in range(2)]
    unit = [each / each.norm(dim=-1, keepdim=True) for each in noise]
    expected = {
        "nothing": (interventions.scale(1), lambda step, added: added),
        "scale": (interventions.scale(0.3), lambda step, added: 0.3 * added),
        "stop": (interventions.stop_at(1), lambda step, added: added * (step < 1)),
        "token": (interventions.replace_by_token(model, 17), lambda step, added: added_of_token(model, table[17])),
        "text": (
            interventions.replace_by_token(model, "cat", tokenizer),
            lambda step, added: added_of_token(model, table[tokenizer.convert_tokens_to_ids("cat")]),
        ),
        "mean": (interventions.replace_by_mean(model), lambda step, added: added_of_token(model, table.mean(0))),
        "noise": (
            interventions.replace_by_noise(seed=5),
            lambda step, added: unit[step] * added.norm(dim=-1, keepdim=True),
        ),
        "prompt": (
            interventions.replace_by_prompt(model, tokenizer, other.tolist()),
            lambda step, added: recorded[step][:7],
        ),
        "second step": (interventions.scale(0).at(steps=[1]), lambda step, added: added * (step != 1)),
        "some tokens": (
            interventions.scale(0).at(positions=[2, 5]),
            lambda step, added: added * torch.tensor([[1.0, 1, 0, 1, 1, 0, 1]], dtype=torch.float64).T,
        ),
    }
    plain, seen = model(ids[None], use_cache=False).logits[0], []
    for name, (intervention, change) in expected.items():
        found = intervened(model, ids, intervention)
        # float32 noise is the same in float64.
        torch.testing.assert_close(found, by_hand(model, ids, change), rtol=1e-6, atol=1e-9, msg=name)
        seen.append(found)
    torch.testing.assert_close(seen[0], plain)
    assert all((each - plain).abs().max() > 1e-3 for each in seen[1:])
    assert torch.equal(model(ids[None], use_cache=False).logits[0], plain), "it is gone with its context"


def test_stopping_at_a_pass_predicts_what_that_pass_does(model, tokenizer):
    whole = ponder_hf.lens(model, tokenizer, TEXT)
    stopped = ponder_hf.lens(model, tokenizer, TEXT, intervention=interventions.stop_at(1))
    assert stopped.intervention == "stopped at pass 1"
    torch.testing.assert_close(stopped.readings.entropy[2], whole.readings.entropy[1])
    torch.testing.assert_close(stopped.readings.share[2], whole.readings.share[1])
    assert not torch.allclose(stopped.readings.entropy[2], whole.readings.entropy[2])


def test_noise_is_as_long_as_what_it_replaces(model):
    """With a gate, too, which shortens every direction differently."""
    lengths = []

    def watch(step, added, finish):
        lengths.append(added.norm(dim=-1))
        return added

    watching = Intervention("watched", watch)
    intervened(model, tiny.token_ids(7), [watching, interventions.replace_by_noise(), watching])
    torch.testing.assert_close(lengths[0], lengths[1])


def test_several_act_in_order(model):
    ids, mean = tiny.token_ids(7), interventions.replace_by_mean(model)
    both = intervened(model, ids, [mean, interventions.scale(0.5)])
    expected = model.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(both, by_hand(model, ids, lambda *_: 0.5 * added_of_token(model, expected)))
    torch.testing.assert_close(intervened(model, ids, [interventions.scale(0.5), mean]), intervened(model, ids, mean))


def test_generate_is_intervened_in(model, tokenizer):
    """With a cache token by token: each step of each token, in order."""
    stopped = ponder_hf.lens(model, tokenizer, "once upon", max_new_tokens=6, intervention=interventions.stop_at(0))
    base = model.backbone
    ids = torch.tensor([stopped.token_ids[:2]])
    for _ in range(6):
        inputs = 2.0 * base.get_input_embeddings()(ids)
        ids = torch.cat([ids, base(inputs_embeds=inputs, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert stopped.token_ids == ids[0].tolist()
    assert stopped.token_ids != ponder_hf.lens(model, tokenizer, "once upon", max_new_tokens=6).token_ids


def test_what_cannot_be_done_is_refused(model, tokenizer):
    ids = tiny.token_ids(7)
    short = interventions.replace_by_prompt(model, tokenizer, ids[:3].tolist(), pondering_steps=1)
    for intervention, message in (
        (short, "the other text has 3 tokens and this one 7"),
        (interventions.scale(0).at(positions=[7]), "`positions` has 7, but the text has only 7 tokens"),
        (Intervention("mine", lambda step, added, finish: added[0]), "'mine' gave the shape"),
    ):
        with pytest.raises(PonderingError, match=message):
            intervened(model, ids, intervention)
    with pytest.raises(PonderingError, match="pondered over in 1 steps"):
        intervened(model, ids[:3], short)
    with pytest.raises(PonderingError, match="'cat dogs' is 2 tokens"):
        interventions.replace_by_token(model, "cat dogs", tokenizer)
    with pytest.raises(PonderingError, match="`token` must be from 0 to 130, got 131"):
        interventions.replace_by_token(model, 131)
    with pytest.raises(PonderingError, match="needs a `tokenizer`"):
        interventions.replace_by_token(model, "cat")
    with pytest.raises(PonderingError, match="`pass_index` must be at least 0"):
        interventions.stop_at(-1)
    with pytest.raises(PonderingError, match="which a plain model does not have"), intervening(model.backbone, short):
        pass
    with (
        pytest.raises(PonderingError, match="intervened in already"),
        intervening(model, short),
        intervening(model, short),
    ):
        pass
    assert "ponder" not in vars(model)


@pytest.mark.parametrize(
    "settings", [{"num_draft_tokens": 2}, {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.1}]
)
def test_drafts_and_exits_are_refused(model, settings):
    with (
        pytest.raises(
            PonderingError, match=r"leave out drafts and early exits|the model's `ponder`, which was replaced"
        ),
        intervening(model, interventions.scale(0)),
    ):
        model.generate(tiny.token_ids(1, 4), max_new_tokens=4, do_sample=False, **settings)
