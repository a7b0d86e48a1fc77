"""The model card: nothing but facts, valid metadata, and never over what a person wrote."""

import json
import math
import re
from dataclasses import replace

import checkpoints
import pytest
import torch
from huggingface_hub import ModelCard

from ponder_hf import PonderingError
from ponder_hf.conversion import convert
from ponder_hf.hub import card as cards
from ponder_hf.hub.card import Facts, facts_of_folder
from ponder_hf.hub.code import installed_code, sha256


FULL = Facts(
    name="model",
    repository="somebody/model",
    backbone="gpt_neox",
    num_layers=2,
    parameters=1234567,
    dtype="bfloat16",
    pondering_steps=3,
    fields={"pondering_gate": "zero_init"},
    has_tokenizer=True,
    base_model="somebody/base",
    licence={"license": "apache-2.0"},
    languages=("en",),
    datasets=("somebody/texts",),
    data=("somebody/texts",),
    evaluated_on="somebody/texts",
    training={"optimiser steps": "1,000", "seed": 42},
    evaluation_loss=2.5,
    pass_losses=(2.75, 2.625, 2.5625, 2.5),
    pass_accuracies=(0.25, 0.3125, 0.375, 0.4375),
    pass_agreements=(0.5, 0.625, 0.75, 1.0),
    code={"modeling_pondering.py": "ab" * 32},
    is_served_by_vllm=True,
)


@pytest.fixture
def card():
    return cards.render(FULL)


def test_every_fact_is_in_the_card(card):
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("somebody/base", "finetune")
    assert {"pondering", "custom_code", "gpt_neox"} <= set(data.tags)
    assert (data.language, data.datasets) == (["en"], ["somebody/texts"])
    results = {result.metric_name: result for result in data.eval_results}
    assert results["held-out loss"].metric_value == 2.5
    assert results["held-out loss"].dataset_name == "somebody/texts"
    assert results["held-out perplexity"].metric_value == pytest.approx(12.1825)
    for name, values in (("accuracy", FULL.pass_accuracies), ("agreement", FULL.pass_agreements)):
        assert [results[f"held-out {name} of pass {index}"].metric_value for index in range(4)] == [*values]
    assert results["held-out perplexity of pass 0"].metric_value == pytest.approx(math.exp(2.75), abs=1e-4)
    words = ["S = 3", "4 forward passes", "4 key/value caches of 2 layers", "1,234,567", "bfloat16", "zero_init"]
    words += ["0.2500 | 0.3125 | 0.3750 | 0.4375", "0.5000 | 0.6250 | 0.7500 | 1.0000"]
    words += ["1,000", "2.7500 | 2.6250 | 2.5625 | 2.5000", "ab" * 32, "2505.20674", "Zeng", "## Limits", "## Serve"]
    for word in words:
        assert word in card


def test_what_is_not_known_is_not_said():
    card = cards.render(Facts(name="model", pondering_steps=0, num_layers=2, parameters=5, backbone="gpt2"))
    for word in (
        "None",
        "nan",
        "[]",
        "## Training",
        "## Evaluation",
        "## Use",
        "## Serve",
        "base_model",
        "license",
        "## Code",
    ):
        assert word not in card
    assert "1 forward pass of the backbone" in card
    assert set(cards.split(card)[0]) == {"library_name", "pipeline_tag", "tags"}


def test_facts_of_a_folder(tmp_path):
    torch.manual_seed(0)
    checkpoints.save_base(tmp_path / "base", "gpt2", torch.bfloat16, tokenizer=True)
    convert(tmp_path / "base", tmp_path / "out", pondering_steps=2, pondering_top_k=7)
    facts = facts_of_folder(tmp_path / "out", "somebody/name")
    assert (facts.name, facts.backbone, facts.pondering_steps, facts.passes) == ("name", "gpt2", 2, 3)
    assert facts.fields == {"pondering_top_k": 7}
    assert (facts.dtype, facts.num_layers, facts.has_tokenizer, facts.base_model) == ("bfloat16", 2, True, None)
    assert facts.parameters == sum(tensor.numel() for tensor in checkpoints.stored(tmp_path / "out").values())
    assert facts.code == {name: sha256(content) for name, content in installed_code().items()}
    assert facts.release is not None
    (tmp_path / "out/pondering_cache.py").write_text("pass")
    assert facts_of_folder(tmp_path / "out").release is None


