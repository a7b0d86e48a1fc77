"""What a way of training does for generation: ticks of drafts, and passes of early exits, for the runs of a table.

    python examples/evidence/decoding.py elastic --results evidence

It reads the weights that `run.py` left, and writes into RESULTS/decoding.
"""

import argparse
import functools
import statistics
from pathlib import Path

import torch
from run import is_done
from runs import BLOCK, TABLES
from texts import read_text
from training import described_machine, make_model, write_result

from ponder_hf import PonderingForCausalLM


PROMPT_BYTES = 32
DRAFTED = 12, 64  # prompts, new bytes of each
EXITING = 48, 12  # short, as small models begin to repeat themselves when they are greedy
SETTINGS = {"use_cache": True, "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
EXIT_THRESHOLDS = (0.01, 0.03, 0.1)  # of the divergence between a pass and the one before, in nats


def count_calls(model: PonderingForCausalLM) -> list[int]:
    """A list whose one number counts how often the backbone's decoder runs."""
    calls = [0]

    def count(*_):
        calls[0] += 1

    model.backbone.base_model.register_forward_hook(count)
    return calls


def measure_drafts(model: PonderingForCausalLM, prompts: torch.Tensor) -> dict:
    """Sampling with drafts that nothing was trained for, from prompts (N, T), one by one.

    Returns:
        acceptance: the share of guesses that proved right. ticks: passes in turn for each new token but the first;
        without drafts they are S + 1.
    """
    calls, steps, new = count_calls(model), model.config.pondering_steps, DRAFTED[1]
    acceptance = []
    for seed, prompt in enumerate(prompts.split(1)):
        torch.manual_seed(seed)
        settings = {**SETTINGS, "do_sample": True, "max_new_tokens": new}
        acceptance.append(float(model.generate(prompt, num_draft_tokens=steps, **settings).draft_acceptance_rate))
    ticks = (calls[0] - len(prompts) * (steps + 1)) / (len(prompts) * (new - 1))  # without those of the prompts
    return {"acceptance": statistics.mean(acceptance), "ticks": ticks}


@torch.no_grad()
def measure_exits(model: PonderingForCausalLM, prompts: torch.Tensor, threshold: float) -> dict:
    """Greedy generation with early exits from prompts (N, T).

    Returns:
        passes: of a new token. agree: the share of new tokens that all passes would have chosen, too, after the same
        text.
    """
    exits = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": threshold}
    output = model.generate(prompts, do_sample=False, max_new_tokens=EXITING[1], **SETTINGS, **exits)
    best = model(input_ids=output.sequences).logits[:, PROMPT_BYTES - 1 : -1].argmax(-1)
    return {
        "threshold": threshold,
        "passes": output.pondering_steps_used.float().mean().item() + 1,
        "agree": (best == output.sequences[:, PROMPT_BYTES:]).float().mean().item(),
    }


def prompts_of(text: torch.Tensor, number: int) -> torch.Tensor:
    """Token ids (N, T) from places evenly spread over a text."""
    starts = torch.linspace(0, len(text) - BLOCK, number).long()
    return text[starts[:, None] + torch.arange(PROMPT_BYTES)].long()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--results", type=Path, default=Path("evidence"), help="the folder that run.py wrote")
    parser.add_argument("--texts", type=Path, help="folder of the texts; see texts.py")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    text_of = functools.cache(lambda name: read_text(name, arguments.texts))
    for run in TABLES[arguments.table]:
        path = arguments.results / "decoding" / f"{run.name}.json"
        if path.is_file() or not run.ponders or not is_done(run, arguments.results):
            continue
        weights = arguments.results / "work" / f"{run.name}.weights"
        if not weights.is_file():
            print(f"{run.name}: its weights are not at {weights}; run.py makes them anew once {run.name}.json is away")
            continue
        model = make_model(run)
        model.load_state_dict(torch.load(weights, map_location="cpu"))
        model.eval()
        held_out = text_of(run.text)[1]
        drafts = measure_drafts(model, prompts_of(held_out, DRAFTED[0]))
        exiting = prompts_of(held_out, EXITING[0])
        exits = [measure_exits(model, exiting, threshold) for threshold in EXIT_THRESHOLDS]
        result = {"name": run.name, **drafts, "exits": exits, "machine": described_machine(torch.device("cpu"))}
        write_result(path, result)
        print(f"{run.name}: {drafts['ticks']:.2f} ticks a token", flush=True)


if __name__ == "__main__":
    main()
