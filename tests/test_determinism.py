"""The same seed gives the same result: in another process, after saving and loading, with rows in another order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from patience import PATIENCE
from transformers import set_seed

from ponder_hf import PonderingForCausalLM


TESTS = Path(__file__).resolve().parent
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = {**GREEDY, "do_sample": True}
EXITS = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.2}

# Trains, samples, evaluates and looks, all from seeds. Arguments: a folder. Prints a digest of each.
PROGRAM = """
import hashlib, json, sys
import tiny, torch
from transformers import TrainingArguments, set_seed
from ponder_hf.lenses.readings import read_passes
from ponder_hf.training import PonderingTrainer

def digest(*tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()

set_seed(7)
fields = {"pondering_steps": 2, "pondering_gate": "zero_init_matrix", "intermediate_loss_weight": 0.3}
model = tiny.pondering_model("gpt2", base_changes={"resid_pdrop": 0.1}, **fields)
found = {"weights": digest(*model.state_dict().values())}
rows = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(24, 8).tolist()]
settings = TrainingArguments(
    sys.argv[1], max_steps=6, per_device_train_batch_size=4, save_strategy="no", report_to="none", use_cpu=True,
    seed=11, learning_rate=1e-2,
)
PonderingTrainer(model=model, args=settings, train_dataset=rows).train()
found["trained"] = digest(*model.state_dict().values())
model.eval()
ids, sampled = tiny.token_ids(3, 6), {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
for name, options in {
    "sampled": {},
    "drafted": {"num_draft_tokens": 2},
    "looked up": {"num_draft_tokens": 2, "draft_source": "prompt_lookup"},
    "left early": {"pondering_exit_criterion": "entropy", "pondering_exit_threshold": 4.0},
    "beams": {"num_beams": 2},
}.items():
    set_seed(5)
    found[name] = model.generate(ids, **sampled, **options).tolist()
looks = vars(read_passes(model, ids[0]))
found["lens"] = digest(*(looks[name] for name in sorted(looks) if torch.is_tensor(looks[name])))
print(json.dumps(found))
"""


def test_two_processes_come_to_the_same(tmp_path):
    """To the bit, also where Python hashes words otherwise."""
    results = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, tmp_path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert results[0] == results[1]
    assert results[0]["weights"] != results[0]["trained"]


@pytest.mark.parametrize("settings", [{}, {"num_draft_tokens": 2}, EXITS, {"num_beams": 2}], ids=str)
def test_what_is_sampled_is_the_same_after_saving_and_loading(settings, tmp_path):
    model = tiny.pondering_model("llama", pondering_steps=2, pondering_top_k=9)
    model.save_pretrained(tmp_path)
    loaded = PonderingForCausalLM.from_pretrained(tmp_path)
    results = []
    for each in (model, loaded, model):
        set_seed(3)
        results.append(each.generate(tiny.token_ids(2, 5), **SAMPLED, **settings).tolist())
    assert results[0] == results[1] == results[2]
    set_seed(4)
    assert model.generate(tiny.token_ids(2, 5), **SAMPLED, **settings).tolist() != results[0]


ORDER = [2, 0, 3, 1]


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_rows_in_another_order_give_the_same_in_that_order(model_type, top_k):
    """Up to rounding in float64: a row's numbers do not depend on where it stands."""
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=2, pondering_top_k=top_k)
    ids, mask = tiny.left_padded([tiny.token_ids(length, seed=length) for length in (7, 3, 5, 6)])
    labels = ids.masked_fill(mask == 0, -100)
    close = {"rtol": 1e-9, "atol": 1e-10}

    def run(rows):
        model.zero_grad()
        output = model(ids[rows], attention_mask=mask[rows], labels=labels[rows], output_pondering=True)
        output.loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        return output.loss.detach(), gradients, [each.detach() for each in (*output.pondering_logits, output.logits)]

    loss, gradients, logits = run([0, 1, 2, 3])
    other_loss, other_gradients, other_logits = run(ORDER)
    torch.testing.assert_close(other_loss, loss, **close)
    torch.testing.assert_close(other_gradients, gradients, **close)
    real = mask.bool()
    for found, expected in zip(other_logits, logits, strict=True):
        torch.testing.assert_close(found[real[ORDER]], expected[ORDER][real[ORDER]], **close)
    for settings in ({}, {"num_draft_tokens": 2}, EXITS, {"num_beams": 3}):
        plain = model.generate(ids, attention_mask=mask, **GREEDY, **settings)
        moved = model.generate(ids[ORDER], attention_mask=mask[ORDER], **GREEDY, **settings)
        assert moved.tolist() == plain[ORDER].tolist(), settings
