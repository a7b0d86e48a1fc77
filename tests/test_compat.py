"""`make compat` itself: what it pins, and that it sees what goes wrong. It installs nothing here."""

import json
import re
import shutil
from pathlib import Path

import checkpoints
import elsewhere
import pytest
from compat import __main__ as compat
from compat import abilities, environments
from golden import __main__ as golden

from ponder_hf.modeling.pondering_errors import NEWEST, OLDEST, is_supported


REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("golden")


def minor(version):
    return tuple(map(int, version.split(".")[:2]))


def test_the_ends_of_the_range_and_a_version_below_are_pinned():
    versions = [pins["transformers"] for pins in environments.read_pins().values() if "torch" not in pins]
    supported = [version for version in versions if is_supported(version)]
    assert (minor(supported[0]), minor(supported[-1])) == (OLDEST, NEWEST)
    assert minor(versions[0]) < OLDEST
    assert versions == sorted(versions, key=lambda version: tuple(map(int, version.split("."))))


def test_the_newest_is_what_the_other_tests_run_with():
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    newest = environments.chosen_versions(["newest"]).popitem()[1]
    for name, version in newest.items():
        pinned = re.search(rf"^{name}==(\S+)", constraints, re.MULTILINE)
        assert pinned.group(1) == version


def test_which_versions_are_chosen():
    pins = environments.read_pins()
    known = [name for name in pins if not name.startswith("torch-")]
    assert environments.chosen_versions([]) == pins
    assert list(environments.chosen_versions(["newest", "oldest", known[0]])) == [known[-1], known[1], known[0]]
    assert [pins[name]["torch"] for name in pins if name not in known] == ["2.6.0", "2.15.0"]
    with pytest.raises(environments.EnvironmentFailed, match=r"no transformers 3\.0"):
        environments.chosen_versions(["3.0"])


def test_the_latest_is_what_the_index_has(monkeypatch):
    answers = [json.dumps({"name": "transformers", "versions": ["6.1.0", "6.0.0"]})]
    # What asks the package index, which a test may not.
    monkeypatch.setattr(environments, "_run", lambda command: answers[0])
    assert environments.chosen_versions(["latest"]) == {"latest": {"transformers": "6.1.0"}}


def test_the_oldest_torch_is_the_one_that_the_package_asks_for():
    requirement = re.search(r'"torch>=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"torch-{requirement.group(1)}.0" in environments.read_pins()


def test_a_spoiled_checkpoint_is_seen(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "golden") / "0.2.0"
    shutil.rmtree(folder / "llama")
    golden.add_code(folder / "gpt_neox")
    checkpoints.change_tensors(
        folder / "gpt_neox", lambda tensors: tensors["backbone.gpt_neox.final_layer_norm.bias"].add_(0.01)
    )
    code = folder / "gpt_neox/pondering_vocabulary_loss.py"
    code.write_text(
        code.read_text(encoding="utf-8") + "\n\nimport warnings\n\nwarnings.warn('this is old', FutureWarning)\n"
    )
    (tmp_path / "copies").mkdir()
    program = Path(abilities.__file__).read_text(encoding="utf-8")
    report = json.loads(elsewhere.run(program, tmp_path / "home", folder, tmp_path / "copies", "supported"))
    outcomes = {ability: found["gpt_neox"] for ability, found in report["outcomes"].items()}
    assert outcomes["loading"] is None
    assert outcomes["logits"].startswith("AssertionError: logits: ")
    assert outcomes["training"].startswith("AssertionError: training: ")
    assert report["deprecations"] == ["FutureWarning: this is old"]


FINE = {"loading": {"llama": None}}
VERSIONS = {"transformers": "5.0.0", "huggingface-hub": "1.3.7", "tokenizers": "0.22.2", "torch": "2.13.0"}
REPORTS = {
    "another version": ({"versions": {**VERSIONS, "tokenizers": "9"}, "outcomes": FINE}, "it imports"),
    "an ability": ({"versions": VERSIONS, "outcomes": {"loading": {"llama": "KeyError: x"}}}, "NO: llama"),
    "a deprecation": ({"versions": VERSIONS, "outcomes": FINE, "deprecations": ["old"]}, "NO: all"),
}


def test_what_a_version_lacks_and_says_so_is_no_failure():
    found = {
        "loading": {"llama": None},
        "drafts": {"llama": None, "gpt2": abilities.REFUSED},
        "batching": {"llama": abilities.REFUSED, "gpt2": abilities.REFUSED},
    }
    texts, problems = compat.cells("5.0.0", found)
    assert not problems
    words = [texts[compat.COLUMNS.index(column)] for column in found]
    assert words == ["yes", "yes; gpt2 refused in words", "refused in words"]


@pytest.mark.parametrize("case", REPORTS)
def test_what_fails_is_in_the_table_and_in_the_exit_code(case, monkeypatch, capsys):
    report, words = REPORTS[case]
    printed = json.dumps({"deprecations": [], **report})
    monkeypatch.setattr(compat, "build", lambda pins, folder: "python")
    monkeypatch.setattr(compat, "read_back", lambda copies: {"llama": None})
    monkeypatch.setattr(compat, "write", lambda folder, name: None)
    monkeypatch.setattr(compat.elsewhere, "run", lambda *arguments, **keywords: printed)
    assert compat.main(["5.0.0"]) == 1
    output = capsys.readouterr()
    assert "| 5.0.0 | 1.3.7 | 0.22.2 | " in output.out
    assert words in output.out + output.err


def test_an_environment_that_cannot_be_made_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compat, "write", lambda folder, name: None)
    monkeypatch.setattr(environments.sys, "executable", shutil.which("false"))
    assert compat.main(["--environments", str(tmp_path / "none"), "5.0.0"]) == 1
    assert "| 5.0.0 | 1.3.7 | 0.22.2 |  | NO |" in capsys.readouterr().out
