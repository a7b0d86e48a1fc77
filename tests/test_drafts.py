"""Sources of drafts: heads and their training, in a checkpoint and without; prompt lookup."""

import copy
import random

import pytest
import tiny
import torch
from training_runs import SMALL, history, train, train_json, weights
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingConfig, PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_generate_drafts import DraftHeads, OwnPredictions, PromptLookup, read_source
from ponder_hf.training.draft_heads import draft_head_loss, train_draft_heads


pytest_plugins = ["training_material"]

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20}


def test_new_heads_are_the_passes_own_predictions():
    heads = DraftHeads(3, 16)
    states = torch.randn(3, 5, 16)
    torch.testing.assert_close(heads(states), states)


def test_heads_are_one_residual_network_a_pass():
    heads = DraftHeads(3, 16)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(2, 5, 16)
    for first in range(2):
        drafted = heads(states, first)
        for index in range(2):
            inner = states[index] @ heads.up[first + index] + heads.up_bias[first + index]
            inner = torch.nn.functional.gelu(inner)
            expected = states[index] + inner @ heads.down[first + index] + heads.down_bias[first + index]
            torch.testing.assert_close(drafted[index], expected)


def test_a_pass_without_a_head_keeps_its_own_prediction():
    heads = DraftHeads(2, 16)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(4, 5, 16)
    drafted = heads(states)
    torch.testing.assert_close(drafted[:2], heads(states[:2]))
    assert torch.equal(drafted[2:], states[2:])
    assert torch.equal(heads(states[2:], 2), states[2:])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "gemma3_text"])
def test_training_heads_makes_them_agree_and_leaves_the_model_alone(model_type):
    model = tiny.pondering_model(model_type, pondering_steps=2)
    before = copy.deepcopy(model.state_dict())
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = tiny.token_ids(16, 12)
    model.add_draft_heads()
    loss, agreement = draft_head_loss(model, blocks)
    train_draft_heads(model, blocks, steps=150, learning_rate=5e-3)
    later_loss, later_agreement = draft_head_loss(model, blocks)
    assert 0 < later_loss < 0.8 * loss
    assert (later_agreement > agreement).all()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert learned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_loss_is_the_divergence_from_the_last_pass_where_tokens_are():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=2, draft_heads=2)
    for parameter in model.draft_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = [tiny.token_ids(7), tiny.token_ids(4, seed=1)]
    ids, mask = tiny.left_padded(rows)
    losses, agreements, head = [], [], model.get_output_embeddings()
    with torch.no_grad():
        for row in rows:
            states = []
            last = model.ponder(model.get_input_embeddings()(row[None]), 2, on_hidden_states=states.append)
            target = head(last.last_hidden_state[0]).float()
            for index, state in enumerate(states):
                drafted = head(model.draft_heads(state, index)[0]).float()
                divergence = torch.distributions.kl_divergence(
                    torch.distributions.Categorical(logits=target), torch.distributions.Categorical(logits=drafted)
                )
                losses.append(divergence.sum())
                agreements.append((drafted.argmax(-1) == target.argmax(-1)).sum())
        loss, agreement = draft_head_loss(model, ids, mask)
    torch.testing.assert_close(loss, sum(losses) / 22)
    expected = torch.stack([agreements[0] + agreements[2], agreements[1] + agreements[3]]) / 11
    torch.testing.assert_close(agreement, expected)


def test_heads_draft_the_same_text_in_fewer_ticks():
    model = tiny.pondering_model("llama", pondering_steps=3)
    prompt = tiny.token_ids(1, 6)
    settings = {**GREEDY, "num_draft_tokens": 3, "return_dict_in_generate": True}
    plain = model.generate(prompt, **GREEDY).tolist()
    before = model.generate(prompt, **settings)
    train_draft_heads(model, model.generate(prompt, **GREEDY), steps=100, rows=1)
    after = model.generate(prompt, **settings)
    assert before.sequences.tolist() == after.sequences.tolist() == plain
    assert after.draft_acceptance_rate > before.draft_acceptance_rate


def test_heads_are_saved_and_loaded_with_the_model(tmp_path):
    model = tiny.pondering_model("llama", pondering_steps=2, draft_heads=2)
    for parameter in model.draft_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    loaded, report = PonderingForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.draft_heads == 2
    for one, other in zip(model.draft_heads.parameters(), loaded.draft_heads.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad
    # Another number of steps is a matter of the call and of the configuration; the heads stay.
    fewer = PonderingForCausalLM.from_pretrained(tmp_path, pondering_steps=1)
    assert torch.equal(fewer.draft_heads.up, model.draft_heads.up)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).draft_heads is not None
    assert not any(name.startswith("draft_heads") for name in loaded.to_base().state_dict())


def test_a_checkpoint_that_knows_no_heads_has_none(tmp_path):
    tiny.pondering_model("llama").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"draft_heads": 0,' in text
    (tmp_path / "config.json").write_text(text.replace('"draft_heads": 0,', ""))
    loaded, report = PonderingForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.draft_heads is None
    assert not report["missing_keys"]


def test_a_new_model_with_heads_begins_with_its_own_predictions():
    torch.manual_seed(0)
    model = PonderingForCausalLM(PonderingConfig(tiny.base_config("llama"), draft_heads=3))
    states = torch.randn(3, 2, 32)
    assert torch.equal(model.draft_heads(states), states)
    assert model.draft_heads.up.std() > 0.1


