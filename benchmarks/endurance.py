"""Long runs: whether memory stays flat, and whether handles, threads or repeated warnings are left.

    python -m benchmarks endurance calls --calls 10000
    python -m benchmarks endurance training --steps 2000
    python -m benchmarks endurance serving --minutes 60

`calls` are of `generate`, of eleven kinds; `training` is by Trainer, with checkpoints; `serving` asks
examples/serve.py, by eight clients at once of which some hang up, and compares what it answers. The model is tiny and
random. Memory counts from the first tenth on. Exits with 1 where something grows, is left behind, is warned of twice
or is answered wrongly.
"""

import argparse
import contextlib
import gc
import http.client
import json
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.generation.streamers import BaseStreamer

from benchmarks.machine import described
from ponder_hf import PonderingForCausalLM
from ponder_hf.modeling.pondering_cache import CACHE_NAME
from ponder_hf.training import PonderingTrainer


SERVER = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
VOCAB_SIZE, CLIENTS = 256, 8
MAX_GROWTH = 24.0  # MiB beyond the first tenth: what allocators keep moves by about ten
PROMPTS = 5
GREEDY = {"max_new_tokens": 6, "do_sample": False}
PAGES = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)  # without it, as much memory as there is
# Settings of single requests, as clients send them in `generation_config`.
REQUESTS = (
    {},
    {"pondering_steps": 0},
    {"pondering_steps": 3},
    {"num_draft_tokens": 2},
    {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.1},
    {"num_beams": 2, "pondering_steps": 1},
)


