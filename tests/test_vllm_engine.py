"""What engines of vLLM do with the requests to a pondering model: pages used again, chunks, preemption, sampling."""

import copy
import json

import pytest
import tiny
import torch


pytest.importorskip("vllm", reason="vLLM is not installed here; `make vllm` makes an environment that has it")

from serving.engines import continued, engine
from serving.models import add_byte_tokenizer, generated, make_checkpoint, ragged_prompts
from vllm import SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.sampling_params import StructuredOutputsParams


TOLERANCE = 1e-4
NUM_BYTES_AND_SPECIAL = 259
LONG_PROMPT = tiny.token_ids(500, seed=1).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "checkpoint"
    found = make_checkpoint(folder, "llama", {"vocab_size": NUM_BYTES_AND_SPECIAL}, pondering_steps=2)
    add_byte_tokenizer(folder)
    found.folder = folder
    return found


@pytest.fixture(scope="module")
def llm(model):
    """Pages of 32 tokens that are reused, and at most 64 tokens a step."""
    options = {"block_size": 32, "max_model_len": 640, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    with engine(
        model.folder,
        **options,
        enable_prefix_caching=True,
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as found:
        yield found


def one_request(llm, prompt, **parameters):
    request = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
    return llm.generate(request, SamplingParams(**parameters), use_tqdm=False)[0]


def test_a_long_prompt_in_chunks_and_again_from_its_pages(llm, model):
    # Another end, which shares ten pages with the first.
    prompts = [LONG_PROMPT, LONG_PROMPT, LONG_PROMPT[:330] + LONG_PROMPT[:100]]
    cached = []
    for prompt in prompts:
        (tokens,), log_probabilities = generated(model, [prompt], 32)
        output = one_request(llm, prompt, temperature=0, max_tokens=32, logprobs=0, ignore_eos=True)
        cached.append(output.num_cached_tokens)
        assert list(output.outputs[0].token_ids) == tokens
        found = [at[token].logprob for token, at in zip(tokens, output.outputs[0].logprobs, strict=True)]
        assert (torch.tensor(found) - log_probabilities[0]).abs().max() < TOLERANCE
    assert cached == [0, 480, 320]


@torch.no_grad()
def own_log_probabilities(model, ids):
    """(len(ids) - 1,): what the model gives each token but the first after those before it."""
    found = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return found.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)


def test_prompt_log_probabilities(llm, model):
    output = one_request(llm, LONG_PROMPT, temperature=0, max_tokens=1, prompt_logprobs=0)
    pairs = zip(LONG_PROMPT[1:], output.prompt_logprobs[1:], strict=True)
    found = torch.tensor([at[token].logprob for token, at in pairs])
    assert (found - own_log_probabilities(model, LONG_PROMPT)).abs().max() < TOLERANCE


def test_several_samples_of_a_prompt_and_seeds(llm, model):
    prompt = LONG_PROMPT[:20]
    asked = {"temperature": 1.0, "n": 3, "max_tokens": 24, "logprobs": 0, "ignore_eos": True}
    first, again, other = (one_request(llm, prompt, seed=seed, **asked).outputs for seed in (1, 1, 2))
    texts = [[list(sample.token_ids) for sample in samples] for samples in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len({*map(tuple, texts[0])}) == 3
    for sample in first:
        tokens = list(sample.token_ids)
        found = torch.tensor([at[token].logprob for token, at in zip(tokens, sample.logprobs, strict=True)])
        assert (found - own_log_probabilities(model, prompt + tokens)[-24:]).abs().max() < TOLERANCE


def test_stop_strings(llm):
    whole = one_request(llm, "A cat sat", temperature=0, max_tokens=24, ignore_eos=True).outputs[0].text
    stop = whole[10:12]
    output = one_request(llm, "A cat sat", temperature=0, max_tokens=24, ignore_eos=True, stop=[stop]).outputs[0]
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_an_answer_by_a_json_schema(llm):
    schema = {
        "type": "object",
        "properties": {"cat": {"enum": ["black", "white"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["cat", "count"],
        "additionalProperties": False,
    }
    asked = {"structured_outputs": StructuredOutputsParams(json=schema), "max_tokens": 64, "temperature": 1.0}
    for seed in range(3):
        answer = json.loads(one_request(llm, "A cat:", seed=seed, **asked).outputs[0].text)
        assert answer["cat"] in ("black", "white")
        assert 1 <= answer["count"] <= 9


def test_requests_that_lose_their_pages_start_again(model):
    prompts = ragged_prompts()
    tokens, _ = generated(model, prompts)
    # Room for 20 pages, where 16 requests come to need 50.
    with engine(model.folder, block_size=32, num_gpu_blocks_override=20, disable_log_stats=False) as llm:
        found, _ = continued(llm, prompts, 64)
        preemptions = [each.value for each in llm.get_metrics() if each.name == "vllm:num_preemptions"]
    assert found == tokens
    assert preemptions[0] > 0


def bytes_of_caches(model):
    """What the attention layers of an engine's model have for keys and values, each piece of memory once."""
    caches = [module.kv_cache for module in model.modules() if isinstance(module, Attention)]
    memories = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
    return len(caches), sum(memories.values())


def test_the_cache_is_exactly_that_of_all_passes(model):
    num_blocks, num_caches, in_bytes, of_a_block = {}, {}, {}, {}
    for steps in (0, 2):
        with engine(model.folder, block_size=32, hf_overrides={"pondering_steps": steps}) as llm:
            num_blocks[steps] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            ((num_caches[steps], in_bytes[steps]),) = llm.apply_model(bytes_of_caches)
            (specifications,) = llm.collective_rpc("get_kv_cache_spec")
            of_a_block[steps] = sum(each.page_size_bytes for each in specifications.values())
    layers = model.config.num_hidden_layers
    assert num_caches == {0: layers, 2: 3 * layers}
    # Keys and values of 32 tokens in two heads of 32 float32 numbers.
    assert of_a_block == {0: layers * 2 * 32 * 2 * 32 * 4, 2: 3 * layers * 2 * 32 * 2 * 32 * 4}
    assert in_bytes == {steps: num_blocks[steps] * of_a_block[steps] for steps in (0, 2)}
    # Of the same memory: a third of the blocks, rounded down.
    assert num_blocks[2] == num_blocks[0] // 3


def test_bfloat16_is_as_near_to_float32_as_it_is_in_transformers(model):
    expected = own_log_probabilities(model, LONG_PROMPT)
    half = copy.deepcopy(model).bfloat16()
    transformers_error = (own_log_probabilities(half, LONG_PROMPT) - expected).abs().mean()
    with engine(model.folder, dtype="bfloat16", max_model_len=640) as llm:
        output = one_request(llm, LONG_PROMPT, temperature=0, max_tokens=1, prompt_logprobs=0)
    pairs = zip(LONG_PROMPT[1:], output.prompt_logprobs[1:], strict=True)
    error = (torch.tensor([at[token].logprob for token, at in pairs]) - expected).abs().mean()
    assert error < 1.5 * transformers_error
