"""The command line `ponder-hf`: one module a command, registered here.

Each module has `add_parser(subparsers)`, which gives back its parser and imports nothing heavy, and `run(args)`, which
does the work and gives back what `--json` prints: a dict, or None for nothing to say. It may have `check(args)`, for
what can be seen to be wrong on the command line alone. Exit codes: 0 done, 1 an unexpected failure, 2 bad input, 130
interrupted.

torch and transformers are imported only once a command line is known to be one (running.py).
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from ponder_hf import __version__

from .outcome import failed, interrupted, open_closed_streams
from .parser import CommandParser, OneLineParser, check_command, check_words


COMMANDS = (
    "demo",
    "convert",
    "export",
    "train",
    "generate",
    "eval",
    "lens",
    "inspect",
    "push",
    "inspect-code",
    "doctor",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `args.run` and `args.parser` are the chosen command's."""
    parser = OneLineParser(
        prog="ponder-hf",
        usage="ponder-hf COMMAND ...",
        description="Language models that ponder in continuous space before each token.",
        epilog="ponder-hf COMMAND --help says more about one command.",
    )
    parser.add_argument("--version", action="version", version=f"ponder-hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=CommandParser)
    for name in COMMANDS:
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        command = module.add_parser(subparsers)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.set_defaults(run=module.run, check=getattr(module, "check", None), parser=command)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line.

    Raises:
        UsageError: it is wrong.
        SystemExit: it asks for help or the version, which is printed.
    """
    check_words(argv)
    check_command(argv, COMMANDS)
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unexpected argument {unknown[0]}")
    if args.check is not None:
        args.check(args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the program's own. Returns the exit code; raises nothing."""
    open_closed_streams()
    try:
        args = parse(sys.argv[1:] if argv is None else list(argv))
        from .running import run_command

        run_command(args)
        sys.stdout.flush()  # here, where a reader that is gone can still be noticed
    except SystemExit as done:  # --help and --version
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt as error:
        return interrupted(error)
    except Exception as error:
        return failed(error)
    return 0
