"""Everything that generate does: the table of docs/generation.md is what runs. Static caches compile once."""

import contextlib
import functools
import os
import signal
import socket
import sys
import time
from pathlib import Path

import checkpoints
import prepared
import pytest
import strategies
import tiny
import torch
from patience import PATIENCE
from transformers import CompileConfig, StaticCache, pipeline

from ponder_hf import PonderingForCausalLM, conversion


REPOSITORY = Path(__file__).resolve().parents[1]


def documented():
    """The rows of the table in docs/generation.md by their first cell."""
    text = (REPOSITORY / "docs" / "generation.md").read_text(encoding="utf-8")
    rows = text.split("<!-- strategies -->")[1].split("<!-- end -->")[0].strip().splitlines()[2:]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def test_the_table_has_every_strategy():
    assert list(documented()) == list(strategies.STRATEGIES)


@pytest.mark.deprecated_by_transformers("its assisted decoding calls generate in a way that it deprecates")
@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_a_row_of_the_table(name):
    how, _ = strategies.STRATEGIES[name]
    outcome = outcome_elsewhere(name) if name in strategies.NEEDS else strategies.outcome(name)
    assert documented()[name] == f"| {name} | {how} | {outcome} |"


# What quanto has in C++, which takes a minute of every fresh environment to compile: 8 / bits numbers from each byte.
WITHOUT_COMPILING = """
import types
import torch
from optimum.quanto.library.extensions.cpp import ext
def unpack(packed, bits):
    return torch.cat([packed >> bits * place & 2**bits - 1 for place in range(8 // bits)])
type(ext).lib = types.SimpleNamespace(unpack=unpack)
"""


def outcome_elsewhere(name):
    """The same in a process that has the packages that lie beside the environment."""
    place = Path(sys.prefix, "overlays", "caches")
    if not place.is_dir():
        pytest.skip("packages for quantised caches are not there: `make setup` puts them beside the environment")
    code = "import sys, strategies; print(strategies.outcome(sys.argv[1]))"
    if "quanto" in name:
        code = f"{WITHOUT_COMPILING}\n{code}"
    paths = {"PYTHONPATH": f"{place}{os.pathsep}{REPOSITORY / 'tests'}"}
    command = [sys.executable, "-c", code, name]
    done = prepared.run(command, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


COMPILED = {
    "vocabulary": ("llama", {}),
    "top 5": ("llama", {"pondering_top_k": 5}),
    "gate": ("gpt2", {"pondering_gate": "zero_init"}),
    "half rotated": ("gpt_neox", {"pondering_top_k": 5}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "fields"), COMPILED.values(), ids=COMPILED)
def test_a_static_cache_compiles_one_graph_once(model_type, fields):
    model = tiny.pondering_model(model_type, pondering_steps=2, **fields)
    if model.pondering_gate is not None:
        torch.nn.init.normal_(model.pondering_gate.weight)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [tiny.token_ids(1, length) for length in (6, 5)]
    expected = [model.generate(prompt, **settings).tolist() for prompt in prompts]
    compile_config = CompileConfig(backend="aot_eager", mode=None, dynamic=False, fullgraph=True)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompt, tokens in zip(prompts, expected, strict=True):
        found = model.generate(prompt, cache_implementation="static", compile_config=compile_config, **settings)
        assert found.tolist() == tokens
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_window_that_slides_is_compiled_as_often_as_in_the_plain_model():
    """transformers counts the tokens of a sliding static slot in a Python number, which is compiled in at first."""
    model = tiny.pondering_model("mistral", pondering_steps=2)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt, numbers = tiny.token_ids(1, 6), []
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    for which in (model, model.to_base()):
        expected = which.generate(prompt, **settings).tolist()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found = which.generate(prompt, cache_implementation="static", compile_config=compile_config, **settings)
        assert found.tolist() == expected
        numbers.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_a_static_cache_has_slots_for_every_pass_of_the_kind_of_each_layer(model_type):
    model = tiny.pondering_model(model_type, pondering_steps=2)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=32)
    kinds = [type(layer) for layer in cache.layers]
    with torch.no_grad():
        model(tiny.token_ids(1, 12), past_key_values=cache, use_cache=True)
    assert [type(layer) for layer in cache.layers] == kinds * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pondering checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    # Every token is a word, so that whatever is generated can be read.
    checkpoints.save_base(folder / "base", tokenizer=True, vocab_size=len(checkpoints.WORDS))
    conversion.convert(folder / "base", folder / "pondering")
    return folder / "pondering"


def test_pipeline(checkpoint):
    generator = pipeline("text-generation", model=str(checkpoint), tokenizer=str(checkpoint))
    settings = {"max_new_tokens": 5, "do_sample": False, "pondering_steps": 2, "return_full_text": False}
    texts = generator(["once upon", "the sea"], **settings)
    chat = generator([{"role": "user", "content": "once upon a time"}], max_new_tokens=3, do_sample=False)
    model = PonderingForCausalLM.from_pretrained(checkpoint)
    tokenizer = generator.tokenizer
    for prompt, [found] in zip(["once upon", "the sea"], texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pondering_steps=2)[0, ids.shape[1] :]
        assert found["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


@contextlib.contextmanager
def served(log, *options):
    """The URL of examples/serve.py, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, REPOSITORY / "examples" / "serve.py", "--port", str(port), "--device", "cpu", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = prepared.Process(command, output, output, env=environment)
    try:
        deadline = time.monotonic() + PATIENCE
        while "Uvicorn running" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


# By itself it takes most of the machine's memory, and fills it first.
BATCHING = ("--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), BATCHING], ids=["plain", "continuous batching"])
def test_serve_answers_the_openai_client(checkpoint, tmp_path, options):
    openai = pytest.importorskip("openai", reason="needs ponder-hf[serve]")
    pytest.importorskip("fastapi", reason="needs ponder-hf[serve]")
    messages = [{"role": "user", "content": "once upon a time"}]
    with served(tmp_path / "log", *options) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask = functools.partial(
            client.chat.completions.create, model=str(checkpoint), messages=messages, max_tokens=4, temperature=0
        )
        answer = ask()
        pieces = ask(stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    generator = pipeline("text-generation", model=str(checkpoint), tokenizer=str(checkpoint))
    expected = generator(messages, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]["content"].strip()
    assert expected
    assert answer.usage.completion_tokens <= 4
    assert answer.choices[0].message.content.strip() == streamed.strip() == expected
