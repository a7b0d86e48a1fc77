"""Self-speculative generation: ticks a token and acceptance of each source of drafts, and its time.

    python -m benchmarks wave
    python -m benchmarks wave --model FOLDER [FOLDER ...] --train TEXT --texts TEXT [TEXT ...] [--time]

Without a model, one of Pythia-70m's shape that always predicts the same token, so that every guess is right: what a
tick costs there, and the most that drafts can bring.

FOLDER is a trained pondering model with its tokenizer, as examples/train_small.py writes it. Where it has no draft
heads, they are trained first, on the text after --train, and --save-heads keeps the model with them. The texts to
measure on should be ones that the model has not seen. Every output is held against plain pondering.
"""

import argparse
import contextlib
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from ponder_hf import PonderingForCausalLM
from ponder_hf.data.text import read_text
from ponder_hf.modeling import pondering_generate_speculation
from ponder_hf.modeling.pondering_backbone import backbone_logits, run_backbone
from ponder_hf.modeling.pondering_generate_drafts import OwnPredictions
from ponder_hf.modeling.pondering_vocabulary_embedding import PonderingEmbedding
from ponder_hf.training.draft_heads import train_draft_heads

from .machine import described


def read_ids(path, tokenizer, count):
    """The first `count` token ids of a text."""
    ids = []
    for piece in read_text([path]):
        ids += tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count])


def prompts_of(ids, number, length):
    """`number` prompts (1, length), spread over the text."""
    starts = torch.linspace(0, len(ids) - length, number).long().tolist()
    return [ids[start : start + length].unsqueeze(0) for start in starts]


def generate(model, prompt, settings, **drafting):
    """(tokens, the finished Speculation or None)."""
    kept = []
    run = pondering_generate_speculation.Speculation.run

    def run_and_keep(speculation):
        kept.append(speculation)
        return run(speculation)

    pondering_generate_speculation.Speculation.run = run_and_keep
    try:
        tokens = model.generate(prompt, **settings, **drafting)
    finally:
        pondering_generate_speculation.Speculation.run = run
    return tokens, kept[0] if kept else None


def measure(model, prompts, settings, **drafting):
    """Ticks a token, the share of right drafts at the last pass, the mean rows of a tick, over all prompts."""
    ticks = tokens = hits = verdicts = rows = 0
    for prompt, expected in prompts:
        output, speculation = generate(model, prompt, settings, **drafting)
        if not torch.equal(output, expected):
            raise SystemExit("drafts changed the output")
        ticks += speculation.wave.num_ticks
        rows += speculation.wave.num_rows_run
        tokens += output.shape[1] - prompt.shape[1] - 1  # the first new token comes of the prompt
        hits += sum(pending.num_hits for pending in speculation.pending)
        verdicts += sum(pending.num_verdicts for pending in speculation.pending)
    return ticks / tokens, hits / max(verdicts, 1), rows / ticks


