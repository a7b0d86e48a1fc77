"""What the reference says of the command line and of the configuration, from the parser and from PonderingConfig."""

import argparse
import inspect
import re

from griffe import Docstring, Parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables in place of their marks."""
    for mark, written in (("<!-- commands -->", commands), ("<!-- fields -->", fields)):
        if mark in markdown:
            markdown = markdown.replace(mark, written())
    return markdown


def commands() -> str:
    """Every command: what it does, its usage, its flags."""
    from ponder_hf.cli import build_parser

    (choices,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(_command(name, parser) for name, parser in choices.choices.items())


def fields() -> str:
    """Every field of PonderingConfig that is its own: type, default, meaning."""
    from ponder_hf import PonderingConfig

    parameters = inspect.signature(PonderingConfig).parameters
    sections = Docstring(inspect.getdoc(PonderingConfig), parser=Parser.google).parse(warnings=False)
    meanings = {
        each.name: each.description for section in sections if section.kind == "parameters" for each in section.value
    }
    rows = []
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = "" if name == "base_config" else f"`{parameter.default!r}`"
        rows.append((f"`{name}`", f"`{_type(parameter.annotation)}`", default, meanings[name]))
    return _table(("field", "type", "default", "meaning"), rows)


def _type(annotation: object) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return re.sub(r"[a-z_]+\.", "", str(annotation)).replace(" | ", " or ")


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().removeprefix("usage: ").strip()
    parts = [f"## {name}", *_paragraphs(parser.description), f"```text\n{usage}\n```"]
    for group in parser._action_groups:
        rows = [
            (_flag(action, parser), action.help)
            for action in group._group_actions
            if action.help and action.help != argparse.SUPPRESS and "-h" not in action.option_strings
        ]
        if rows:
            title = {"options": "flag", "positional arguments": "argument"}.get(group.title or "", group.title or "")
            parts += [group.description or "", _table((title, "meaning"), rows)]
    return "\n\n".join(part for part in [*parts, *_paragraphs(parser.epilog)] if part)


def _paragraphs(text: str | None) -> list[str]:
    """The paragraphs of a description; examples as code."""
    parts = [re.sub(r"\s+", " ", part).strip() for part in (text or "").split("\n\n")]
    return [re.sub(r"^examples?: (.*)", r"```bash\n\1\n```", part) for part in parts]


def _flag(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    value = parser.formatter_class(parser.prog)._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{flag} {value}`".replace(" `", "`") for flag in action.option_strings)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *lines])
