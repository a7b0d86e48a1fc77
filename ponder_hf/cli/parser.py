"""argparse with short help and errors of one line."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """A command line that is none. The message is one line: what is wrong and what to do about it."""


class _Formatter(argparse.HelpFormatter):
    """Wraps each paragraph of a description by itself, and puts long flags beside what they mean."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=35)

    def _fill_text(self, text, width, indent):
        fill = super()._fill_text
        return "\n\n".join(fill(part, width, indent) for part in text.split("\n\n"))

    def _format_args(self, action, default_metavar):
        shown = super()._format_args(action, default_metavar)
        return f"{action.metavar} ..." if action.nargs == "+" else shown


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse prints its usage and exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated flag would change its meaning as soon as a longer one is added.
        super().__init__(*args, allow_abbrev=False, formatter_class=_Formatter, **kwargs)  # type: ignore[misc]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


class CommandParser(OneLineParser):
    """The parser of one command.

    Args:
        further_flags: names those flags that it costs seconds to add, and takes no such time. None: there are none.
        complete: adds them to the parser. Called once, when one of them is used or `--help-all` is.
    """

    def __init__(
        self,
        *args: Any,
        further_flags: Callable[[], list[str]] | None = None,
        complete: Callable[["CommandParser"], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._further_flags, self._complete = further_flags, complete
        if complete is not None:
            self.add_argument("--help-all", action=_HelpAll, help="show every flag, and exit")

    def complete(self) -> None:
        """Add the further flags."""
        complete, self._complete = self._complete, None
        if complete is not None:
            complete(self)

    def flags(self) -> dict[str, argparse.Action]:
        """Every flag that it knows, and what argparse does with it."""
        return {flag: action for action in self._actions for flag in action.option_strings}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's. A flag that there is not is refused first, before what seems to be missing."""
        if self._further_flags is not None:  # TrainingArguments' fields, which many write as in Python
            args = [_in_kebab_case(word) for word in args]
        unknown = self._unknown(args)
        further = self._further_flags() if unknown and self._further_flags is not None else []
        if set(unknown) & set(further):
            self.complete()
            unknown, further = self._unknown(args), []
        if unknown:
            near = near_flag(unknown[0], [*self.flags(), *further])
            self.error(f"there is no flag {unknown[0]}" + (f", did you mean {near}?" if near else ""))
        return super().parse_known_args(args, namespace)

    def _unknown(self, words):
        known = self.flags()
        flags = [flag for flag in (word.partition("=")[0] for word in words) if flag.startswith("--")]
        flags = flags[: flags.index("--")] if "--" in flags else flags
        return [flag for flag in flags if flag not in known and " " not in flag]  # a text may begin with dashes


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *args: Any) -> None:
        parser.complete()
        parser.print_help()
        parser.exit()


def _in_kebab_case(word):
    flag, separator, value = word.partition("=")
    return flag.replace("_", "-") + separator + value if flag.startswith("--") and " " not in flag else word


def near_flag(flag: str, known: Sequence[str]) -> str | None:
    """The flag that somebody may have meant who wrote `flag`: almost the same, one it is a part of, or similar."""
    part = flag.lstrip("-")
    near = (
        difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
        or [each for each in known if part in each and len(part) > 3]
        or difflib.get_close_matches(flag, [each for each in known if not each.startswith("--help")], n=1)
    )
    return near[0] if near else None


def add_command(
    subparsers: Any, name: str, arguments: str, *, summary: str, description: str, example: str, **settings: Any
) -> CommandParser:
    """Add the parser of a command, whose help begins with its arguments, what it does, and an example.

    Args:
        subparsers: of the whole command line.
        name: of the command.
        arguments: what always stands on its line, as "SOURCE DEST".
        summary: a line in the list of commands.
        description: a few sentences.
        example: a command line without the name of the program.
        settings: of ArgumentParser.
    """
    usage = " ".join(filter(None, ("ponder-hf", name, arguments, "[FLAGS]")))
    description = f"{description}\n\nexample: ponder-hf {example}"
    return subparsers.add_parser(
        name, prog=f"ponder-hf {name}", usage=usage, help=summary, description=description, **settings
    )


def check_words(argv: Sequence[str]) -> None:
    """Raise a UsageError for a word that no file, model or text can be: not in UTF-8, or with a NUL in it."""
    for word in argv:
        if "\0" in word:
            raise UsageError(f"the argument {word!r} has a NUL in it: leave it out")
        if any("\ud800" <= each <= "\udfff" for each in word):
            raise UsageError(f"the argument {word!r} is not in UTF-8: rename the file, or convert the text")


def check_command(argv: Sequence[str], commands: Sequence[str]) -> None:
    """Raise a UsageError where the first word of the command line is no command, with the ones near it."""
    word = next((word for word in argv if not word.startswith("-")), None)
    if word is None:
        if not any(word in ("-h", "--help", "--version") for word in argv):
            raise UsageError(f"no command given: say `ponder-hf COMMAND` with one of {', '.join(commands)}")
    elif word not in commands:
        near = difflib.get_close_matches(word, commands, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(commands)}"
        raise UsageError(f"there is no command {word!r}: {hint}")
