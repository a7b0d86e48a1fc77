"""Tools that look at models by hooks: reading and changing the hidden state of layer l in pass i."""

import re
import runpy
from pathlib import Path

import pytest
import tiny
import torch


REPOSITORY = Path(__file__).resolve().parents[1]
hooks = runpy.run_path(str(REPOSITORY / "examples/hooks.py"))
read, patched, recovered = (hooks[name] for name in ("read", "patched", "recovered"))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2", "opt"])
def test_what_is_read_is_the_state_of_that_pass(model_type):
    """As a model with fewer steps has it in its last pass, whose states transformers gives."""
    model, ids = tiny.pondering_model(model_type, torch.float64, pondering_steps=3), tiny.token_ids(2, 7)
    with torch.no_grad():
        for pass_index in range(4):
            states = model(ids, pondering_steps=pass_index, output_hidden_states=True).hidden_states
            torch.testing.assert_close(read(model, ids, 0, pass_index), states[1])
    assert len({read(model, ids, 0, pass_index).sum().item() for pass_index in range(4)}) == 4


@torch.no_grad()
def test_what_is_patched_acts_from_that_pass_on():
    model, ids = tiny.pondering_model("llama", torch.float64, pondering_steps=2), tiny.token_ids(1, 7)
    plain = model(ids, use_cache=False).logits
    own = read(model, ids, 1, 1)[:, 3]
    torch.testing.assert_close(patched(model, ids, 1, 1, own, 3), plain)
    other = read(model, tiny.token_ids(1, 7, seed=1), 1, 1)[:, 3]
    changed = patched(model, ids, 1, 1, other, 3)
    torch.testing.assert_close(changed[:, :3], plain[:, :3])
    assert (changed[:, 3:] - plain[:, 3:]).abs().amin(1).max() > 0
    assert torch.equal(model(ids, use_cache=False).logits, plain), "the hook is gone"
    # By hand: the last layer's state in pass 1 is all that its prediction is made of.
    base = model.backbone
    inputs = base.get_input_embeddings()(ids)
    for step in range(3):
        state = base.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        if step == 1:
            state = state.clone()
            state[:, 3] = base.model.norm(other)
        logits = base.lm_head(state)
        inputs = inputs + logits.softmax(-1) @ base.get_input_embeddings().weight
    torch.testing.assert_close(changed, logits)


def test_the_last_layer_of_the_last_pass_brings_everything_back():
    torch.manual_seed(0)
    model = tiny.pondering_model("gpt_neox", torch.float64, base_changes={"scale": 6.0}, pondering_steps=2)
    table = recovered(model, tiny.token_ids(1, 6), tiny.token_ids(1, 6, seed=1))
    assert table.shape == (3, 2)
    assert table[-1, -1].item() == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(table[:2], torch.ones(2, 2), atol=1e-3)


def test_the_lines_for_nnsight_in_the_documentation(tmp_path):
    pytest.importorskip("nnsight", reason="needs ponder-hf[test]")
    text = (REPOSITORY / "docs/lens.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "nnsight" in block)
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=2)
    ids, clean = tiny.token_ids(1, 7), tiny.token_ids(1, 7, seed=1)
    state = read(model, clean, 1, 1)[:, -1]
    (tmp_path / "lines.py").write_text(code, encoding="utf-8")  # nnsight reads the source of whoever calls it
    found = runpy.run_path(str(tmp_path / "lines.py"), {"model": model, "input_ids": ids, "state": state})
    for pass_index in range(3):
        torch.testing.assert_close(found["states"][pass_index], read(model, ids, 1, pass_index))
    torch.testing.assert_close(found["logits"], patched(model, ids, 1, 1, state, -1))