def test_what_a_draft_source_may_be():
    plain, headed = tiny.pondering_model("llama"), tiny.pondering_model("llama", draft_heads=3)
    assert isinstance(read_source(None, plain), OwnPredictions)
    assert read_source(None, headed) is headed.draft_heads
    assert isinstance(read_source("own", headed), OwnPredictions)
    assert read_source("heads", headed) is headed.draft_heads
    assert read_source("prompt_lookup", headed).source is headed.draft_heads
    lookup = PromptLookup()
    assert read_source(lookup, plain) is lookup


# Prompt lookup


@pytest.mark.parametrize(
    ("text", "sizes", "expected"),
    [
        ([5, 6, 7, 8, 5, 6], (2, 2), 7),
        ([5, 6, 7, 5, 6, 8, 5, 6], (2, 2), 8),  # the newest
        ([1, 5, 6, 7, 2, 5, 6, 8, 1, 5, 6], (3, 2), 7),  # the longest
        ([5, 6, 7, 8, 9, 6], (2, 2), 99),
        ([5, 6, 7, 8, 9, 6], (2, 1), 7),
        ([4], (2, 1), 99),
        ([4, 4], (2, 1), 4),
        ([], (2, 1), 99),
        ([1, 7, 256, 0, 1], (1, 1), 7),  # as bytes, 1 also stands within 256, 0
    ],
)
def test_prompt_lookup_continues_what_the_text_repeats(text, sizes, expected):
    lookup = PromptLookup(None, *sizes)
    assert lookup.token(0, 0, text, 99) == expected
    assert lookup.token(0, 1, text, 99) == 99  # later passes correct it


def test_prompt_lookup_drafts_the_same_text():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=2)
    prompt = tiny.token_ids(2, 5).repeat(1, 4)
    expected = model.generate(prompt, **GREEDY).tolist()
    assert model.generate(prompt, num_draft_tokens=2, draft_source="prompt_lookup", **GREEDY).tolist() == expected


@pytest.mark.parametrize("sizes", [(2, 3), (3, 0)])
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(PonderingError, match="1 <= min <= max"):
        PromptLookup(None, *sizes)


# The command


def test_the_command_trains_heads_and_nothing_else(folder, capsys):
    assert train("pondering", "--max-steps", "2", "--learning-rate", "1e-3") == 0
    words = ["--draft-heads", "--max-steps", "30", "--save-steps", "20", "--held-out", "8", "--logging-steps", "10"]
    result = train_json(capsys, "heads", *words, source="pondering", small=SMALL[:4])
    assert result["draft_heads"]
    assert result["pondering"]["draft_heads"] == 2
    old, new = weights(folder / "pondering"), weights(folder / "heads")
    assert {name for name in new if name not in old} == {
        f"draft_heads.{name}" for name in ("up", "up_bias", "down", "down_bias")
    }
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert new["draft_heads.down"].abs().max() > 0
    rows = history(folder / "heads/checkpoint-30")
    logged = [row for row in rows if "loss" in row]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert all(0 <= row[f"draft_{index}_agreement"] <= 1 for row in logged for index in range(2))
    # Resumed from its checkpoint it comes to the same heads, and may be trained on.
    (folder / "heads/model.safetensors").unlink()
    assert train("heads", "--resume", "heads/checkpoint-20", source=None, small=[]) == 0
    assert torch.equal(weights(folder / "heads")["draft_heads.down"], new["draft_heads.down"])
    assert train("more", "--draft-heads", "--max-steps", "2", source="heads", small=SMALL[:4]) == 0
    assert not torch.equal(weights(folder / "more")["draft_heads.down"], new["draft_heads.down"])


@pytest.mark.parametrize(
    ("words", "source", "message"),
    [
        ([], "base", "base is a plain model, which has no passes to put draft heads on: train it to ponder first"),
        (["--lora"], "base", "leave out `lora`, and train draft heads for the model later"),
    ],
)
def test_what_heads_cannot_be_trained_for(folder, capsys, words, source, message):
    assert train("out", "--draft-heads", *words, source=source, small=SMALL[:4]) == 2
    assert message in capsys.readouterr().err.replace("--lora", "`lora`")
    assert not (folder / "out").exists()


def _plain_lookup(token_ids, predicted, max_ngram_size, min_ngram_size):
    for size in range(max_ngram_size, min_ngram_size - 1, -1):
        for start in range(len(token_ids) - size - 1, -1, -1):
            if token_ids[start : start + size] == token_ids[-size:]:
                return token_ids[start + size]
    return predicted


@pytest.mark.parametrize("unit", [1, 257, 2**24], ids=["small", "bytes that repeat", "large"])
def test_prompt_lookup_equals_a_plain_search(unit):
    """Ids of one repeated byte would match between two numbers, too."""
    chance = random.Random(unit)
    for _ in range(500):
        token_ids = [unit * chance.randrange(3) for _ in range(chance.randint(1, 30))]
        longest = chance.randint(1, 5)
        shortest = chance.randint(1, longest)
        found = PromptLookup(None, longest, shortest).token(0, 0, token_ids, -1)
        assert found == _plain_lookup(token_ids, -1, longest, shortest), token_ids
