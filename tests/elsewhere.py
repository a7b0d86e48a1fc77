"""Programs run in a process that cannot import ponder_hf, as on the machine of whoever loads a checkpoint."""

import os
import subprocess
import sys

import prepared
import torch
from patience import PATIENCE


# Stands at the start of every program: ponder_hf must not be there, installed or not. What transformers deprecates is
# an error, also in transformers_modules, where it loads a checkpoint's code; the exception is that of pyproject.toml.
WITHOUT_PONDER_HF = """
import sys
import warnings

for category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module="transformers")
warnings.filterwarnings("ignore", "`(gradient_checkpointing_(en|dis)able|is_gradient_checkpointing)` is deprecated")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ponder_hf":
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Blocker())
try:
    import ponder_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("ponder_hf can be imported")
"""


def run(program, home, *arguments, python=None):
    """Run a program in a process of its own: isolated, from another folder, with an empty Hugging Face home.

    `python` may be the interpreter of another environment, or this one, for a start from nothing: by default torch is
    imported already (prepared.py). Returns standard output.

    Raises:
        AssertionError: the program failed. The message is what it printed.
    """
    return run_and_read(program, home, *arguments, python=python)[0]


def run_and_read(program, home, *arguments, python=None):
    """As `run`; returns (standard output, standard error)."""
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    variables |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    words = ["-I", "-W", "ignore", "-c", WITHOUT_PONDER_HF + program, *map(str, arguments)]
    if python is None:
        result = prepared.run([sys.executable, *words], cwd=home, env=variables)
    else:
        settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": PATIENCE}
        result = subprocess.run([str(python), *words], cwd=home, env=variables, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, result.stderr
