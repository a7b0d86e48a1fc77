"""The machine and the versions that a row of figures was measured with, and the parts that only make a CPU faster."""

import datetime
import os
import platform
from contextlib import contextmanager

import torch
import transformers

from ponder_hf.modeling import pondering_backbone as backbone
from ponder_hf.modeling import pondering_vocabulary as vocabulary
from ponder_hf.modeling import pondering_vocabulary_embedding as embedding


# What pondering_vocabulary_cpu.py does, by the functions in whose place it puts others.
CPU_PARTS = {
    "flash kernel": (embedding.vocabulary_sum, embedding.vocabulary_gradients, embedding.makes_use_of_logits),
    "head of few rows": (vocabulary.product_with_head, backbone.head_context),
    "sum of few rows": (embedding.weighted_sum,),
    "layers of few rows": (backbone.decoder_context,),
    "largest by tiles": (embedding.largest_of_head,),
}
CPU_PARTS["all"] = tuple(function for functions in CPU_PARTS.values() for function in functions)


@contextmanager
def without(functions):
    """Within it these functions of CPU_PARTS are computed as they stand."""
    faster = [function.faster for function in functions]
    for function in functions:
        function.faster = None
    try:
        yield
    finally:
        for function, before in zip(functions, faster, strict=True):
            function.faster = before


def described():
    """One line: date, processor, threads, device, versions."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: what platform says is all there is
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{datetime.date.today()}, {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
