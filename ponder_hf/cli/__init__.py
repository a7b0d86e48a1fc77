"""The command line `ponder-hf`: one module a command, registered here.

Each module has `add_parser(subparsers)`, which gives back its parser and imports nothing heavy, and `run(args)`, which
does the work and gives back what `--json` prints: a dict, or None for nothing to say. Exit codes: 0 done, 1 an
unexpected failure, 2 bad input, 130 interrupted.
"""

import importlib
import json
import sys

from ponder_hf import PonderingError, __version__
from ponder_hf.errors import NotFinished
from ponder_hf.modeling.pondering_errors import check_transformers

from .outcome import bad_input, interrupted, is_first_process, stopped, unexpected
from .parser import OneLineParser, check_command
from .quiet import own_warnings_shown, quiet_libraries, standard_output_for_json
from .words import errors_in_flags, in_flags


COMMANDS = ("demo", "convert", "export", "train", "generate", "eval", "inspect", "push", "inspect-code", "doctor")


def build_parser():
    """The parser of the whole command line; `args.run` and `args.parser` are the chosen command's."""
    parser = OneLineParser(
        prog="ponder-hf",
        description="Language models that ponder in continuous space before each token.",
        epilog="ponder-hf COMMAND --help says more about one command.",
    )
    parser.add_argument("--version", action="version", version=f"ponder-hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        command = module.add_parser(subparsers)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv=None):
    """Run one command line, by default the program's own. Returns the exit code; raises nothing."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        check_command(argv, COMMANDS)
        args, unknown = build_parser().parse_known_args(argv)
        if unknown:  # the command's own parser knows which flags are near
            args.parser.refuse(unknown)
        if args.command != "doctor":  # which reports it among other things
            check_transformers()
        with quiet_libraries(), own_warnings_shown(lambda text: in_flags(text, args)), errors_in_flags(args):
            if not args.json:
                args.run(args)
            else:
                with standard_output_for_json() as output:
                    answer = json.dumps(args.run(args) or {})
                    if is_first_process():
                        print(answer, file=output)
        sys.stdout.flush()  # here, where a reader that is gone can still be noticed
    except SystemExit as done:  # --help and --version
        return done.code or 0
    except NotFinished as error:
        return stopped(error)
    except PonderingError as error:
        return bad_input(error)
    except KeyboardInterrupt as error:
        return interrupted(error)
    except Exception as error:
        return unexpected(error)
    return 0
