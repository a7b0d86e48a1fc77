"""How much memory does a conversion take, measured against the size of the checkpoint?

Makes a checkpoint of random weights (1 GB by default) in a temporary folder, one shard at a time, then converts it and
exports the result, each in a process of its own, and prints the peak of each process over one that only imports the
same modules. For comparison, transformers alone loads and saves the same checkpoint. A Markdown table, one row each.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


GIGABYTE = 10**9
LIMIT = 1.5  # times the checkpoint, above the interpreter with its imports

IMPORTS = "import ponder_hf.conversion as conversion, transformers; transformers.{class_name}"
TASKS = {
    "imports only": "",
    "transformers loads and saves": "transformers.AutoModelForCausalLM.from_pretrained({source!r}, dtype='auto')"
    ".save_pretrained({plain!r})",
    "convert": "conversion.convert({source!r}, {destination!r})",
    "export": "conversion.export({destination!r}, {back!r})",
}


def make_checkpoint(folder, model_type, num_bytes, dtype, num_shards):
    """Write a checkpoint of about `num_bytes` with random weights, shard by shard. Returns its exact size in bytes."""
    config_class = CONFIG_MAPPING[model_type]
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "vocab_size": 32000}
    with torch.device("meta"):
        sizes = [
            AutoModelForCausalLM.from_config(config_class(**shape, num_hidden_layers=count)).num_parameters()
            for count in (1, 2)
        ]
        wanted = num_bytes / dtype.itemsize
        layers = max(1, round((wanted - 2 * sizes[0] + sizes[1]) / (sizes[1] - sizes[0])))
        config = config_class(**shape, num_hidden_layers=layers, tie_word_embeddings=False, dtype=dtype)
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    parameters = dict(model.named_parameters())
    names = sorted(parameters)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        tensors = {name: torch.empty(parameters[name].shape, dtype=dtype) for name in names[shard::num_shards]}
        for tensor in tensors.values():
            tensor.normal_(std=0.02)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    total = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, type(model).__name__


def peak_memory():
    """The peak resident memory of this process in bytes: anonymous pages and pages of mapped files alike."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except OSError:  # not Linux. There the figure of getrusage may still include the parent's, before exec
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(statement):
    """Run a Python statement in a fresh process. Returns its peak memory in bytes and its seconds."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        f"from benchmarks.conversion_memory import peak_memory\n{statement}\nprint(peak_memory())"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    return int(result.stdout.split()[-1]), time.perf_counter() - start


def main(argv=None):
    """Print the table; exit code 1 if a conversion or an export took more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the made-up checkpoint")
    parser.add_argument("--model-type", default="gpt_neox", help="gpt_neox, llama or another with the same fields")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--shards", type=int, default=2, help="number of files of weights in the source")
    parser.add_argument("--folder", help="where to make the temporary folder")
    arguments = parser.parse_args(argv)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, "
    versions += f"safetensors {safetensors.__version__}, Python {platform.python_version()}"
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    print(
        "| what | checkpoint | peak GB | above imports, times the checkpoint | seconds | machine | versions | date |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folders = {name: str(Path(folder, name)) for name in ("source", "plain", "destination", "back")}
        size, class_name = make_checkpoint(
            Path(folders["source"]),
            arguments.model_type,
            arguments.gigabytes * GIGABYTE,
            getattr(torch, arguments.dtype),
            arguments.shards,
        )
        what = f"{arguments.model_type}, {arguments.dtype}, {size / GIGABYTE:.2f} GB in {arguments.shards} files"
        baseline = None
        for task, statement in TASKS.items():
            peak, seconds = run(IMPORTS.format(class_name=class_name) + "\n" + statement.format(**folders))
            baseline = peak if baseline is None else baseline
            ratio = (peak - baseline) / size
            if task in ("convert", "export"):
                worst = max(worst, ratio)
            print(
                f"| {task} | {what} | {peak / GIGABYTE:.2f} | {ratio:.2f} | {seconds:.0f} | {machine} | {versions} "
                f"| {date.today()} |",
                flush=True,
            )
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
