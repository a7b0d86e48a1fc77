"""Pondering checkpoints that are broken, and calls of generate that cannot be: refused as all bad input is."""

import json
import re
import shutil

import pytest
import tiny
import torch
from checkpoints import change_config, change_tensors, run

from ponder_hf.modeling import modeling_pondering


pytest_plugins = ["refusals"]


SAVED = {
    "pondering_steps: 'three'": ({"pondering_steps": "three"}, "`pondering_steps`"),
    "pondering_top_k: 1000": ({"pondering_top_k": 1000}, "`pondering_top_k`"),
    "unknown field": ({"pondering_stops": 3}, "did you mean `pondering_steps`"),
    "newer format": ({"pondering_format_version": 99}, "newer ponder_hf"),
    "base_config: 3": ({"base_config": 3}, "`base_config`"),
    "base_config without model_type": ({"base_config": {}}, "`base_config`"),
}


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("command", ["export", "generate", "doctor"])
def test_a_saved_configuration_that_cannot_be(place, check_refused, command, case):
    fields, words = SAVED[case]
    change_config(place / "pondering", **fields)
    rest = {"export": ["pondering", "out"], "generate": ["pondering", "--prompt", "cat"]}
    line = check_refused(command, *rest.get(command, ["--checkpoint", "pondering"]), words=[words])
    assert line.startswith("config.json of pondering: ")


def test_a_saved_backbone_that_cannot_be(place, check_refused):
    saved = json.loads((place / "pondering/config.json").read_text())["base_config"]
    change_config(place / "pondering", base_config={**saved, "hidden_size": "big"})
    check_refused("export", "pondering", "out", words=["config.json of pondering", "hidden_size"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("backbone.embed_out.weight"), "lacks the weight backbone.lm_head.weight"),
        (lambda t: t.update({"backbone.more": torch.ones(1)}), "has the weight backbone.more"),
        (lambda t: t.update({"backbone.embed_out.weight": torch.ones(9, 32)}), "lm_head.weight with shape (9, 32)"),
    ],
    ids=["missing", "unknown", "another shape"],
)
def test_weights_that_do_not_fit_a_pondering_configuration(place, check_refused, change, words):
    change_tensors(place / "pondering", change)
    check_refused("export", "pondering", "out", words=[words])
    check_refused("generate", "pondering", "--prompt", "cat", words=[words])


HUGE = {"vocab_size": 99_999_999_999, "intermediate_size": 10**11, "num_hidden_layers": 10**9}


@pytest.mark.parametrize("field", HUGE)
def test_sizes_far_beyond_the_weights_take_no_memory(place, check_refused, capsys, field):
    """transformers would make what is not stored first, and look at the shapes then."""
    saved = json.loads((place / "pondering/config.json").read_text())["base_config"]
    change_config(place / "pondering", base_config={**saved, field: HUGE[field]})
    change_config(place / "base", **{field: HUGE[field]})
    for words in (
        ["convert", "base", "out"],
        ["export", "pondering", "out"],
        ["generate", "pondering", "--prompt", "cat"],
        ["lens", "pondering", "--prompt", "cat"],
        ["doctor", "--checkpoint", "pondering"],
    ):
        check_refused(*words, words=["they do not belong together"])
    if field == "num_hidden_layers":  # the others are met after the text was read
        for source in ("base", "pondering"):
            words = ["train", source, "--data", "text.txt", "--output", "out"]
            check_refused(*words, words=["they do not belong together"])
    assert run("demo", "--base", "base", "--output", "out") == 2
    assert "they do not belong together" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_export_of_a_plain_checkpoint(check_refused):
    check_refused("export", "base", "out", words=["plain checkpoint already"])


