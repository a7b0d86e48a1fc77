"""`ponder-hf eval`: the loss of each pass on a text."""

import logging
import math
import sys
import time

from ponder_hf import PonderingError

from .data_flags import add_text_flags
from .fields import add_device_flag, errors_named_by_flags


logger = logging.getLogger(__name__)


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "eval",
        help="the loss of each pass on a text",
        description="Measure the loss and perplexity of each pass on text, in blocks as `train` makes them: documents "
        "one after another, cut into rows of N tokens. The first token of a block is not predicted, and what does not "
        "fill a last block is left out. SOURCE may be a plain model, which has one pass.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a pondering or a plain model: a folder or a Hub id")
    add_text_flags(parser, required=True)
    parser.add_argument("--split", help="of a data set. Default: validation; of files and folders here: train.")
    parser.add_argument("--max-blocks", type=int, metavar="N", help="no more than the first N blocks")
    parser.add_argument("--pondering-steps", type=int, metavar="S", help="in place of the checkpoint's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Default: as stored.")
    add_device_flag(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    return parser


def run(args):
    with errors_named_by_flags(["pondering_steps", "block_size", "max_blocks"]):
        result = evaluate(args)
    if not args.json:
        _tell(result)
    return result


def evaluate(args):
    """What `--json` prints, for the flags `args`."""
    import torch

    from ponder_hf.conversion import load_tokenizer, open_source
    from ponder_hf.data import check_tokenizer, load_blocks
    from ponder_hf.data.sources import find_sources
    from ponder_hf.devices import read_device
    from ponder_hf.evaluation import evaluate_passes
    from ponder_hf.modeling.configuration_pondering import check_steps
    from ponder_hf.training.training_data import block_size_of, usual_split

    if args.pondering_steps is not None:
        check_steps("pondering_steps", args.pondering_steps)
    device = read_device(args.device)
    split = args.split or usual_split(args.data)
    find_sources(args.data, args.data_name, split, streaming=True)  # a wrong name, before a model is loaded
    source = open_source(args.source, args.revision)
    tokenizer = load_tokenizer(source)
    model = _load(source, None if args.dtype is None else getattr(torch, args.dtype), args.pondering_steps)
    check_tokenizer(tokenizer, model.config, source.name)
    blocks = load_blocks(
        args.data,
        tokenizer,
        block_size_of(args, model.config),
        text_field=args.text_field or "text",
        name=args.data_name,
        split=split,
        max_blocks=args.max_blocks,
        vocab_size=model.config.vocab_size,
    )
    model = model.to(device)
    start = time.perf_counter()
    losses = evaluate_passes(model, blocks, args.pondering_steps, progress=True)
    seconds = time.perf_counter() - start
    if not all(map(math.isfinite, losses)):
        raise PonderingError(f"{source.name} predicts NaN or infinity: get its weights again, or use --dtype float32")
    tokens = len(blocks) * (blocks.rows.shape[1] - 1)
    return {
        "source": source.name,
        "revision": source.revision,
        "data": args.data,
        "pondering_steps": len(losses) - 1,
        "dtype": str(model.dtype).removeprefix("torch."),
        "block_size": blocks.rows.shape[1],
        "blocks": len(blocks),
        "tokens": tokens,
        "loss": losses[-1],
        "perplexity": _perplexity(losses[-1]),
        "passes": [{"loss": loss, "perplexity": _perplexity(loss)} for loss in losses],
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _load(source, dtype, pondering_steps):
    """The model in `source`. A plain one is one that ponders 0 steps, unless others are asked for."""
    from ponder_hf.conversion import load_pondering
    from ponder_hf.conversion.convert import load_converted, plain_warnings, understand_plain

    if source.is_pondering:
        return load_pondering(source, dtype)
    authors_fields, empty_model = understand_plain(source, {})
    for warning in plain_warnings(source, authors_fields):
        logger.warning(warning)
    fields = {} if authors_fields else {"pondering_steps": pondering_steps or 0}
    return load_converted(source, empty_model, fields, dtype).eval()


def _perplexity(loss):
    # Beyond what a float can hold there is nothing left to compare; JSON knows no infinity.
    return math.exp(min(loss, 700.0))


def _tell(result):
    print("pass      loss  perplexity")
    for index, each in enumerate(result["passes"]):
        print(f"{index:>4}  {each['loss']:>8.4f}  {each['perplexity']:>10.2f}")
    print(
        f"{result['tokens']:,} tokens in {result['blocks']:,} blocks of {result['block_size']:,}, "
        f"{result['tokens_per_second']:,.0f} tokens per second, in {result['dtype']}",
        file=sys.stderr,
    )
