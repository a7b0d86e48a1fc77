"""Items of tasks from files on this machine, for the task files beside this one.

lm-evaluation-harness imports this file by itself, where ponder_hf need not be installed. Two formats are read, one
JSON object a line, plain or as .gz:

- items: `query`, `choices` and `gold`; or `context` and `continuation`; or `context_options`, `continuation`, `gold`
- requests: one line for each choice, with `doc_id`, `idx`, `label` and `request: {context, continuation}`
"""

import gzip
import json
from pathlib import Path


ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_PLAIN = (("query", "choices", "gold"), ("context_options", "continuation", "gold"), ("context", "continuation"))
# OLMo's files repeat each item without its question, under ids from here on, to normalise by; that is no item.
_WITHOUT_QUESTION = 1_000_000
LONGEST_LINE = 1 << 26  # characters; a line must be held as a whole to be understood


class ItemsError(ValueError):
    """The items cannot be used; the message says why."""


def find(folder: str | Path, name: str) -> Path | None:
    """The file in `folder` with the items of the task `name`: hellaswag in hellaswag-1k.requests.jsonl.gz."""
    for path in sorted(Path(folder).expanduser().iterdir()):
        stem = path.name.partition(".")[0]
        if path.name.endswith(ENDINGS) and (stem == name or stem.rpartition("-")[0] == name):
            return path
    return None


def names(folder: str | Path) -> list[str]:
    """The names of all tasks whose items lie in `folder`."""
    files = [path.name for path in Path(folder).expanduser().iterdir() if path.name.endswith(ENDINGS)]
    return sorted(name.partition(".")[0] for name in files)


def load(path: str | Path, after_query: str = "") -> list[dict]:
    """The items of a file in one form: (context, choices, gold), (context, continuation) or (context_options, ...).

    Args:
        path: the file.
        after_query: stands between a query and its choices. Requests have it in their context already.

    Raises:
        ItemsError: the file holds none, or a line is in neither format.
    """
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise ItemsError(f"{path} has no items")
    if "request" in rows[0][1]:
        return _from_requests(path, rows)
    form = next((form for form in _PLAIN if set(form) <= set(rows[0][1])), None)
    items = []
    for line, row in rows:
        if form is None or not set(form) <= set(row):
            raise _neither(path, line, row)
        item = {name: row[name] for name in form}
        if "query" in item:
            item["context"] = item.pop("query").rstrip("\n") + after_query
        _check(path, line, item)
        items.append(item)
    return items


def read(items_folder: str | None = None, name: str = "", after_query: str = "", **_: object) -> dict:
    """The data set of one task, as lm-evaluation-harness asks for it (`custom_dataset`).

    Args:
        items_folder: with the files; from `--metadata '{"items_folder": "..."}'`.
        name: of the task.
        after_query: as in `load`.
    """
    import datasets

    if items_folder is None:
        raise ItemsError("""say where the items are: --metadata '{"items_folder": "FOLDER"}'""")
    path = find(items_folder, name)
    if path is None:
        raise ItemsError(f"{items_folder} has no items of {name}: a file {name}.jsonl is needed")
    return {"test": datasets.Dataset.from_list(load(path, after_query))}


def _rows(path):
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), start=1):
                if len(line) > LONGEST_LINE:
                    raise ItemsError(
                        f"line {number} of {path} is longer than {LONGEST_LINE >> 20} MiB, which no item is"
                    )
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ItemsError(f"line {number} of {path} is not JSON ({error}): one object a line") from error
                if not isinstance(row, dict):
                    raise _neither(path, number, row)
                yield number, row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ItemsError(f"{path} cannot be read: {error}") from error


def _from_requests(path, rows):
    items: dict = {}
    for line, row in rows:
        request = row.get("request")
        if not isinstance(request, dict) or not {"context", "continuation"} <= set(request) or "doc_id" not in row:
            raise _neither(path, line, row)
        if isinstance(row["doc_id"], int) and row["doc_id"] >= _WITHOUT_QUESTION:
            continue
        item = items.setdefault(row["doc_id"], {"line": line, "gold": row.get("label"), "of": {}})
        item["of"][row.get("idx", len(item["of"]))] = (request["context"], request["continuation"])
    found = []
    for item in items.values():
        contexts = {context for context, _ in item["of"].values()}
        choices = [item["of"][index][1] for index in sorted(item["of"])]
        if len(contexts) > 1:
            raise ItemsError(f"the choices of the item in line {item['line']} of {path} have different contexts")
        if not all(isinstance(choice, str) and choice.startswith(" ") for choice in choices):
            raise ItemsError(f"a continuation of the item in line {item['line']} of {path} begins without a space")
        made = {"context": contexts.pop(), "choices": [choice[1:] for choice in choices], "gold": item["gold"]}
        _check(path, item["line"], made)
        found.append(made)
    return found


def _check(path, line, item):
    options = item.get("choices", item.get("context_options"))
    texts = [item[name] for name in ("context", "continuation") if name in item]
    if options is not None:
        if not isinstance(options, list) or len(options) < 2:
            raise ItemsError(f"line {line} of {path}: at least two choices are needed")
        gold = item["gold"]
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
            raise ItemsError(f"line {line} of {path}: the right choice is {gold!r}, of {len(options)} choices")
        texts += options
    if not all(isinstance(text, str) for text in texts):
        raise ItemsError(f"line {line} of {path}: a context, a continuation or a choice is no text")


def _neither(path, line, row):
    fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    forms = "; ".join(", ".join(form) for form in _PLAIN)
    return ItemsError(
        f"line {line} of {path} is in neither format of items (its fields: {fields}): needed are {forms}; or doc_id, "
        "label and request"
    )
