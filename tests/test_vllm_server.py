"""`vllm serve` with a pondering model, asked by OpenAI's client; and lm-evaluation-harness on vLLM."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from patience import PATIENCE


pytest.importorskip("vllm", reason="vLLM is not installed here; `make vllm` makes an environment that has it")

import openai
import psutil
import serving.engines  # noqa: F401 - sets what vLLM reads when it is imported
from serving.models import add_byte_tokenizer, make_checkpoint
from transformers import AutoTokenizer


PROMPT = "A cat sat"
EXTRA = {"ignore_eos": True, "return_token_ids": True}
# Of fifty requests each; with more than four the memory is only printed, not held against a limit.
ROUNDS = int(os.environ.get("PONDER_SERVER_ROUNDS", "4"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "checkpoint"
    found = make_checkpoint(folder, "llama", {"vocab_size": 259}, pondering_steps=2)
    add_byte_tokenizer(folder)
    found.folder = folder
    return found


@pytest.fixture(scope="module")
def server(model):
    """(client, process) of a server, as its command starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    options += ["--num-gpu-blocks-override", "40"]  # which all are in use soon, as memory counts only then
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model.folder), *options]
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    log = model.folder.parent / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE)
    try:
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text())
        yield client, process
    finally:
        process.terminate()
        process.wait(PATIENCE)


@torch.no_grad()
def expected_tokens(model, prompt, num_new_tokens):
    """Tokens, since what random bytes look like as text depends on how many of them are looked at."""
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    new = model.generate(**ids, max_new_tokens=num_new_tokens, do_sample=False, pad_token_id=0)
    return new[0, ids.input_ids.shape[1] :].tolist()


def name_of(client):
    return client.models.list().data[0].id


def asked(client, **options):
    options = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "extra_body": EXTRA, **options}
    return client.completions.create(model=name_of(client), **options)


def test_a_completion_and_the_same_in_a_stream(server, model):
    client, _ = server
    expected = expected_tokens(model, PROMPT, 24)
    assert asked(client).choices[0].token_ids == expected
    pieces = [event.choices[0].token_ids for event in asked(client, stream=True)]
    assert [token for piece in pieces for token in piece or []] == expected
    assert len(pieces) > 3


def test_a_chat_by_the_template(server, model):
    client, _ = server
    messages = [{"role": "user", "content": "Where is the cat?"}]
    answer = client.chat.completions.create(
        model=name_of(client), messages=messages, max_tokens=16, temperature=0, extra_body=EXTRA
    )
    assert answer.choices[0].token_ids == expected_tokens(model, "user: Where is the cat?\n", 16)


def test_two_hundred_requests_of_which_some_are_cancelled(server, model):
    client, process = server
    prompts = [PROMPT + " x" * length for length in range(8)]
    expected = {prompt: expected_tokens(model, prompt, 24) for prompt in prompts}
    rng = random.Random(0)

    def one(index):
        prompt = prompts[index % len(prompts)]
        if index % 5 == 0:  # left alone after a piece or two
            with asked(client, prompt=prompt, stream=True, max_tokens=200) as stream:
                for _ in range(rng.randint(1, 3)):
                    next(iter(stream), None)
            return True
        if index % 5 == 1:
            return len(asked(client, prompt=prompt, temperature=1.0, seed=index).choices) == 1
        return asked(client, prompt=prompt).choices[0].token_ids == expected[prompt]

    def resident():
        parts = [process, *psutil.Process(process.pid).children(recursive=True)]
        return sum(psutil.Process(part.pid).memory_info().rss for part in parts)

    used = []
    with ThreadPoolExecutor(16) as pool:
        for _ in range(ROUNDS):
            assert all(pool.map(one, range(50)))
            used.append(resident())
            print(f"after {50 * len(used)} requests: {used[-1] / 2**20:.0f} MiB")
    # vLLM keeps something for each number of tokens that it has met, of the plain model, too.
    assert len(used) > 4 or used[3] < used[1] + 96 * 2**20


@pytest.mark.slow
def test_lm_evaluation_harness_gives_the_same_on_vllm_and_on_transformers(model, tmp_path):
    """A task of our own, as the harness's own data sets are on the Hub."""
    texts = ["A cat sat by the sea.", "Two dogs met one cat upon a time.", "There was a sea."]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    task = {
        "task": "cats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "cats.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML, too
    found = {}
    for kind, options in (
        ("hf", "trust_remote_code=True"),
        ("vllm", "enforce_eager=True,max_model_len=256,seed=0"),
    ):
        arguments = f"pretrained={model.folder},dtype=float32,{options}"
        command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", "cats"]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / kind / "results.json")]
        command += ["--batch_size", "1", "--device", "cpu"]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE)
        assert ran.returncode == 0, ran.stdout
        (results,) = (tmp_path / kind).rglob("results*.json")
        found[kind] = json.loads(results.read_text(encoding="utf-8"))["results"]["cats"]["bits_per_byte,none"]
    assert found["vllm"] == pytest.approx(found["hf"], abs=1e-5)
