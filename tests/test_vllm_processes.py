"""The plug-in in vLLM's other processes: an engine of its own process, tensor parallelism, refusals at start-up."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE


pytest.importorskip("vllm", reason="vLLM is not installed here; `make vllm` makes an environment that has it")

import serving.engines  # noqa: F401 - sets what vLLM reads when it is imported
from serving.models import generated, make_checkpoint, ragged_prompts
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer


TOLERANCE = 1e-4
TESTS = Path(__file__).parent
# Prints what an engine continues the prompts with. Guarded, since vLLM starts processes that import it anew.
PROGRAM = """
import json
import sys

from serving.engines import continued, engine

if __name__ == "__main__":
    prompts, options = json.load(sys.stdin)
    with engine("checkpoint", **options) as llm:
        found = json.dumps(continued(llm, prompts, 32))
        metrics = {} if options.get("disable_log_stats", True) else {each.name: each for each in llm.get_metrics()}
    print()
    print("found", found)
    if metrics:
        print("accepted", metrics["vllm:spec_decode_num_accepted_tokens"].value)
    sys.stdout.flush()
"""


def run(place, prompts, options, **variables):
    """Run PROGRAM for place/checkpoint. Returns (exit code, what it printed)."""
    program = place / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        cwd=place,
        input=json.dumps([prompts, options]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return result.returncode, result.stdout


def check_found(printed, expected):
    tokens, log_probabilities = json.loads(printed.partition("\nfound ")[2].partition("\n")[0])
    assert tokens == expected[0]
    assert (torch.tensor(log_probabilities) - expected[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        pytest.param("llama", {}, id="whole", marks=pytest.mark.slow),
        # More than either process has: 131 tokens are cut into 96 and 35.
        pytest.param("gpt_neox", {"pondering_top_k": 100, "pondering_temperature": 0.7}, id="top-k"),
        pytest.param("gemma2", {"pondering_gate": "zero_init"}, id="scaled-rows", marks=pytest.mark.slow),
        pytest.param(
            "llama",
            {"pondering_top_k": 20, "pondering_gate": "zero_init_matrix"},
            id="small-top-k-and-a-matrix",
            marks=pytest.mark.slow,
        ),
        # Each process has a part of every expert, and the router of all.
        pytest.param("mixtral", {}, id="experts", marks=pytest.mark.slow),
        # The head's bias forbids all that the second process has.
        pytest.param("phi", {"forbidden_from": 96}, id="forbidden-part", marks=pytest.mark.slow),
        # All of the vocabulary is in the first process, and padding in the second.
        pytest.param("llama", {"vocab_size": 30}, id="tiny-vocabulary", marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_tensor_parallelism(tmp_path, model_type, fields):
    fields = dict(fields)
    changes = {"num_key_value_heads": 2} if model_type == "gemma2" else {}
    if "vocab_size" in fields:
        changes["vocab_size"] = fields.pop("vocab_size")
    forbidden_from = fields.pop("forbidden_from", None)
    model = make_checkpoint(tmp_path / "checkpoint", model_type, changes, **fields)
    if forbidden_from is not None:
        with torch.no_grad():
            model.get_output_embeddings().bias[forbidden_from:] = -torch.inf
        model.save_pretrained(tmp_path / "checkpoint")
    prompts = ragged_prompts(8)
    if "vocab_size" in changes:
        prompts = [[token % changes["vocab_size"] for token in prompt] for prompt in prompts]
    expected = generated(model, prompts, 32)
    code, printed = run(tmp_path, prompts, {"tensor_parallel_size": 2})
    assert code == 0, printed
    check_found(printed, expected)


def test_guesses_by_n_grams_change_nothing(tmp_path):
    """In a process of its own: vLLM imports numba for it, and then starts no other engine in the same process."""
    model = make_checkpoint(tmp_path / "checkpoint")
    prompts = ragged_prompts(8)
    guesses = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    code, printed = run(tmp_path, prompts, {"speculative_config": guesses, "disable_log_stats": False})
    assert code == 0, printed
    check_found(printed, generated(model, prompts, 32))
    assert int(printed.partition("\naccepted ")[2].partition("\n")[0]) > 0


@pytest.mark.slow
def test_an_engine_in_a_process_of_its_own_compiled_and_once_more_from_the_cache(tmp_path):
    model = make_checkpoint(tmp_path / "checkpoint", "gpt2")
    prompts = ragged_prompts(8)
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    expected = generated(model, prompts, 32)
    for _ in range(2):
        code, printed = run(tmp_path, prompts, {"enforce_eager": False}, **variables)
        assert code == 0, printed
        check_found(printed, expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    make_checkpoint(folder)
    return str(folder)


def engine_configuration(checkpoint, **options):
    """vLLM's configuration of an engine, as the process that asks for one makes it."""
    options = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True, **options}
    return EngineArgs(model=str(checkpoint), **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "do not go with pipeline parallelism"),
        ({"enable_lora": True}, "pondering models in vLLM do not go with LoRA: start the engine without it"),
        ({"runner": "pooling"}, "do not go with the pooling runner"),
        ({"hf_overrides": {"pondering_steps": -1}}, "`pondering_steps` must be an integer >= 0"),
        ({"hf_overrides": {"pondering_top_k": 500}}, "`pondering_top_k` is 500, but the vocabulary has 131 entries"),
        ({"hf_overrides": {"pondering_format_version": 2}}, "`pondering_format_version` is 2"),
        ({"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}}, "by 'draft_model'"),
    ],
)
def test_what_does_not_go_with_pondering_ends_before_an_engine_starts(checkpoint, options, message):
    if "speculative_config" in options:
        options = {"speculative_config": {**options["speculative_config"], "model": checkpoint}}
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(message)):
        engine_configuration(checkpoint, **options)