def test_a_server_is_told_of_where_the_plug_in_for_vllm_is_tested(tmp_path):
    torch.manual_seed(0)
    served = {}
    for model_type in ("gpt2", "gptj"):
        checkpoints.save_base(tmp_path / "base" / model_type, model_type)
        convert(tmp_path / "base" / model_type, tmp_path / model_type, pondering_steps=1)
        card = cards.render(facts_of_folder(tmp_path / model_type, "somebody/name"))
        served[model_type] = 'pip install "ponder-hf[vllm]"' in card and "\nvllm serve somebody/name\n" in card
        assert served[model_type] or "vllm" not in card.lower()
    assert served == {"gpt2": True, "gptj": False}
    assert "vllm" not in cards.render(facts_of_folder(tmp_path / "gpt2")).lower(), (
        "nobody can serve a name that is not known"
    )
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "gpt2/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    assert not facts_of_folder(tmp_path / "gpt2", "somebody/name").is_served_by_vllm


def test_the_base_is_named_only_where_it_came_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save_base(tmp_path / "some/base")
    convert("some/base", "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["base_config"]["_name_or_path"] == ""
    assert facts_of_folder(tmp_path / "out").base_model is None


# A person's edits


def test_an_untouched_card_is_brought_up_to_date(card):
    assert cards.is_untouched(card)
    newer = cards.render(replace(FULL, evaluation_loss=2.25, licence={"license": "mit"}))
    assert cards.merge(newer, card) == newer
    assert cards.merge(card, None) == card


def test_edits_survive(card):
    edited = card.replace("## Limits\n", "## Limits\n\n- It knows no rivers.\n", 1)
    edited = edited.replace("license: apache-2.0", "license: mit\nthumbnail: mine.png")
    edited = edited.replace("# model\n", "# model\n\nMy own words.\n", 1)
    edited = edited.replace("<!-- section: usage -->", "Between the sections.\n\n<!-- section: usage -->", 1)
    edited = re.sub(r"<!-- section: citation -->.*?<!-- /section -->\n", "", edited, flags=re.DOTALL)
    edited = edited.replace("language:\n- en\n", "")
    assert not cards.is_untouched(edited)
    for _ in range(2):
        newer = cards.render(replace(FULL, evaluation_loss=2.25, parameters=7654321))
        edited = cards.merge(newer, edited)
        for words in ("It knows no rivers.", "My own words.", "Between the sections.", "thumbnail: mine.png"):
            assert words in edited
        metadata, body = cards.split(edited)
        assert metadata["license"] == "mit"
        assert "language" not in metadata, "what was taken out came back"
        assert "## Citation" not in body
        assert "7,654,321" in body, "a section without edits is brought up to date"
        assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 2.25
        cards.check(edited)


def test_what_becomes_known_is_added_in_its_place(card):
    without = cards.render(replace(FULL, training={}, evaluation_loss=None))
    assert "## Training" not in without
    edited = without.replace("# model\n", "# mine\n", 1)
    merged = cards.merge(card, edited)
    assert "# mine" in merged
    assert merged.index("## Model") < merged.index("## Training") < merged.index("## Evaluation")
    assert merged.index("## Evaluation") < merged.index("## Limits")


def test_a_card_of_ones_own_gets_metadata_only(card):
    own = "---\nlicense: mit\n---\n\n# Mine\n\nAll of it.\n"
    merged = cards.merge(card, own)
    metadata, body = cards.split(merged)
    assert metadata["license"] == "mit"
    assert metadata["library_name"] == "transformers"
    assert "section" not in body.split("<!-- ponder_hf wrote")[0]
    assert cards.split(cards.merge(card, merged))[1] == body
    gone = merged.replace("pipeline_tag: text-generation\n", "")
    assert "pipeline_tag" not in cards.split(cards.merge(card, gone))[0]


def test_a_librarys_own_card_is_replaced(card):
    generic = ModelCard.from_template(
        ModelCard("---\nlibrary_name: transformers\n---\n").data,
        model_description="This is the model card of a 🤗 transformers model that has been pushed on the Hub. This "
        "model card has been automatically generated.",
    )
    assert cards.merge(card, str(generic)) == card


def test_broken_metadata_is_refused(card):
    with pytest.raises(PonderingError, match="no YAML"):
        cards.merge(card, "---\nlicense: [mit\n---\n\n# Mine\n")
