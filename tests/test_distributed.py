"""Training in two processes, by transformers' Trainer on DDP and FSDP2, is training in one.

One launch of two processes trains all cases (distributed_worker.py); this process trains the same models alone.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import distributed_worker
import prepared
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from patience import PATIENCE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ponder_hf import PonderingForCausalLM
from ponder_hf.training.gate import GATE_LEARNING_RATE_FACTOR


FIELDS = {"pondering_steps": 2, "pondering_gate": "zero_init", "intermediate_loss_weight": 0.3}
TOP_K = {**FIELDS, "pondering_top_k": 9}
SAVE = {"save_strategy": "steps", "save_steps": 2}
FREED = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
KEPT = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": False}}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
GATE_RATE = {"gate_rate": True}  # by PonderingTrainer: the gate has a group of its own
GROWING = {**GATE_RATE, "sampled_steps": "growing"}
DRAWN = {"sampled_steps": [2.0, 1.0, 5.0]}  # S = 2, 0 and 1 in the three steps

# name: (backbone, pondering fields, arguments of Trainer, what else the worker takes). GPT-2 is tied, LLaMA has a
# padding row, GPT-NeoX has other names on disk than in memory.
CASES = {
    "ddp gpt_neox top_k": ("gpt_neox", TOP_K, SAVE, {}),
    "ddp gpt_neox resumed": ("gpt_neox", TOP_K, SAVE, {"resume": "ddp gpt_neox top_k/checkpoint-2"}),
    "ddp gpt2 vocabulary": ("gpt2", FIELDS, {"ddp_find_unused_parameters": False}, {}),
    "ddp gpt2 unused": ("gpt2", FIELDS, {"ddp_find_unused_parameters": True}, {}),
    "ddp llama plain": ("llama", FIELDS, {}, {"plain": True}),
    "ddp gpt2 checkpointing": ("gpt2", FIELDS, CHECKPOINTING, {}),
    "ddp gpt2 reentrant": ("gpt2", FIELDS, REENTRANT, {}),
    "ddp llama gate's rate": ("llama", FIELDS, {}, GATE_RATE),
    "ddp llama growing": ("llama", FIELDS, {}, GROWING),
    "ddp gpt2 drawn": ("gpt2", {"pondering_steps": 2}, {"ddp_find_unused_parameters": False}, DRAWN),
    "fsdp gpt_neox top_k": ("gpt_neox", TOP_K, {**SAVE, **FREED}, {}),
    "fsdp gpt_neox resumed": ("gpt_neox", TOP_K, {**SAVE, **FREED}, {"resume": "fsdp gpt_neox top_k/checkpoint-2"}),
    "fsdp gpt2 vocabulary": ("gpt2", FIELDS, FREED, {}),
    "fsdp gpt2 checkpointing": ("gpt2", FIELDS, {**KEPT, **CHECKPOINTING}, {}),
    "fsdp llama vocabulary": ("llama", FIELDS, KEPT, {}),
    "fsdp llama float32": ("llama", TOP_K, FREED, {"dtype": "float32"}),
    "fsdp llama gate's rate": ("llama", FIELDS, {**SAVE, **FREED}, GATE_RATE),
    "fsdp llama gate's rate resumed": (
        "llama",
        FIELDS,
        {**SAVE, **FREED},
        {**GATE_RATE, "resume": "fsdp llama gate's rate/checkpoint-2"},
    ),
    "fsdp llama growing": ("llama", FIELDS, FREED, GROWING),
}
# What of that changes what is trained.
CHANGES = ("dtype", "gate_rate", "sampled_steps")

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def output_of(command):
    """Run a program that starts processes of one thread each, and give back its standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder in which the two processes have left one folder a case."""
    root = tmp_path_factory.mktemp("distributed")
    cases = []
    for name, (model_type, fields, arguments, more) in CASES.items():
        case = {"folder": str(root / name), "model_type": model_type, "fields": fields, "arguments": arguments, **more}
        if "resume" in more:
            case["resume"] = str(root / more["resume"])
        cases.append(case)
    (root / "cases.json").write_text(json.dumps(cases))
    prepared.run_two([sys.executable, distributed_worker.__file__, root / "cases.json"])
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function from a case's name to what one process sees and the folder of the weights that it ends with."""
    done = {}

    def run(name):
        model_type, fields, _, more = CASES[name]
        key = json.dumps([model_type, fields, {name: more[name] for name in CHANGES if name in more}])
        if key not in done:
            folder = tmp_path_factory.mktemp("alone")
            case = {"folder": str(folder), "model_type": model_type, "fields": fields}
            case |= {name: more[name] for name in CHANGES if name in more}
            done[key] = distributed_worker.run_case(case, 1), folder / "final"
        return done[key]

    return run


