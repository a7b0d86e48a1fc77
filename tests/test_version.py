"""Versions of transformers outside the range are refused in words, wherever somebody would meet the consequences."""

import json
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import elsewhere
import pytest
import tiny

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_version import NEWEST, OLDEST, TRANSFORMERS_RANGE, is_supported


pytest_plugins = ["refusals"]

REPOSITORY = Path(__file__).resolve().parents[1]

# Arguments: the folder, the version to pretend. Prints what each Auto class says.
LOAD = """
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

transformers.__version__ = sys.argv[2]
for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ValueError as error:
        print(error)
    else:
        print("loaded")
"""
# Importing the library where transformers has no masking_utils, as before 4.53. Argument: the version to pretend.
IMPORT = """
import sys
import transformers

transformers.__version__ = sys.argv[1]
sys.modules["transformers.masking_utils"] = None
import ponder_hf
"""
# Importing the configuration where transformers has nothing that it needs. Arguments: the version, the repository.
IMPORT_FROM_STUB = """
import sys
import types

sys.modules["transformers"] = types.ModuleType("transformers")
sys.modules["transformers"].__version__ = sys.argv[1]
sys.path.insert(0, sys.argv[2])
import modeling.configuration_pondering
"""


@pytest.fixture
def pretend(monkeypatch):
    """A function that makes transformers say another version."""
    # By name: transformers puts another module object in its place when it first loads a model.
    return lambda version: monkeypatch.setattr("transformers.__version__", version)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("4.9.0", False),
        ("4.56.2", False),
        ("4.57.0", True),
        ("4.57.6", True),
        ("5.0.0", True),
        ("5.0.0rc1", True),
        ("5.23.0", True),
        ("5.23.7", True),
        ("5.23.0+local", True),
        ("5.23.1.post1", True),
        ("5.24.0.dev0", False),
        ("5.24.0", False),
        ("5.100.0", False),
        ("6.0.0", False),
        ("unknown", False),
    ],
)
def test_which_versions_are_in_the_range(version, expected):
    assert is_supported(version) is expected


def test_the_installation_and_the_code_name_the_same_newest_version():
    requirement = re.search(r'"transformers>=[\d.]+,<([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert requirement.group(1) == f"{NEWEST[0]}.{NEWEST[1] + 1}"
    assert f">={OLDEST[0]}.{OLDEST[1]},<{requirement.group(1)}" == TRANSFORMERS_RANGE


@pytest.mark.parametrize("version", ["4.56.2", "5.24.0"])
def test_a_checkpoints_own_code_refuses(tmp_path, version):
    tiny.pondering_model().save_pretrained(tmp_path / "checkpoint")
    lines = elsewhere.run(LOAD, tmp_path / "home", tmp_path / "checkpoint", version).splitlines()
    expected = (
        f"transformers {version} is outside >=4.57,<5.24, the range that this code is tested with: "
        'pip install "transformers>=4.57,<5.24"'
    )
    assert lines == [expected] * 3
    patch = elsewhere.run(LOAD, tmp_path / "another", tmp_path / "checkpoint", "5.23.99").splitlines()
    assert patch == ["loaded"] * 3


def test_the_library_refuses(tmp_path, pretend):
    base = tiny.base_model()
    PonderingForCausalLM.from_base(base).save_pretrained(tmp_path)
    pretend("5.24.0")
    with pytest.raises(PonderingError, match=re.escape(TRANSFORMERS_RANGE)):
        PonderingForCausalLM.from_base(base)
    with pytest.raises(PonderingError, match=re.escape(TRANSFORMERS_RANGE)):
        PonderingForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("command", ["convert base out", "generate pondering --prompt cat", "export pondering out"])
def test_the_command_line_refuses(check_refused, pretend, command):
    pretend("5.24.0")
    line = check_refused(*command.split(), words=[TRANSFORMERS_RANGE])
    assert line.startswith("transformers 5.24.0 is outside ")


def test_doctor_still_reports(pretend, monkeypatch, capsys):
    pretend("5.24.0")
    monkeypatch.setattr("ponder_hf.cli.doctor.metadata.version", lambda name: "5.24.0")
    assert checkpoints.run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["transformers"]["good_for_checkpoints"] is False
    assert any(TRANSFORMERS_RANGE in problem for problem in report["problems"])


@pytest.mark.parametrize(
    ("program", "rest"), [(IMPORT, []), (IMPORT_FROM_STUB, [REPOSITORY])], ids=["library", "stub"]
)
def test_a_version_that_lacks_what_is_imported_is_named(tmp_path, program, rest):
    def last_line(version):
        command = [sys.executable, "-c", program, version, *map(str, rest)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 1
        return result.stderr.splitlines()[-1]

    assert TRANSFORMERS_RANGE in last_line("4.50.3")
    assert TRANSFORMERS_RANGE not in last_line("5.23.0")  # something else is wrong, and is said as it is
