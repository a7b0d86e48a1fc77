"""Each backbone in vLLM against `model.generate`: tokens, and their log-probabilities."""

import pytest
import tiny
import torch


pytest.importorskip("vllm", reason="vLLM is not installed here; `make vllm` makes an environment that has it")

from serving.engines import continued, engine
from serving.models import CHANGES, EXPERTS, NUM_NEW_TOKENS, generated, make_checkpoint, ragged_prompts

from ponder_hf.vllm import TESTED_BACKBONES


TOLERANCE = 1e-4
EVERY_FIELD = {
    "pondering_temperature": 0.7,
    "embedding_scale": 1.5,
    "input_scale": 2.0,
    "pondering_gate": "zero_init",
    "pondering_top_k": 20,
    "draft_heads": 2,
}
MATRIX = {**EVERY_FIELD, "pondering_gate": "zero_init_matrix", "pondering_top_k": None}
# (backbone, fields of pondering, whether vLLM compiles it)
CASES = [
    pytest.param("llama", {}, False, id="llama"),
    pytest.param("gpt2", EVERY_FIELD, False, id="gpt2-every-field"),
    pytest.param("gpt_neox", {}, False, id="gpt_neox"),
    pytest.param("gemma2", {}, False, id="gemma2"),
    pytest.param("llama", {"pondering_top_k": 20}, True, id="llama-compiled"),
    pytest.param("qwen3", MATRIX, False, id="qwen3-gate-of-a-matrix"),
    pytest.param("qwen2", MATRIX, True, id="qwen2-gate-of-a-matrix-compiled", marks=pytest.mark.slow),
    pytest.param("mixtral", {"pondering_top_k": 20}, True, id="mixtral-compiled"),
    *(pytest.param(name, {}, False, id=name, marks=pytest.mark.slow) for name in sorted(EXPERTS)),
    *(
        pytest.param(name, {}, False, id=name, marks=pytest.mark.slow)
        for name in sorted({*CHANGES} - {"llama", "gpt_neox", "gemma2"})
    ),
    *(
        pytest.param(name, EVERY_FIELD, True, id=f"{name}-every-field-compiled", marks=pytest.mark.slow)
        for name in sorted(CHANGES)
    ),
]


def test_all_backbones_of_the_spine_are_here():
    assert {*CHANGES} == {*tiny.SPINE}
    assert {*CHANGES, *EXPERTS} == TESTED_BACKBONES


@pytest.mark.parametrize(("model_type", "fields", "is_compiled"), CASES)
def test_tokens_and_log_probabilities_are_those_of_generate(tmp_path, model_type, fields, is_compiled):
    model = make_checkpoint(tmp_path / "checkpoint", model_type, **fields)
    prompts = ragged_prompts()
    expected = {
        steps: generated(model, prompts, pondering_steps=steps, num_new_tokens=NUM_NEW_TOKENS) for steps in (3, 1, 0)
    }
    for steps, (tokens, log_probabilities) in expected.items():
        overrides = {} if steps == 3 else {"pondering_steps": steps}
        with engine(tmp_path / "checkpoint", enforce_eager=not is_compiled, hf_overrides=overrides) as llm:
            found = continued(llm, prompts, NUM_NEW_TOKENS)
        assert found[0] == tokens
        assert (torch.tensor(found[1]) - log_probabilities).abs().max() < TOLERANCE
    make_checkpoint(tmp_path / "again", model_type, **fields)  # as the next test does in this process
    (tokens, found), (plain_tokens, plain) = ([torch.as_tensor(each) for each in expected[steps]] for steps in (3, 0))
    assert ((tokens != plain_tokens) | ((found - plain).abs() > 100 * TOLERANCE)).float().mean() > 0.75, "no hard test"