def result_of(root, name):
    result = json.loads((root / name / "result.json").read_text())
    assert "error" not in result, result["error"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(root, alone, name):
    result = result_of(root, name)
    expected, folder = alone(name)
    steps = len(result["losses"])
    assert steps == (1 if "resumed" in name else distributed_worker.STEPS)
    precise = "float32" not in name
    gate_rate = [1e-2 * GATE_LEARNING_RATE_FACTOR] if CASES[name][3].get("gate_rate") else []
    # Trainer adds up its losses in float32; its gradient norms are in the model's own dtype.
    assert result["losses"] == pytest.approx(expected["losses"][-steps:], abs=2e-6 if precise else 1e-5)
    assert result["norms"] == pytest.approx(expected["norms"][-steps:], rel=1e-10 if precise else 1e-5)
    assert result["rates"] == expected["rates"] == [1e-2, 1e-2, *gate_rate]
    weights, one = load_file(root / name / "final" / "model.safetensors"), load_file(folder / "model.safetensors")
    if name.startswith("fsdp gpt2"):  # gathered one by one, tied weights no longer share memory
        assert torch.equal(weights.pop("backbone.lm_head.weight"), weights["backbone.transformer.wte.weight"])
    assert weights.keys() == one.keys()
    # AdamW divides by the size of a gradient: of a gradient near zero nothing but rounding is left.
    tolerance = 1e-8 if precise else 1e-3
    assert max((weights[key] - one[key]).abs().max() for key in one) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_engine_and_the_kernel_are_the_expected_ones(root, name):
    """Guards the cases above: accelerate trains with DDP, without a word, where it knows no FSDP."""
    result = result_of(root, name)
    if name.startswith("fsdp"):
        assert result["wrapped"] == "FSDPPonderingForCausalLM"
        assert result["kernels"] == ["plain"]
    else:
        assert result["wrapped"] == "DistributedDataParallel"
        expected = "plain" if "plain" in name else "top_k" if "gpt_neox" in name else "vocabulary"
        assert result["kernels"] == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp gpt_neox top_k", "fsdp gpt_neox top_k"])
def test_every_checkpoint_is_one_that_loads_by_itself(root, name):
    """Also the one in the middle. tests/test_loads_anywhere.py shows that these files and this auto_map are enough."""
    modeling = Path(distributed_worker.__file__).parents[1] / "modeling"
    files = {path.name: path.read_bytes() for path in modeling.glob("*.py") if path.name != "__init__.py"}
    for folder in ("final", "checkpoint-2"):
        checkpoint = root / name / folder
        auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForCausalLM"] == "modeling_pondering.PonderingForCausalLM"
        assert {path.name: path.read_bytes() for path in checkpoint.glob("*.py")} == files
        assert len(list(checkpoint.glob("*.safetensors"))) == 1
    model, report = AutoModelForCausalLM.from_pretrained(root / name / "final", output_loading_info=True)
    assert type(model) is PonderingForCausalLM
    assert not any(report.values()), report


CONFIGURATIONS = Path(__file__).resolve().parents[1] / "examples" / "configs"
ZERO3 = CONFIGURATIONS / "zero3.json"


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration_files(path):
    config = load_config_from_file(str(path))
    line = ["--config_file", str(path), "--machine_rank", "0", "--main_process_ip", "127.0.0.1", "--no_python", "x"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert arguments.num_processes == config.num_processes > 1
    environment = prepare_multi_gpu_env(arguments)
    if config.distributed_type == DistributedType.FSDP:
        expected = {"VERSION": "2", "STATE_DICT_TYPE": "FULL_STATE_DICT", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        assert {name: environment[f"FSDP_{name}"] for name in expected} == expected
    if config.distributed_type == DistributedType.DEEPSPEED:
        assert CONFIGURATIONS.parents[1] / config.deepspeed_config["deepspeed_config_file"] == ZERO3


def test_accelerate_reads_the_deepspeed_file():
    config = HfDeepSpeedConfig(str(ZERO3))
    assert config.is_zero3()
    assert not config.is_offload()
    assert config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True
    assert config.get_value("gradient_clipping") == "auto"


@pytest.mark.slow
def test_ponder_hf_train_in_two_processes(tmp_path):
    """One of them speaks and looks after the folder, the model is that of one process, and the run is resumed."""
    base = checkpoints.save_base(tmp_path / "base", tokenizer=True)
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"once upon a time there was one {animal}" for animal in ("cat", "sea", "two dogs") * 90)
    )
    line = ["train", base, "--data", text, "--pondering-steps", "2", "--block-size", "16", "--use-cpu", "--json"]
    line += ["--max-steps", "4", "--save-steps", "2", "--learning-rate", "1e-3", "--held-out", "8"]
    launched = [*TWO_PROCESSES, "--no-python", str(Path(sys.executable).with_name("ponder-hf"))]
    assert checkpoints.run(*line, "--output", tmp_path / "one", "--per-device-train-batch-size", "4") == 0
    line = [str(part) for part in [*line, "--output", tmp_path / "two", "--per-device-train-batch-size", "2"]]
    (answer,) = output_of([*launched, *line]).splitlines()
    assert json.loads(answer)["steps"] == 4
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-3  # float32, and AdamW as above
    cards = [(tmp_path / name / "README.md").read_text() for name in ("one", "two")]
    assert all("| rows in a step | 4 |" in card for card in cards), "of both processes together"
    assert len(cards[1].splitlines()) == len(cards[0].splitlines()), "the card is written once"
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    (tmp_path / "two" / "model.safetensors").unlink()
    resume = ["train", "--output", str(tmp_path / "two"), "--resume", "--json"]
    (answer,) = output_of([*launched, *resume]).splitlines()
    assert json.loads(answer)["resumed_from"].endswith("checkpoint-2")
    resumed = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(resumed[key], two[key]) for key in two)
