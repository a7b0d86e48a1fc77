"""List the benchmarks of this folder, or run them: `python -m benchmarks [all | NAME [ARGUMENT ...]]`.

A benchmark is a module beside this file with a docstring, whose first line is shown in the list, and a function
`main(argv)` that takes its command-line arguments as a list and returns an exit code or None.
"""

import ast
import importlib
import sys
from pathlib import Path


FOLDER = Path(__file__).parent


def find_benchmarks() -> dict[str, str]:
    """Map each benchmark's name to the first line of its docstring, without importing it."""
    summaries = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            summaries[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return summaries


def run_benchmark(name: str, argv: list[str]) -> int:
    print(f"--- {name}", file=sys.stderr, flush=True)
    return importlib.import_module(f"benchmarks.{name}").main(argv) or 0


def main(argv: list[str]) -> int:
    summaries = find_benchmarks()
    if not argv:
        for name, summary in summaries.items():
            print(f"{name:<24} {summary}")
        return 0
    name, *arguments = argv
    if name == "all":
        return max((run_benchmark(each, arguments) for each in summaries), default=0)
    if name not in summaries:
        print(f"benchmarks: no benchmark is named {name!r}; there are: {', '.join(summaries)}", file=sys.stderr)
        return 2
    return run_benchmark(name, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
