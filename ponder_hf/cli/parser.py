"""argparse with errors of one line."""

import argparse
import difflib

from ponder_hf import PonderingError


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises PonderingError where argparse prints its usage and exits.

    complete: called once with the parser before it first parses, for flags that are slow to find out.
    """

    complete = None

    def __init__(self, *args, **kwargs):
        # An abbreviated flag would change its meaning as soon as a longer one is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        if self.complete is not None:
            complete, self.complete = self.complete, None
            complete(self)
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise PonderingError(f"{message} (see `{self.prog} --help`)")

    def refuse(self, unknown):
        """Raise for the arguments `unknown` that argparse could not place, with the flag near the first one."""
        flags = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        if near:
            self.error(f"there is no flag {unknown[0]}, did you mean {near[0]}?")
        self.error(f"unexpected argument {unknown[0]}")


def check_command(argv, commands):
    """Raise a PonderingError where the first word of the command line is no command, with the ones near it."""
    word = next((word for word in argv if not word.startswith("-")), None)
    if word is None:
        if not any(word in ("-h", "--help", "--version") for word in argv):
            raise PonderingError(f"no command given: say `ponder-hf COMMAND` with one of {', '.join(commands)}")
    elif word not in commands:
        near = difflib.get_close_matches(word, commands, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(commands)}"
        raise PonderingError(f"there is no command {word!r}: {hint}")