def make_model():
    """A tiny random model that ponders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in base.parameters():
            if weight.ndim > 1:  # so that predictions are not nearly uniform
                weight.mul_(4)
    return PonderingForCausalLM.from_base(base, pondering_steps=2)


class Watch:
    """Memory, handles and threads of a process, and what it warns of where it is this one."""

    def __init__(self, process=None):
        self.process = psutil.Process() if process is None else process
        self.rows, self.warned = [], Counter()

    def look(self):
        """Note where the process stands."""
        gc.collect()
        with self.process.oneshot():
            memory = self.process.memory_info().rss / 2**20
            self.rows.append((memory, self.process.num_fds(), self.process.num_threads()))

    @contextlib.contextmanager
    def hearing_warnings(self):
        """Within it warnings are counted, logged ones and Python's."""
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.warned.update([f"{record.name}: {record.getMessage()}"])
        loggers = [logging.getLogger(name) for name in ("transformers", "ponder_hf", "torch", "py.warnings")]
        for logger in loggers:
            logger.addHandler(handler)
        logging.captureWarnings(True)
        warnings.simplefilter("default")
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for logger in loggers:
                logger.removeHandler(handler)

    def problems(self):
        """Print the figures; what is wrong, as a list of lines."""
        warm, last = self.rows[max(1, len(self.rows) // 10)], self.rows[-1]
        most = max(row[0] for row in self.rows[len(self.rows) // 10 :])
        print(f"resident memory: {warm[0]:.1f} MiB after a tenth, {last[0]:.1f} at the end, {most:.1f} at most")
        print(f"handles: {warm[1]} and {last[1]}; threads: {warm[2]} and {last[2]}")
        found = []
        if last[0] - warm[0] > MAX_GROWTH:
            found.append(f"memory has grown by {last[0] - warm[0]:.1f} MiB")
        for name, index in (("handles", 1), ("threads", 2)):
            if last[index] > warm[index]:
                found.append(f"{last[index] - warm[index]} {name} more than after a tenth")
        repeated = [f"{count} times: {message[:300]}" for message, count in self.warned.items() if count > 1]
        print(f"warnings: {len(self.warned)} different ones, {len(repeated)} of them repeated")
        return found + repeated


class Count(BaseStreamer):
    """Counts what is streamed."""

    def __init__(self):
        self.tokens = 0

    def put(self, value):
        self.tokens += value.numel()

    def end(self):
        pass


def batched(model, prompt):
    """Continuous batching, which starts and ends a thread."""
    rows = prompt.tolist()
    settings = GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0)
    answers = model.generate_batch(rows, settings, continuous_batching_config=PAGES, progress_bar=False)
    assert len(answers) == len(rows)


def streamed(model, prompt):
    """One row to a streamer, with drafts."""
    streamer = Count()
    tokens = model.generate(prompt[:1], streamer=streamer, num_draft_tokens=2, **GREEDY)
    assert streamer.tokens == tokens.numel()


def going_on(model, prompt):
    """A second turn with the cache of the first."""
    first = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    model.generate(torch.cat([first.sequences, prompt], dim=1), **{CACHE_NAME: first[CACHE_NAME]}, **GREEDY)


def generating(**options):
    """A call of `generate` with these options."""
    return lambda model, prompt: model.generate(prompt, **{**GREEDY, **options})


CALLS = {
    "greedy": generating(),
    "another S": generating(pondering_steps=3),
    "sampled": generating(do_sample=True, top_p=0.9),
    "beams": generating(num_beams=3),
    "drafts": generating(num_draft_tokens=2),
    "sampled with drafts": generating(do_sample=True, num_draft_tokens=2),
    "exits": generating(pondering_exit_criterion="kl", pondering_exit_threshold=0.1),
    "static cache": generating(cache_implementation="static"),
    "streamed": streamed,
    "another turn": going_on,
}
BATCH_EVERY = 25  # a batch costs as much as some ten calls


def run_calls(count):
    """So many calls of `generate`, of all kinds in turn."""
    model, watch = make_model(), Watch()
    kinds, started = list(CALLS.values()), time.perf_counter()
    with watch.hearing_warnings():
        batched(model, torch.tensor([[5, 9]]))  # what starts once and stays
        for index in range(count):
            prompt = torch.randint(3, VOCAB_SIZE, (1 + index % 3, 4 + index % 7))
            kinds[index % len(kinds)](model, prompt)
            if index % BATCH_EVERY == BATCH_EVERY - 1:
                batched(model, prompt)
            if index % max(1, count // 40) == 0:
                watch.look()
    watch.look()
    print(f"{count} calls of {len(kinds) + 1} kinds in {time.perf_counter() - started:.0f} s")
    return watch.problems()


def run_training(steps):
    """So many steps of Trainer, with a checkpoint and an evaluation after each tenth."""
    model, watch = make_model().train(), Watch()

    class Looking(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % max(1, steps // 40) == 0:
                watch.look()

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB_SIZE, (64, 16)).tolist()]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, watch.hearing_warnings():
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=max(1, steps // 10),
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=max(1, steps // 10),
            logging_steps=max(1, steps // 20),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = PonderingTrainer(
            model=model, args=settings, train_dataset=rows, eval_dataset=rows[:8], callbacks=[Looking()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        checkpoints = len(list(Path(folder).glob("checkpoint-*")))
    print(f"{steps} steps in {time.perf_counter() - started:.0f} s, {checkpoints} checkpoints kept")
    return watch.problems()


def words():
    """A tokenizer in which every token is a word."""
    names = ["<pad>", "<s>", "<unk>", *(f"w{index}" for index in range(3, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


@contextlib.contextmanager
def served(log):
    """(process, port) of examples/serve.py, running; what it says goes to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SERVER, "--port", str(port), "--device", "cpu"]
    with open(log, "w", encoding="utf-8") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        while "Uvicorn running" not in Path(log).read_text(encoding="utf-8"):
            if server.poll() is not None:
                raise RuntimeError(Path(log).read_text(encoding="utf-8"))
            time.sleep(0.2)
        yield server, port
    finally:
        server.terminate()
        server.wait()


class Client:
    """Asks a server, and holds its answers against what the model itself generates."""

    def __init__(self, folder, model, tokenizer, port):
        self.folder, self.port = str(folder), port
        self.wrong, self.answered, self.cancelled, self.lock = [], 0, 0, threading.Lock()
        self.expected = {}
        for prompt in range(PROMPTS):
            text = " ".join(f"w{3 + 7 * prompt + place}" for place in range(3 + prompt))
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            for kind, settings in enumerate(REQUESTS):
                tokens = model.generate(ids, **GREEDY, pad_token_id=0, **settings)[0, ids.shape[1] :]
                self.expected[prompt, kind] = text, tokenizer.decode(tokens, skip_special_tokens=True)

    def _ask(self, text, settings, stream):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        config = {**GREEDY, "pad_token_id": 0, **settings}
        body = {"model": self.folder, "prompt": text, "stream": stream, "generation_config": json.dumps(config)}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def ask(self, index):
        """One request; of a fifth the client hangs up after the first piece."""
        chance = random.Random(index)
        kind, prompt, way = chance.randrange(len(REQUESTS)), chance.randrange(PROMPTS), index % 5
        text, expected = self.expected[prompt, kind]
        stream = way in (0, 1) and "num_beams" not in REQUESTS[kind]
        hangs_up = stream and way == 0
        settings = {**REQUESTS[kind], "max_new_tokens": 60} if hangs_up else REQUESTS[kind]
        connection, response = self._ask(text, settings, stream)
        with contextlib.closing(connection):
            if hangs_up:
                response.readline()
                response.close()
            else:
                content = response.read().decode()
        with self.lock:
            self.cancelled += hangs_up
            self.answered += not hangs_up
            if not hangs_up and (found := self._text(content, stream)).split() != expected.split():
                self.wrong.append(f"{REQUESTS[kind]} of {text!r}: {found!r} in place of {expected!r}")

    @staticmethod
    def _text(content, stream):
        if not stream:
            return json.loads(content)["choices"][0]["text"] if content.startswith("{") else content
        pieces = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: {")]
        parts = [json.loads(piece) for piece in pieces]
        return "".join(part["choices"][0]["text"] if "choices" in part else str(part) for part in parts)


def run_serving(minutes, requests):
    """Eight clients at once, so many minutes long or so many requests."""
    model, tokenizer = make_model(), words()
    model.generation_config.update(pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(CLIENTS) as pool:
        checkpoint = Path(folder) / "checkpoint"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        with served(Path(folder) / "log") as (server, port):
            client, watch = Client(checkpoint, model, tokenizer, port), Watch(psutil.Process(server.pid))
            started, asked = time.perf_counter(), 0
            while asked < requests if minutes is None else time.perf_counter() - started < 60 * minutes:
                first = time.perf_counter()
                list(pool.map(client.ask, range(asked, asked + 10)))
                asked += 10
                if minutes is not None:  # ten requests in four seconds at most: a low load for a long time
                    time.sleep(max(0, 4 - (time.perf_counter() - first)))
                client_at_rest(client)
                watch.look()
            seconds = time.perf_counter() - started
        lines = (Path(folder) / "log").read_text(encoding="utf-8").splitlines()
    watch.warned.update(line for line in lines if "arning" in line and "Request received" not in line)
    print(f"{asked} requests in {seconds:.0f} s: {client.answered} answered, {client.cancelled} cancelled")
    errors = ["\n".join(lines[-60:])] if any("Traceback" in line for line in lines) else []
    return watch.problems() + client.wrong + errors


def client_at_rest(client):
    """Wait until the server has ended what clients have left."""
    text, _ = client.expected[0, 0]
    connection, response = client._ask(text, {}, False)
    with contextlib.closing(connection):
        response.read()


def main(argv=None):
    """Run the parts that are named, or all, and say what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks endurance", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="calls, training, serving; none: all")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="of serving")
    parser.add_argument("--requests", type=int, help="so many, as fast as they go, in place of minutes")
    args = parser.parse_args(argv)
    parts = {
        "calls": lambda: run_calls(args.calls),
        "training": lambda: run_training(args.steps),
        "serving": lambda: run_serving(None if args.requests else args.minutes, args.requests),
    }
    unknown = [name for name in args.parts if name not in parts]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(parts)}")
    print(described())
    problems = []
    for name in args.parts or parts:
        print(f"--- {name}", flush=True)
        problems += [f"{name}: {problem}" for problem in parts[name]()]
    print("\n".join(problems) or "nothing grew, nothing was left, nothing was said twice")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
