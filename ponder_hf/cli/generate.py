"""`ponder-hf generate`: continue a text with a pondering checkpoint."""

import argparse
import time
from typing import Any

from .flags import add_device_flag, add_revision_flag
from .parser import UsageError, add_command
from .prompt import read_prompt


# Flags that `model.generate` takes as they are.
PONDERING = (
    "pondering_steps",
    "num_draft_tokens",
    "draft_source",
    "pondering_exit_criterion",
    "pondering_exit_threshold",
)
_EMPTY = "the prompt is empty: give some text with --prompt, or on standard input with --prompt -"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "generate",
        "SOURCE --prompt TEXT",
        summary="continue a text",
        description="Continue a text with a pondering checkpoint, greedily unless a flag of sampling is given. The "
        "text and its continuation go to standard output as they come.",
        example="generate pondering-pythia-70m --prompt 'Once upon a time' --max-new-tokens 50",
    )
    parser.add_argument("source", metavar="SOURCE", help="a pondering checkpoint: a folder or a Hub id")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; -: from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="Default: 100.")
    parser.add_argument("--pondering-steps", type=int, metavar="S", help="in place of the checkpoint's own")
    parser.add_argument("--do-sample", action="store_true", help="sample, as the next two flags do too")
    parser.add_argument("--temperature", type=float, metavar="T", help="> 0; larger is more random")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most probable P of the distribution")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling, to get the same text again")
    parser.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="guess so many tokens ahead: same text, sooner"
    )
    parser.add_argument(
        "--draft-source", choices=("own", "heads", "prompt_lookup"), help="where the guesses come from"
    )
    parser.add_argument(
        "--pondering-exit-criterion",
        choices=("kl", "entropy", "argmax"),
        help="stop pondering a token that has converged; needs the threshold",
    )
    parser.add_argument("--pondering-exit-threshold", type=float, metavar="X", help="below which it has; 0: never")
    add_device_flag(parser)
    add_revision_flag(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise a UsageError for values that no checkpoint can be asked for."""
    if args.draft_source is not None and args.num_draft_tokens is None:
        raise UsageError("--draft-source says where guesses come from: say with --num-draft-tokens how many, too")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.pondering_steps is not None and args.pondering_steps < 0:
        raise UsageError(f"--pondering-steps must be at least 0 (no pondering), got {args.pondering_steps}")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise UsageError(f"--temperature must be a finite number > 0, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p must be > 0 and at most 1, got {args.top_p}")
    if args.seed is not None and not 0 <= args.seed < 1 << 32:
        raise UsageError(f"--seed must be at least 0 and below 2**32, got {args.seed}")
    if not args.prompt.strip():
        raise UsageError(_EMPTY)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import TextStreamer, set_seed

    from ponder_hf import PonderingError
    from ponder_hf.conversion import load_pondering, load_tokenizer, open_checkpoint
    from ponder_hf.devices import read_device

    prompt = read_prompt(None, _EMPTY) if args.prompt == "-" else args.prompt
    device = read_device(args.device)
    source = open_checkpoint(args.source, args.revision)
    tokenizer = load_tokenizer(source)
    model = load_pondering(source)
    model = model.to(device)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise PonderingError("the prompt is empty to this tokenizer: give a longer text")
    if args.seed is not None:
        set_seed(args.seed)
    sampling = {"do_sample": args.do_sample or args.temperature is not None or args.top_p is not None}
    sampling |= {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
    pondering = {name: getattr(args, name) for name in PONDERING if getattr(args, name) is not None}
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=_pad_token(model, tokenizer),
        num_beams=1,  # whatever generation_config.json says: text cannot come as it is made otherwise
        streamer=None if args.json else TextStreamer(tokenizer, skip_special_tokens=True),
        return_dict_in_generate=True,
        **sampling,
        **pondering,
    )
    seconds = time.perf_counter() - start
    tokens = output.sequences[0]
    new_tokens = len(tokens) - inputs["input_ids"].shape[1]
    whole, before = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens, inputs["input_ids"][0].tolist())
    )
    asked = (args.pondering_steps, getattr(model.generation_config, "pondering_steps", None))
    steps = next((steps for steps in asked if steps is not None), model.config.pondering_steps)
    return {
        "source": source.name,
        "prompt": prompt,
        "text": whole[len(before) :],
        "new_tokens": new_tokens,
        "pondering_steps": steps,
        "pondering_steps_used": round(output.pondering_steps_used.float().mean().item(), 3),
        "draft_acceptance_rate": getattr(output, "draft_acceptance_rate", None),
        "do_sample": sampling["do_sample"],
        "seed": args.seed,
        "tokens_per_second": round(new_tokens / seconds, 2),
    }


def _pad_token(model, tokenizer):
    # One sequence needs no padding; naming a token keeps `generate` from looking for one.
    eos = model.generation_config.eos_token_id
    first = eos[0] if isinstance(eos, list) and eos else eos
    return next((token for token in (tokenizer.pad_token_id, first) if token is not None), None)
