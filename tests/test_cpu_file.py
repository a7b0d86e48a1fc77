"""pondering_vocabulary_cpu.py can be deleted: everything is computed the same without it, only slower."""

import json
import os
import shutil
import sys
from pathlib import Path

import elsewhere
import prepared
import pytest
import tiny
import torch
from safetensors.torch import load_file

from ponder_hf import PonderingForCausalLM
from ponder_hf.modeling import pondering_vocabulary_cpu
from ponder_hf.modeling.pondering_vocabulary import replaceable


REPOSITORY = Path(__file__).resolve().parents[1]
CPU_FILE = "pondering_vocabulary_cpu"
# Arguments: a checkpoint, where to write what was computed, and whose code computes: "library" or "checkpoint".
COMPUTE = """
import json
import sys

import torch
from safetensors.torch import save_file


def noted(name, result):
    if result is not None:
        used.add(name)
    return result


checkpoint, result, code = sys.argv[1:]
if code == "library":
    import ponder_hf
from transformers import AutoModelForCausalLM

found, used = {}, set()
for top_k in (None, 5):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, pondering_top_k=top_k, trust_remote_code=code == "checkpoint", attn_implementation="eager"
    )
    home = type(model).__module__.removesuffix("modeling_pondering")
    sys.modules[home + "pondering_vocabulary"].CHUNK_ELEMENTS["cpu"] = 40 * 600  # so that the K largest come in tiles
    for name, function in vars(sys.modules.get(home + CPU_FILE, type)).items():
        if type(function).__name__ == "replaceable" and top_k is None:
            faster = function.faster
            function.faster = lambda *a, name=name, faster=faster: noted(name, faster(*a))
    texts = torch.arange(3, 83).view(2, 40)
    model.train()
    output = model(texts, labels=texts)
    output.loss.backward()
    found |= {f"{top_k} {name}": parameter.grad for name, parameter in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        found[f"{top_k} logits"] = model(texts).logits
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for rows in (1, 2):
        prompt = {"input_ids": texts[:rows, :5], "attention_mask": torch.ones(rows, 5)}
        for settings in ({}, {"pondering_exit_threshold": 0.01}, {"num_draft_tokens": 2}):
            criterion = "kl" if "pondering_exit_threshold" in settings else None
            found[f"{top_k} {settings} {rows}"] = model.generate(
                **prompt, **common, **settings, pondering_exit_criterion=criterion
            )
save_file({name: tensor.contiguous() for name, tensor in found.items()}, result)
print(json.dumps(sorted(used)))
""".replace("CPU_FILE", repr(CPU_FILE))


def delete_cpu_file(folder):
    """Delete it, and the one line that imports it, from a folder of modeling files."""
    (folder / f"{CPU_FILE}.py").unlink()
    main = folder / "modeling_pondering.py"
    lines = main.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"from .{CPU_FILE} import")]
    assert len(kept) == len(lines) - 1
    main.write_text("".join(kept), encoding="utf-8")
    assert not any(f"from .{CPU_FILE}" in path.read_text(encoding="utf-8") for path in folder.glob("*.py"))


def run_library(folder, *arguments):
    """What COMPUTE prints where ponder_hf is a copy in `folder`."""
    variables = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", COMPUTE, *map(str, arguments), "library"]
    result = prepared.run(command, cwd=folder, env=variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Wide enough for the layers of few rows, with a vocabulary that is looked at in tiles."""
    folder = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    sizes = {"vocab_size": 900, "hidden_size": 1024, "num_hidden_layers": 1, "intermediate_size": 128}
    PonderingForCausalLM.from_base(tiny.base_model("gpt_neox", scale=2.0, **sizes), pondering_steps=2).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    """What the library as it is computes."""
    folder = tmp_path_factory.mktemp("expected")
    used = json.loads(run_library(folder, checkpoint, folder / "expected.safetensors"))
    functions = {name for name, value in vars(pondering_vocabulary_cpu).items() if isinstance(value, replaceable)}
    assert set(used) == functions, "a faster function was never taken, so leaving it out shows nothing"
    return load_file(folder / "expected.safetensors")


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * tensor.abs().max().item(), msg=name)
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_a_library_without_it_computes_the_same(checkpoint, expected, tmp_path):
    package = shutil.copytree(REPOSITORY / "ponder_hf", tmp_path / "ponder_hf")
    for name in ("modeling", "conversion"):
        shutil.copytree(REPOSITORY / name, package / name)
    delete_cpu_file(package / "modeling")
    assert run_library(tmp_path, checkpoint, tmp_path / "found.safetensors") == "[]\n"
    check_same(load_file(tmp_path / "found.safetensors"), expected)


@pytest.mark.slow
def test_a_checkpoints_code_without_it_computes_the_same(checkpoint, expected, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    delete_cpu_file(folder)
    printed = elsewhere.run(COMPUTE, tmp_path / "home", folder, tmp_path / "found.safetensors", "checkpoint")
    assert printed == "[]\n"
    check_same(load_file(tmp_path / "found.safetensors"), expected)
