"""`ponder-hf lens`: see what a model ponders, token by token."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .flags import add_device_flag, add_revision_flag, add_text_flags, flag_of
from .parser import UsageError, add_command
from .prompt import read_prompt


MEASURES = ("probability", "rank", "entropy", "divergence", "share")
# Flags that say something about one text only, or about a whole one.
_OF_ONE = (
    "max_tokens",
    "max_new_tokens",
    "measure",
    "top_tokens",
    "pondering_exit_criterion",
    "pondering_exit_threshold",
)
_OF_WHOLE = ("text_field", "data_name", "block_size", "split", "max_blocks")
_EMPTY = "the text is empty: give some with --prompt, on standard input with --prompt -, or in a --file"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = add_command(
        subparsers,
        "lens",
        "SOURCE [SOURCE] --prompt TEXT|--file FILE|--data DATA",
        summary="see what a model ponders, token by token",
        description="For every token and pass: the most probable next tokens, probability and rank of the one that "
        "came, entropy, divergence from the last pass, share of pondering in the input, where early exits would stop, "
        "and what the model would draft. A table in the terminal; with --html a page to explore it, with --png heat "
        "maps.\n\nWith --data over a whole text: which tokens gain and lose by pondering, how often a right token is "
        "thought wrong and back, calibration and agreement of the passes, with intervals.\n\nSOURCE may be a plain "
        "model, which has one pass. Two of them stand side by side on the page.",
        example="lens pondering-pythia-70m --prompt 'Once upon a time' --continue 20 --html lens.html",
    )
    parser.add_argument(
        "source", nargs="+", metavar="SOURCE", help="a pondering or a plain model: a folder or a Hub id"
    )
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", metavar="TEXT", help="the text to look at; -: from standard input")
    text.add_argument("--file", metavar="FILE", help="a file with the text, in UTF-8")
    text.add_argument("--max-tokens", type=int, metavar="N", help="look at the first N tokens only")
    text.add_argument(
        "--continue",
        dest="max_new_tokens",
        type=int,
        metavar="N",
        help="have the model write N tokens more, and look at those too",
    )
    whole = parser.add_argument_group("a whole text")
    add_text_flags(whole)
    whole.add_argument("--split", help="of a data set. Default: validation; of files and folders here: train.")
    whole.add_argument("--max-blocks", type=int, metavar="N", help="no more than the first N blocks of text")
    shown = parser.add_argument_group("what is shown, and where")
    shown.add_argument("--html", metavar="FILE", help="write one page that needs nothing else")
    shown.add_argument("--png", metavar="FILE", help="draw heat maps of all measures")
    shown.add_argument("--overwrite", action="store_true", help="replace these files where they exist")
    shown.add_argument("--measure", choices=MEASURES, help="in the table's cells. Default: probability.")
    shown.add_argument("--top-tokens", type=int, metavar="N", help="most probable tokens that are kept. Default: 10.")
    parser.add_argument(
        "--pondering-steps", type=int, metavar="S", help="in place of the checkpoint's own; more of them, too"
    )
    parser.add_argument(
        "--pondering-exit-criterion", choices=("kl", "entropy", "argmax"), help="whose threshold the next flag gives"
    )
    parser.add_argument(
        "--pondering-exit-threshold", type=float, metavar="X", help="where tokens would stop pondering"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Default: as stored.")
    add_device_flag(parser)
    add_revision_flag(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise a UsageError where the flags do not go together."""
    given = [flag for flag in ("prompt", "file", "data") if getattr(args, flag) is not None]
    if len(given) != 1:
        several = f"; here are --{' and --'.join(given)}" if given else ""
        args.parser.error(f"give one of --prompt, --file and --data, the text to look at{several}")
    names, place = (_OF_WHOLE, "--data") if args.data is None else (_OF_ONE, "--prompt or --file")
    for name in names:
        if getattr(args, name) is not None:
            args.parser.error(f"{'--continue' if name == 'max_new_tokens' else flag_of(name)} goes with {place}")
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError(_EMPTY)
    if len(args.source) > 2:
        raise UsageError(f"a lens shows one or two models, got {len(args.source)}")
    if args.png and len(args.source) > 1:
        raise UsageError("--png draws one model: give one SOURCE, or --html for two side by side")
    if args.data is not None and args.html and len(args.source) > 1:
        raise UsageError("--html of a whole text is about one model: give one SOURCE")
    if (args.pondering_exit_criterion is None) != (args.pondering_exit_threshold is None):
        raise UsageError("--pondering-exit-criterion and --pondering-exit-threshold go together: give both or none")
    for flag, name in (("--html", args.html), ("--png", args.png)):
        if name is not None:
            _check_place(flag, name, args.overwrite)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ponder_hf.conversion.whole_folder import whole_file
    from ponder_hf.data.tables import import_optional

    if args.png:
        import_optional("matplotlib", "for --png", extra="viz")
    as_table = not (args.json or args.html or args.png)
    if as_table:
        import_optional("rich", "for the table", extra="viz")
    text = None if args.data is not None else _read_text(args)
    looks = [_look(args, source, text) if text is not None else _look_at_data(args, source) for source in args.source]
    figure = looks[0].figure() if args.png else None  # which may be refused, before anything is written
    if args.html:
        with whole_file(args.html) as path:
            path.write_text(looks[0].to_html(*looks[1:]), encoding="utf-8")
    if figure is not None:
        with whole_file(args.png) as path:
            figure.savefig(path, format="png")
    for name in filter(None, (args.html, args.png)):
        print(f"wrote {name}", file=sys.stderr)
    if as_table:
        from ponder_hf.lenses.table import print_table, print_text_tables

        for look in looks:
            if text is None:
                print_text_tables(look.to_dict())
            else:
                print_table(look, args.measure or "probability")
    results = [look.to_dict() for look in looks] if args.json else []
    return results[0] if len(results) == 1 else {"checkpoints": results}


def _look(args, source, text):
    from ponder_hf.evaluation.load import load_for_evaluation, warn_of_untrained
    from ponder_hf.lenses import lens

    steps = args.pondering_steps
    loaded = load_for_evaluation(source, pondering_steps=steps, **_loading(args))
    warn_of_untrained(steps, loaded)
    criterion = args.pondering_exit_criterion
    return lens(
        loaded.model,
        loaded.tokenizer,
        text,
        pondering_steps=steps,
        max_tokens=args.max_tokens,
        max_new_tokens=0 if args.max_new_tokens is None else args.max_new_tokens,
        top_tokens=10 if args.top_tokens is None else args.top_tokens,
        exit_thresholds=None if criterion is None else {criterion: args.pondering_exit_threshold},
        name=loaded.name,
    )


def _look_at_data(args, source):
    from ponder_hf.lenses import lens_text

    return lens_text(
        source,
        args.data,
        text_field=args.text_field or "text",
        data_name=args.data_name,
        split=args.split,
        block_size=args.block_size,
        max_blocks=args.max_blocks,
        pondering_steps=args.pondering_steps,
        progress=True,
        **_loading(args),
    )


def _loading(args):
    import torch

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return {"dtype": dtype, "device": args.device, "revision": args.revision}


def _read_text(args):
    return args.prompt if args.file is None and args.prompt != "-" else read_prompt(args.file, _EMPTY)


def _check_place(flag: str, name: str, overwrite: bool) -> None:
    """Raise a UsageError where a file cannot be written, before anything takes its time."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UsageError(f"{flag} writes a file, and {name} is a folder")
    if path.exists() and not overwrite:
        raise UsageError(f"{name} exists: give another name, or --overwrite")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {name}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {name}: {path.parent} may not be written to")