SHORT = ["pondering", "--prompt", "cat", "--max-new-tokens", "2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base", "--prompt", "cat"], "ponder-hf convert base"),
        (["nothing/here", "--prompt", "cat"], "nothing/here"),
        (["pondering", "--prompt", ""], "prompt is empty"),
        (["pondering", "--prompt", " \n"], "prompt is empty"),
        (["pondering"], "--prompt"),
        (["pondering", "--prompt", "cat", "--pondering-steps", "-1"], "--pondering-steps"),
        (["pondering", "--prompt", "cat", "--pondering-steps", "x"], "--pondering-steps"),
        (["pondering", "--prompt", "cat", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["pondering", "--prompt", "cat", "--temperature", "0"], "--temperature"),
        (["pondering", "--prompt", "cat", "--temperature", "nan"], "--temperature"),
        (["pondering", "--prompt", "cat", "--top-p", "1.5"], "--top-p"),
        (["pondering", "--prompt", "cat", "--pondering-steps", "1.5"], "--pondering-steps"),
        (["pondering", "--prompt", "cat", "--seed", "-1"], "--seed must be at least 0 and below 2**32"),
        (["pondering", "--prompt", "cat", "--seed", "4294967296"], "--seed"),
        (["pondering", "--prompt", "cat", "--draft-source", "own"], "--num-draft-tokens"),
        ([*SHORT, "--num-draft-tokens", "2", "--draft-source", "heads"], "has none"),
        ([*SHORT, "--num-draft-tokens", "-1"], "--num-draft-tokens"),
        ([*SHORT, "--pondering-exit-criterion", "kl"], "--pondering-exit-threshold"),
    ],
    ids=" ".join,
)
def test_generate_refuses(check_refused, arguments, words):
    check_refused("generate", *arguments, words=[words])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pondering_steps": -1}, "`pondering_steps` must be an integer >= 0 (0: no pondering), got -1"),
        ({"pondering_steps": "3"}, "got '3'"),
        ({"pondering_exit_threshold": 0.1}, "needs `pondering_exit_criterion`: one of 'kl', 'entropy', 'argmax'"),
        (
            {"pondering_exit_threshold": 0.1, "pondering_exit_criterion": "kk"},
            "must be one of 'kl', 'entropy', 'argmax'",
        ),
        ({"num_draft_tokens": -1}, "`num_draft_tokens` must be an integer >= 0 (0: no drafts), got -1"),
        ({"num_draft_tokens": 2.0}, "`num_draft_tokens` must be an integer >= 0"),
        ({"num_draft_tokens": True}, "`num_draft_tokens` must be an integer >= 0"),
        ({"num_draft_tokens": 2, "draft_source": "heads"}, "the model has none: train them"),
        ({"num_draft_tokens": 2, "cache_implementation": "static"}, "works with transformers' dynamic cache"),
    ],
    ids=str,
)
def test_settings_of_generate_in_a_checkpoint(place, check_refused, monkeypatch, settings, words):
    (place / "pondering/generation_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(modeling_pondering, "run_backbone", None)
    check_refused("generate", "pondering", "--prompt", "once upon", "--max-new-tokens", "2", words=[words])


def break_tokenizer(place):
    path = place / "pondering/tokenizer.json"
    path.write_text(path.read_text().replace('"WordLevel"', '"Nothing"'))


def empty_tokenizer(place):
    (place / "pondering/tokenizer.json").write_text("{}")


def remove_tokenizer(place):
    for path in (place / "pondering").glob("*"):
        if "token" in path.name or "chat" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def foreign_tokenizer(place):
    path = place / "pondering/tokenizer.json"
    path.write_text(re.sub(r'"cat": \d+', '"cat": 4321', path.read_text()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_tokenizer, ["the tokenizer of pondering cannot be used"]),
        (empty_tokenizer, ["the tokenizer of pondering cannot be used"]),
        (remove_tokenizer, ["has no tokenizer"]),
        (foreign_tokenizer, ["token id 4321", f"{tiny.VOCAB_SIZE} entries"]),
    ],
    ids=["broken", "empty", "none", "ids that the model does not have"],
)
def test_generate_with_a_tokenizer_that_cannot_be(place, check_refused, spoil, words):
    spoil(place)
    check_refused("generate", "pondering", "--prompt", "one cat", words=words)
