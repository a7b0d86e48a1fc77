"""`ponder-hf eval`: what each pass predicts of a text, and tasks of lm-evaluation-harness."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .flags import add_device_flag, add_revision_flag, add_text_flags
from .parser import UsageError, add_command


# Flags that say something about the text only, or about tasks only.
_OF_TEXT = ("text_field", "data_name", "block_size", "split", "max_blocks", "stride")
_OF_TASKS = ("tasks_from", "num_fewshot", "limit", "batch_size")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "eval",
        "SOURCE ... --data DATA|--tasks TASKS",
        summary="what each pass predicts: on a text, on tasks of lm-evaluation-harness",
        description="With --data: loss, perplexity, bits per byte and next-token accuracy of each pass on text, in "
        "blocks as `train` makes them: documents one after another, cut into rows of N tokens. The first token of a "
        "block is not predicted, and what does not fill a last block is left out. With --stride a window slides over "
        "the text instead, so that every token has a long context.\n\nWith --tasks: tasks of lm-evaluation-harness "
        "(`pip install 'ponder-hf[eval]'`). A run that was killed goes on when it is started again.\n\nSOURCE may be "
        "a plain model, which has one pass. Several of them stand side by side in one table.",
        example="eval pondering-pythia-70m --data my_text.txt --block-size 512",
    )
    parser.add_argument(
        "source", nargs="+", metavar="SOURCE", help="a pondering or a plain model: a folder or a Hub id"
    )
    text = parser.add_argument_group("text")
    add_text_flags(text)
    text.add_argument("--split", help="of a data set. Default: validation; of files and folders here: train.")
    text.add_argument("--max-blocks", type=int, metavar="N", help="no more than the first N blocks of text")
    text.add_argument("--stride", type=int, metavar="N", help="slide a window by N tokens. Default: blocks.")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", metavar="TASKS", help="names with commas between, or paper: the paper's nine tasks")
    tasks.add_argument("--tasks-from", metavar="FOLDER", help="with items or task files; other tasks are the Hub's")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question")
    tasks.add_argument("--limit", type=int, metavar="N", help="no more than the first N items of each task")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="rows at once. Default: 1.")
    parser.add_argument(
        "--pondering-steps", type=_steps, metavar="S", help="in place of the checkpoint's own; 0,1,2,3 for a curve"
    )
    parser.add_argument("--card", action="store_true", help="write results into SOURCE's model card, too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Default: as stored.")
    add_device_flag(parser)
    add_revision_flag(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise a UsageError where the flags do not go together."""
    if not args.data and not args.tasks:
        args.parser.error("give --data with a text, or --tasks with names of tasks")
    for names, flag in ((_OF_TEXT, "--data"), (_OF_TASKS, "--tasks")):
        used = [name for name in names if getattr(args, name) is not None]
        if used and not getattr(args, flag[2:]):
            args.parser.error(f"--{used[0].replace('_', '-')} goes with {flag}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    results = [_evaluated(args, source) for source in args.source]
    if not args.json:
        _tell(results)
    return results[0] if len(results) == 1 else {"checkpoints": results}


def _evaluated(args, source):
    import torch

    from ponder_hf.evaluation import evaluate_tasks, evaluate_text

    if args.card:
        _check_card(Path(source).expanduser())
    shared = {
        "dtype": None if args.dtype is None else getattr(torch, args.dtype),
        "device": args.device,
        "revision": args.revision,
        "progress": True,
    }
    result = {}
    if args.tasks:
        result |= evaluate_tasks(
            source,
            args.tasks,
            tasks_from=args.tasks_from,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size or 1,
            pondering_steps=args.pondering_steps,
            **shared,
        )
    if args.data:
        steps = args.pondering_steps
        result |= evaluate_text(
            source,
            args.data,
            text_field=args.text_field or "text",
            data_name=args.data_name,
            split=args.split,
            block_size=args.block_size,
            max_blocks=args.max_blocks,
            stride=args.stride,
            pondering_steps=max(steps) if isinstance(steps, list) else steps,  # one run has all earlier passes
            **shared,
        )
        if args.tasks:
            result["pondering_steps"] = steps if steps is not None else result["pondering_steps"]
    if args.card:
        from ponder_hf.hub.card_results import write_results

        write_results(source, result)
    return result


def _check_card(folder: Path) -> None:
    """Raise a UsageError where there can be no card, before anything takes its hours."""
    if not folder.is_dir():
        raise UsageError(f"--card writes into a folder on this machine, and {folder} is none")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--card writes into {folder}, which may not be written to")
    card = folder / "README.md"
    if card.exists() and not os.access(card, os.R_OK):
        raise UsageError(f"--card adds to {card}, which may not be read")


def _steps(text):
    """One S, or several with commas between: an int, or a list."""
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and no numbers with commas between") from None
    return steps if len(steps) > 1 else steps[0]


def _tell(results):
    from ponder_hf.evaluation import tasks_table, text_table

    if "passes" in results[0]:
        print(text_table(results))
        for result in results:
            print(
                f"{result['tokens']:,} tokens in {result['blocks']:,} blocks of {result['block_size']:,}, "
                f"{result['tokens_per_second']:,.0f} tokens per second, in {result['dtype']}",
                file=sys.stderr,
            )
    if "tasks" in results[0]:
        print(tasks_table(results))