def test_what_is_compiled_for_one_way_to_ponder_is_not_found_for_another(checkpoint):
    changes = [{}, {"pondering_steps": 1}, {"pondering_top_k": 20}, {"pondering_temperature": 0.5}]
    found = {engine_configuration(checkpoint, hf_overrides=change).compute_hash() for change in changes}
    assert len(found) == len(changes)


WITHOUT_THE_PLUG_IN = """
from vllm.engine.arg_utils import EngineArgs

if __name__ == "__main__":
    options = {"model": "checkpoint", "trust_remote_code": True, "dtype": "float32", "skip_tokenizer_init": True}
    EngineArgs(**options).create_engine_config()
"""


def test_without_the_plug_in_its_name_is_in_the_error(checkpoint):
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    command = [sys.executable, "-c", WITHOUT_THE_PLUG_IN]
    place = Path(checkpoint).parent
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode != 0
    assert 'install the plug-in, pip install "ponder-hf[vllm]"' in result.stderr.splitlines()[-2]


def test_a_backbone_whose_layers_keep_no_keys_and_values_is_refused():
    """By classes alone: no such model can be made in transformers either."""
    from ponder_hf.modeling import PonderingError
    from ponder_hf.vllm.attention import CurrentPass, give_caches_to_passes

    with pytest.raises(PonderingError, match="Linear of this vLLM has no attention layers"):
        give_caches_to_passes(torch.nn.Linear(2, 2), 2, CurrentPass(), {})
    hybrid = torch.nn.ModuleList([MambaMixer.__new__(MambaMixer)])
    torch.nn.Module.__init__(hybrid[0])
    with pytest.raises(
        PonderingError, match="ModuleList of this vLLM has layers of class MambaMixer, of which caches"
    ):
        give_caches_to_passes(hybrid, 2, CurrentPass(), {})


def test_a_checkpoint_with_state_space_layers_ends_before_an_engine_starts(checkpoint, tmp_path):
    """Attention beside it; written by hand, since transformers makes none."""
    config = json.loads(Path(checkpoint, "config.json").read_text())
    backbone = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2}
    for model_type in ("jamba", "falcon_h1"):
        changed = {**config, "base_config": {"model_type": model_type, **backbone}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=f"a backbone of model_type '{model_type}' cannot ponder: it keeps a recurrent"
        ):
            engine_configuration(tmp_path)
