"""The nine cases of the authors' own implementation: this is what "correct" means for the whole project.

`../shared/reference` holds what their code computed in float64. Tolerances are that folder's.
"""

import pytest
import torch
from safetensors.torch import load_file

from ponder_hf import PonderingForCausalLM


CASES = {
    "gpt2_s2_scaled_multiplied": {"pondering_steps": 2, "embedding_scale": 8.0, "input_scale": 2.0},
    "gpt2_s3_plain": {"pondering_steps": 3, "embedding_scale": 1.0, "input_scale": 1.0},
    "gpt_neox_s1_plain": {"pondering_steps": 1, "embedding_scale": 1.0, "input_scale": 1.0},
    "gpt_neox_s3_plain": {"pondering_steps": 3, "embedding_scale": 1.0, "input_scale": 1.0},
    "gpt_neox_s3_scaled": {"pondering_steps": 3, "embedding_scale": 8.0, "input_scale": 1.0},
    "gpt_neox_s3_scaled_multiplied": {"pondering_steps": 3, "embedding_scale": 8.0, "input_scale": 3.0},
    "llama_s2_tied": {"pondering_steps": 2, "embedding_scale": 1.0, "input_scale": 1.0},
    "llama_s3_plain": {"pondering_steps": 3, "embedding_scale": 1.0, "input_scale": 1.0},
    "llama_s3_scaled_multiplied_temp": {"pondering_steps": 3, "embedding_scale": 8.0, "input_scale": 3.0},
}
# LLaMA's norms and rotations compute in float32 whatever the model's dtype.
TOLERANCE = {
    ("gpt2", torch.float64): 1e-9,
    ("gpt_neox", torch.float64): 1e-9,
    ("llama", torch.float64): 1e-4,
    ("gpt2", torch.float32): 1e-3,
    ("gpt_neox", torch.float32): 1e-3,
    ("llama", torch.float32): 1e-3,
}


@pytest.fixture(params=CASES)
def case(request, shared):
    return request.param, shared / "reference" / request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def model(request, case):
    return PonderingForCausalLM.from_base(case[1] / "checkpoint", dtype=request.param)


def tolerance_of(model):
    return TOLERANCE[model.config.base_config.model_type, model.dtype]


def assert_close(actual, expected, tolerance):
    difference = (actual.double() - expected).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item()), f"differs by {difference:.1e}"


def test_the_authors_flags_are_read(case):
    model = PonderingForCausalLM.from_base(case[1] / "checkpoint")
    expected = {**CASES[case[0]], "pondering_top_k": None, "pondering_gate": "none"}
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert model.config.pondering_temperature == (0.7 if case[0].endswith("_temp") else 1.0)


def test_logits_and_loss(case, model):
    expected = load_file(case[1] / "expected.safetensors")
    output = model(expected["input_ids"], labels=expected["labels"])
    assert_close(output.logits, expected["logits"], tolerance_of(model))
    assert_close(output.loss, expected["loss"].squeeze(), tolerance_of(model))


def test_every_stored_gradient(case, model):
    expected = load_file(case[1] / "expected.safetensors")
    model(expected["input_ids"], labels=expected["labels"]).loss.backward()
    parameters = dict(model.backbone.named_parameters())
    gradients = {key: parameters[key.removeprefix("grad/")].grad for key in expected if key.startswith("grad/")}
    gradients["grad_input_embeddings"] = model.get_input_embeddings().weight.grad
    if "grad_output_embeddings" in expected:
        gradients["grad_output_embeddings"] = model.get_output_embeddings().weight.grad
    assert len(gradients) >= 5
    for key, gradient in gradients.items():
        assert_close(gradient, expected[key], tolerance_of(model))


def test_real_positions_of_a_left_padded_batch(case, model):
    expected = load_file(case[1] / "expected.safetensors")
    mask, wanted = expected["left_padded_attention_mask"], expected["left_padded_logits"]
    with torch.no_grad():
        logits = model(
            expected["input_ids"], attention_mask=mask, position_ids=expected["left_padded_position_ids"]
        ).logits
        # The authors' LLaMA gives NaN for a whole padded row in float64; the row alone says what it should be.
        for row in range(len(mask)):
            real = mask[row].bool()
            if wanted[row, real].isnan().any():
                assert case[0].startswith("llama")
                wanted[row, real] = model(expected["input_ids"][row : row + 1, real]).logits[0].double()
    assert_close(logits[mask.bool()], wanted[mask.bool()], tolerance_of(model))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_greedy_tokens(case, model, use_cache):
    greedy = load_file(case[1] / "expected.safetensors")["greedy_ids"]
    tokens = model.generate(
        greedy[:, :17], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=use_cache
    )
    assert tokens.tolist() == greedy.tolist()
