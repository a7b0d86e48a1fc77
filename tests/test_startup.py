"""`import ponder_hf` and help of the command line take no time; transformers knows pondering models in any order."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import prepared
import pytest
import tiny
from patience import PATIENCE

import ponder_hf
from ponder_hf import PonderingConfig
from ponder_hf.cli import COMMANDS


def run_python(program: str, folder: Path, *arguments: object, has_torch: bool = False) -> str:
    """What a program prints, in a process that has imported nothing of ours yet and sees every warning as an error."""
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    if has_torch:
        result = prepared.run(command, cwd=folder)
    else:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# Argument: none. Each line must end with its exit code.
COMMAND_LINES = """
import contextlib, io, sys
from ponder_hf.cli import COMMANDS, main

lines = {
    "--version": 0, "--help": 0, "": 2, "covert a b": 2, "convert": 2, "convert a b --pondering-stepps 3": 2,
    "generate model --prompt x --max-new-tokens 0": 2, "generate model --prompt x --top-p 2": 2,
    "train model --data x --learning-rat 1": 2, "train --max-steps x": 2, "eval model": 2, "doctor extra": 2,
    **{f"{name} --help": 0 for name in COMMANDS},
}
for line, code in lines.items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(line.split()) == code, (line, err.getvalue())
    assert len((out if code == 0 else err).getvalue().splitlines()) == 1 or code == 0, line
slow = {"torch", "transformers", "numpy", "datasets"} & set(sys.modules)
assert not slow, slow
print(*lines.values())
"""


def test_help_and_usage_errors_import_nothing_slow(tmp_path):
    codes = run_python(COMMAND_LINES, tmp_path).split()
    assert codes.count("2") == 10
    assert codes.count("0") == 2 + len(COMMANDS)


# Each must leave transformers knowing pondering models, and nothing of ours waiting for another import.
ORDERS = {
    "ponder_hf, transformers": """
import ponder_hf, sys
assert not {"torch", "transformers"} & set(sys.modules)
import transformers
""",
    "transformers, ponder_hf": "import transformers, ponder_hf",
    "only a part of transformers": "import ponder_hf, transformers.models.auto.configuration_auto",
    "ponder_hf.modeling": "import ponder_hf.modeling",
    "a name": "import ponder_hf\nponder_hf.PonderingError",
    "all names": "from ponder_hf import *\nassert train and convert and PonderingTrainer and PromptLookup",
    "looked for, then imported": """
import importlib.util, ponder_hf
assert importlib.util.find_spec("transformers")
import transformers
""",
    "reloaded before and after": """
import importlib, ponder_hf
importlib.reload(ponder_hf)
import transformers
importlib.reload(ponder_hf)
""",
    "in several threads": """
import importlib, ponder_hf, threading
names = ["transformers", "ponder_hf.modeling", "transformers.models.auto.modeling_auto", "ponder_hf.conversion"]
threads = [threading.Thread(target=importlib.import_module, args=[name]) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""",
    "transformers fails at first": """
import ponder_hf, sys
sys.modules["transformers.utils"] = None
try:
    import transformers
except ImportError:
    del sys.modules["transformers.utils"]
else:
    raise SystemExit("it was there")
import transformers
""",
}
REGISTERED = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(model_type="llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
config = AutoConfig.for_model("pondering", base_config={**sizes, "vocab_size": 9})
import ponder_hf
from ponder_hf.modeling import modeling_pondering
assert type(config) is ponder_hf.PonderingConfig
model = AutoModelForCausalLM.from_config(config)
assert type(model) is modeling_pondering.PonderingForCausalLM is ponder_hf.PonderingForCausalLM
assert type(model).push_to_hub.__module__.startswith("ponder_hf.")
assert not [finder for finder in sys.meta_path if "ponder_hf" in type(finder).__module__]
print(type(config).__name__, type(model).__name__)
"""


@pytest.mark.parametrize("program", ORDERS.values(), ids=ORDERS)
def test_transformers_knows_pondering_models(tmp_path, program):
    has_torch = '"torch"' not in program
    found = run_python(program + "\n" + REGISTERED, tmp_path, has_torch=has_torch)
    assert found == "PonderingConfig PonderingForCausalLM\n"


def test_what_was_pickled_arrives_where_nothing_was_imported(tmp_path):
    (tmp_path / "config.pickled").write_bytes(pickle.dumps(PonderingConfig(tiny.base_config("llama"))))
    program = "import pickle\nconfig = pickle.load(open('config.pickled', 'rb'))\nassert config.pondering_steps == 3\n"
    program = program.replace("open('config.pickled', 'rb')", "__import__('io').FileIO('config.pickled')")
    run_python(program, tmp_path, has_torch=True)


TOO_OLD = """
import sys
sys.path.insert(0, sys.argv[1])
import ponder_hf
from ponder_hf.cli import main
assert main(["--version"]) == 0
assert main(["convert", "a", "b"]) == 2
for use in ("import transformers", "import ponder_hf.conversion", "ponder_hf.PonderingConfig"):
    try:
        exec(use)
    except ValueError as error:
        print(error)
"""


def test_a_transformers_that_is_too_old_is_named_whoever_imports_it(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("__version__ = '4.50.3'\n")
    lines = run_python(TOO_OLD, tmp_path, tmp_path).splitlines()
    assert len(lines) == 4
    assert all("transformers 4.50.3 is outside" in line for line in lines[1:])


def test_every_public_name_is_there():
    source = Path(ponder_hf.__file__).read_text(encoding="utf-8")
    checked = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    for_type_checkers = {alias.name for node in checked.body for alias in node.names}
    assert sorted(for_type_checkers) == sorted(ponder_hf.__all__) == ponder_hf.__all__
    assert set(ponder_hf.__all__) <= set(dir(ponder_hf))
    for name in ponder_hf.__all__:
        assert getattr(ponder_hf, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'ponder_hf' has no attribute 'PonderingModle'"):
        ponder_hf.PonderingModle  # noqa: B018
