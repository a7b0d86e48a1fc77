"""What the benchmarks of memory share: a table of ways to compute something, with the peak of each beyond the model.

Each way runs in a process of its own, as a peak is never given back.
"""

import argparse
import resource
import subprocess
import sys
import threading
import time

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import described
from ponder_hf import PonderingForCausalLM


def measured(run, arguments):
    """The peak of this process beyond the model, in MB, and the seconds it took.

    run: called with a pondering LLaMA and token ids (1, T), both where it is to compute.
    """
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        max_position_embeddings=arguments.tokens,
        tie_word_embeddings=True,
    )
    model = PonderingForCausalLM.from_base(LlamaForCausalLM(config), pondering_steps=arguments.pondering_steps).eval()
    ids = torch.randint(0, arguments.vocab_size, (1, arguments.tokens))
    model(ids[:, :8])  # checks itself once
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        model, ids = model.to("cuda"), ids.to("cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        watch = Watch()
        before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with torch.no_grad():
        run(model, ids)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else watch.stop()
    return (peak - before) / 1e6, seconds


class Watch:
    """The largest resident size from now on, sampled: the system's own peak includes that of loading the model."""

    def __init__(self):
        self.peak, self.is_running = 0, True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        process = psutil.Process()
        while self.is_running:
            self.peak = max(self.peak, process.memory_info().rss)
            time.sleep(0.002)

    def stop(self):
        self.is_running = False
        self.thread.join()
        overall = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return min(max(self.peak, psutil.Process().memory_info().rss), overall)


def print_peaks(benchmark, summary, ways, argv, tokens, vocab_size):
    """The command line of a benchmark of memory: print one row for each way. Returns the exit code.

    Args:
        benchmark: its name, by which `python -m benchmarks` starts each way again in a process of its own.
        summary: its first line of help.
        ways: name to function, as `measured` takes it. "forward" is there for comparison: `--most` is not about it.
        tokens, vocab_size: defaults.
    """
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--vocab-size", type=int, default=vocab_size)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pondering-steps", type=int, default=3)
    parser.add_argument("--way", help="one of them alone, within this process")
    parser.add_argument("--most", type=float, help="end with an error where a way takes more than so many MB")
    arguments = parser.parse_args(argv)
    if arguments.way:
        print(*measured(ways[arguments.way], arguments))
        return 0
    print(described())
    print(f"\n{arguments.tokens} tokens, V = {arguments.vocab_size}, S = {arguments.pondering_steps}\n")
    print("| way | peak beyond the model, MB | seconds |\n| --- | --- | --- |")
    code, words = 0, list(argv or [])
    for way in ways:
        command = [sys.executable, "-m", "benchmarks", benchmark, *words, "--way", way]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, seconds = map(float, output.split()[-2:])
        print(f"| {way} | {peak:.0f} | {seconds:.1f} |", flush=True)
        if arguments.most is not None and way != "forward" and peak > arguments.most:
            code = 1
    return code
