"""How often do a sampled draft and the last pass agree, by noise that both share and by rejection sampling?

For each pass before the last one, and each draft head, over the positions of a text: with p its distribution and q the
last pass's, sampling with shared Gumbel noise agrees where argmax(log p + g) = argmax(log q + g), estimated by draws;
rejection sampling accepts a draft with probability sum(min(p, q)), the most that any method can.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.wave import read_ids
from ponder_hf import PonderingForCausalLM


def agreement(drafted, target, draws):
    """(shared noise, rejection): mean rates over the positions of two distributions' logits, (n, V) each."""
    ahead, last = drafted.float().log_softmax(-1), target.float().log_softmax(-1)
    shared = 0.0
    for _ in range(draws):
        noise = -torch.empty_like(last).exponential_().log()
        shared += ((ahead + noise).argmax(-1) == (last + noise).argmax(-1)).float().mean().item()
    return shared / draws, torch.minimum(ahead.exp(), last.exp()).sum(-1).mean().item()


@torch.no_grad()
def main(argv=None):
    """Print a Markdown table of rates."""
    parser = argparse.ArgumentParser(prog="benchmarks coupling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a trained pondering checkpoint")
    parser.add_argument("--texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args(argv)
    if arguments.model is None or arguments.texts is None:
        print("coupling: left out, since it needs --model FOLDER and --texts FILE", file=sys.stderr)
        return
    model = PonderingForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    torch.manual_seed(0)
    print("| text | guesses of | shared noise | rejection sampling |\n| --- | --- | --- | --- |")
    for text in arguments.texts:
        ids = read_ids(text, tokenizer, arguments.tokens)[: arguments.tokens // 256 * 256].view(-1, 256)
        states = []
        steps = model.config.pondering_steps
        last = model.ponder(model.get_input_embeddings()(ids), steps, on_hidden_states=states.append)
        head = model.get_output_embeddings()
        target = head(last.last_hidden_state).flatten(0, 1) / arguments.temperature
        for index, state in enumerate(states):
            kinds = {f"pass {index}": state}
            if model.draft_heads is not None:
                kinds[f"head {index}"] = model.draft_heads(state.flatten(0, 1)[None], index)[0]
            for name, drafted in kinds.items():
                logits = head(drafted).view_as(target) / arguments.temperature
                shared, rejection = agreement(logits, target, arguments.draws)
                print(f"| {text.name} | {name} | {shared:.1%} | {rejection:.1%} |", flush=True)