def agreement(model, ids, length=256):
    """How often the best token of each pass, and of each draft head, is the last pass's, over a text."""
    blocks = ids[: len(ids) // length * length].view(-1, length)
    own = torch.zeros(model.config.pondering_steps)
    heads = torch.zeros(model.config.draft_heads)
    with torch.no_grad():
        for row in blocks.split(4):
            states = []
            output = model.ponder(
                model.get_input_embeddings()(row), model.config.pondering_steps, on_hidden_states=states.append
            )
            head = model.get_output_embeddings()
            best = head(output.last_hidden_state).argmax(-1)
            own += torch.stack([(head(state).argmax(-1) == best).float().mean() for state in states]) * len(row)
            if model.draft_heads is not None:
                drafted = model.draft_heads(torch.stack([state.flatten(0, 1) for state in states]))
                heads += (head(drafted).argmax(-1) == best.flatten()).float().mean(-1) * len(row)
    return own / len(blocks), heads / len(blocks)


def seconds_a_token(model, prompts, settings, variants, rounds):
    """The median of the seconds that a new token of these prompts takes, for each variant of drafting, interleaved."""
    times = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name, drafting in variants.items():
            start = time.perf_counter()
            for prompt in prompts:
                model.generate(prompt, **settings, **drafting)
            if index:  # the first round warms up
                times[name].append((time.perf_counter() - start) / (len(prompts) * settings["max_new_tokens"]))
    return {name: statistics.median(values) for name, values in times.items()}


def cost_of_a_tick(model, length, rounds):
    """What the computations of a tick with a row for each pass take over those of one pass, `length` tokens before.

    Returns:
        Three ratios. "forward": of the backbone's own forward pass with its head, over S + 1 rows and over one. "own":
        with what pondering computes besides, the embedding of each row of an earlier pass. "heads": with draft heads.
    """
    steps, backbone = model.config.pondering_steps, model.backbone
    embedding, token_embedding = PonderingEmbedding(backbone, model.config), model.get_input_embeddings()
    caches, times = {}, {}

    def run(size):
        ids = torch.ones(size, 1, dtype=torch.long)
        return run_backbone(backbone, token_embedding(ids), past_key_values=caches[size], use_cache=True)[0][:, 0]

    def tick(source):
        states = run(steps + 1)
        drafted = source(states[:steps].unsqueeze(1), 0)
        states = states if drafted is None else torch.cat([states[:steps], drafted[:, 0], states[steps:]])
        embedding.of_logits(backbone_logits(backbone, states)[:steps])

    def forward(size):
        backbone(torch.ones(size, 1, dtype=torch.long), past_key_values=caches[size], use_cache=True)

    parts = {
        "one row": lambda: forward(1),
        "forward": lambda: forward(steps + 1),
        "a pass": lambda: embedding(run(1).unsqueeze(0)),
        "own": lambda: tick(OwnPredictions()),
    }
    if model.draft_heads is not None:
        parts["heads"] = lambda: tick(model.draft_heads)
    with torch.no_grad():
        for index in range(10 * rounds + 10):
            if index % 10 == 0:  # or the caches grow
                for size in (1, steps + 1):
                    prompt = torch.ones(size, length, dtype=torch.long)
                    caches[size] = backbone(prompt, use_cache=True).past_key_values
            for name, part in parts.items():
                start = time.perf_counter()
                part()
                if index >= 10:
                    times.setdefault(name, []).append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    costs = {"forward": seconds["forward"] / seconds["one row"]}
    return costs | {name: seconds[name] / seconds["a pass"] for name in ("own", "heads") if name in seconds}


def prepare(folder, arguments):
    """The model with heads, and its tokenizer."""
    model = PonderingForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not model.config.draft_heads and arguments.heads_steps:
        ids = read_ids(arguments.train, tokenizer, arguments.heads_steps * 8 * 256)
        start = time.perf_counter()
        rates = train_draft_heads(model, ids[: len(ids) // 256 * 256].view(-1, 256), steps=arguments.heads_steps)
        shown = ", ".join(f"{rate:.1%}" for rate in rates)
        print(
            f"draft heads of {folder.name}: {arguments.heads_steps} steps, {time.perf_counter() - start:.0f} s, "
            f"agreement on the training text {shown}",
            flush=True,
        )
        if arguments.save_heads:
            target = arguments.save_heads / folder.name
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    return model, tokenizer


def always_right(steps=3):
    """A model of Pythia-70m's shape with random weights, and draft heads, that predicts one token, whatever comes."""
    config = GPTNeoXConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)
    torch.manual_seed(0)
    model = PonderingForCausalLM.from_base(GPTNeoXForCausalLM(config), pondering_steps=steps).eval()
    model.add_draft_heads()
    with torch.no_grad():
        token = model.get_output_embeddings().weight[7]
        model.backbone.base_model.final_layer_norm.bias.copy_(200 * token / token.norm())
    return model


@contextlib.contextmanager
def corrections(are_made):
    """Within it, later passes replace guesses that they do not predict, or do not."""
    pondering_generate_speculation.Speculation.corrects = are_made
    try:
        yield
    finally:
        pondering_generate_speculation.Speculation.corrects = True


SOURCES = {
    "own predictions": "own",
    "draft heads": "heads",
    "prompt lookup, then heads or own": "prompt_lookup",
}


def main(argv=None):
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="folders of trained models")
    parser.add_argument("--train", type=Path, help="the text to train draft heads on")
    parser.add_argument("--heads-steps", type=int, default=600, help="0: no heads where there are none")
    parser.add_argument("--save-heads", type=Path, metavar="FOLDER", help="write the models with their heads there")
    parser.add_argument("--texts", type=Path, nargs="+", default=[])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--time", action="store_true", help="seconds a token, too: needs a quiet machine")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    print(described())
    settings = {
        "max_new_tokens": arguments.new_tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if not arguments.model:
        print("\nPythia-70m's shape, every guess right: S = 3")
        model = always_right()
        prompt = torch.arange(arguments.prompt_tokens).unsqueeze(0)
        report_times(model, [(prompt, model.generate(prompt, **settings))], settings, SOURCES, arguments)
    for folder in arguments.model:
        model, tokenizer = prepare(folder, arguments)
        for text in arguments.texts:
            ids = read_ids(text, tokenizer, 8192)
            report(model, ids, f"{folder.name} on {text.name}", settings, arguments)


def report(model, ids, title, settings, arguments):
    """The tables of one model and text."""
    steps = model.config.pondering_steps
    own, heads = agreement(model, ids)
    print(f"\n{title}: S = {steps}")
    print(
        "agreement with the last pass, teacher-forced: own "
        + ", ".join(f"{rate:.1%}" for rate in own)
        + "; heads "
        + ", ".join(f"{rate:.1%}" for rate in heads)
    )
    prompts = prompts_of(ids, arguments.prompts, arguments.prompt_tokens)
    prompts = [(prompt, model.generate(prompt, **settings)) for prompt in prompts]
    print(
        "| drafts | corrected by later passes | ticks a token | right at the last pass a | "
        "a + (1 - a)(S + 1) | rows a tick |\n| --- | --- | --- | --- | --- | --- |"
    )
    sources = {name: source for name, source in SOURCES.items() if source != "heads" or model.draft_heads is not None}
    for name, source in sources.items():
        for corrects in (False, True):
            drafting = {"num_draft_tokens": steps, "draft_source": source}
            with corrections(corrects):
                ticks, rate, rows = measure(model, prompts, settings, **drafting)
            print(
                f"| {name} | {'yes' if corrects else 'no'} | {ticks:.2f} | {rate:.1%} | "
                f"{rate + (1 - rate) * (steps + 1):.2f} | {rows:.2f} |",
                flush=True,
            )
    if arguments.time:
        report_times(model, prompts[:4], settings, sources, arguments)


def report_times(model, prompts, settings, sources, arguments):
    """The seconds of plain and drafted tokens beside what the ticks would allow."""
    steps = model.config.pondering_steps
    variants = {"plain pondering": {}}
    variants |= {name: {"num_draft_tokens": steps, "draft_source": source} for name, source in sources.items()}
    costs = cost_of_a_tick(model, arguments.prompt_tokens + arguments.new_tokens // 2, arguments.rounds)
    print(f"cost of {steps + 1} rows over one: " + ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items()))
    times = seconds_a_token(model, [prompt for prompt, _ in prompts], settings, variants, arguments.rounds)
    print(
        "| drafts | ticks a token | ms a token | plain pondering over it | (S + 1) / ticks / forward cost | "
        "(S + 1) / ticks / cost |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, seconds in times.items():
        ticks = forward = products = ""
        if name in sources:
            count, _, _ = measure(model, prompts, settings, **variants[name])
            cost = costs["own" if name == "own predictions" else list(costs)[-1]]
            ticks, forward = f"{count:.2f}", f"{(steps + 1) / count / costs['forward']:.2f}"
            products = f"{(steps + 1) / count / cost:.2f}"
        speed = times["plain pondering"] / seconds
        print(f"| {name} | {ticks} | {seconds * 1e3:.2f} | {speed:.2f} | {forward} | {products} |", flush=True)
