"""Settings put together by chance: a request in a batch is the request alone, an adapter is what it is once merged.

More of them: PONDER_FUZZ=200 make test PYTEST_ARGS=tests/test_random_calls.py
"""

import copy
import os
import random

import pytest
import tiny
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig


NUM_SEEDS = int(os.environ.get("PONDER_FUZZ", "4"))
GREEDY = {"do_sample": False, "pad_token_id": 0}


def random_model(chance, dtype):
    fields = {
        "pondering_steps": chance.randint(0, 3),
        "pondering_top_k": chance.choice([None, 1, 5, 40]),
        "pondering_gate": chance.choice(["none", "zero_init_matrix", "random_signs"]),
        "pondering_temperature": chance.choice([1.0, 0.6]),
        "embedding_scale": chance.choice([1.0, 2.0]),
    }
    model = tiny.pondering_model(chance.choice(tiny.SPINE), dtype, **fields)
    if fields["pondering_gate"] == "zero_init_matrix":
        torch.nn.init.normal_(model.pondering_gate.weight, std=0.3)
    return model


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_request_in_a_batch_is_the_request_alone(seed):
    chance = random.Random(seed)
    model = random_model(chance, torch.float32)
    prompts = [tiny.token_ids(chance.randint(1, 25), seed=chance.randrange(1 << 30)).tolist() for _ in range(4)]
    prompts += [prompts[0], prompts[0] + [7, 8]]  # pages of the same beginning may be shared
    steps, count, eos = chance.randint(0, 3), chance.randint(1, 14), chance.choice([None, 5])
    alone = [
        model.generate(torch.tensor([row]), max_new_tokens=count, eos_token_id=eos, pondering_steps=steps, **GREEDY)
        for row in prompts
    ]
    results = model.generate_batch(
        prompts,
        GenerationConfig(max_new_tokens=count, eos_token_id=-1 if eos is None else eos, **GREEDY),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=chance.choice([16, 24, 60]),
            page_size=chance.choice([4, 8, 16]),
            max_batch_tokens=chance.choice([8, 16, 64]),
        ),
        pondering_steps=steps,
    )
    found = [row + result.generated_tokens for row, result in zip(prompts, results.values(), strict=True)]
    assert found == [tokens[0].tolist() for tokens in alone]


ADAPTERS = {
    "lora": lambda **where: LoraConfig(r=3, init_lora_weights=False, **where),
    "dora": lambda **where: LoraConfig(r=3, init_lora_weights=False, use_dora=True, **where),
    "loha": lambda **where: LoHaConfig(r=3, init_weights=False, **where),
    "lokr": lambda **where: LoKrConfig(r=3, init_weights=False, **where),
}
WAYS = {
    "plain": {},
    "drafts": {"num_draft_tokens": 2},
    "beams": {"num_beams": 2},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("seed", range(max(1, NUM_SEEDS // 4)))
def test_an_adapter_is_what_it_is_once_merged(seed, kind):
    """The head and the embedding stay as they are: see docs/ecosystem.md for those that are one tensor."""
    chance = random.Random(f"{seed} {kind}")
    torch.manual_seed(seed)
    model = random_model(chance, torch.float32)
    where = r".*(attn|attention).*(proj|query_key_value|dense|out_proj)$"
    if model.backbone.config.model_type == "gpt2":
        kind, where = "lora", ".*c_attn$"  # the others know no layers of GPT-2's kind
    live = get_peft_model(model, ADAPTERS[kind](task_type="CAUSAL_LM", target_modules=where)).eval()
    merged = copy.deepcopy(live).merge_and_unload().eval()
    ids, mask = tiny.left_padded([tiny.token_ids(length, seed=seed + length) for length in (3, 8)])
    with torch.no_grad():
        found, expected = (each(input_ids=ids, attention_mask=mask).logits[mask.bool()] for each in (live, merged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for way in WAYS.values():
        settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None, **GREEDY}
        beams = {name: value for name, value in way.items() if name == "num_beams"}
        assert live.generate(**settings, **way).tolist() == merged.generate(**settings, **beams).tolist()
