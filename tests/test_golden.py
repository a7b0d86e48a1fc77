"""Checkpoints that earlier versions wrote load for good, and a format that is too new is refused in words."""

import ast
import json
import re
import shutil
from pathlib import Path

import checkpoints
import elsewhere
import pytest
import tiny
import transformers
from compat import abilities
from golden import __main__ as golden
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ponder_hf import PonderingError, PonderingForCausalLM, __version__
from ponder_hf.hub.code import code_of, releases, sha256
from ponder_hf.modeling.configuration_pondering import FORMAT_VERSION


GOLDEN = Path(__file__).with_name("golden")
RELEASES = sorted(path for path in GOLDEN.iterdir() if path.name[0].isdigit())
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))

MAX_BYTES = 500_000  # two checkpoints, and their code once it is released

NEWER_FORMAT = """
from transformers import AutoConfig, AutoModelForCausalLM

for auto_class in (AutoConfig, AutoModelForCausalLM):
    try:
        auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ValueError as error:
        print(error)
"""


def name_of(folder):
    return folder.relative_to(GOLDEN).as_posix()


def test_this_version_and_every_release_have_golden_checkpoints():
    assert {path.name for path in RELEASES} == {*releases(), __version__}
    for release in RELEASES:
        assert len(list(release.glob("*/config.json"))) == 2
        assert sum(path.stat().st_size for path in release.rglob("*") if path.is_file()) < MAX_BYTES


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
@pytest.mark.parametrize("ability", abilities.MEASURED)
def test_this_library_computes_what_was_computed_then(folder, ability):
    model, report = PonderingForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    abilities.compare(abilities.measure(model, ability), load_file(folder.with_suffix(".safetensors")), ability)


@pytest.mark.parametrize("release", RELEASES, ids=name_of)
def test_so_does_the_code_that_they_bring(release, tmp_path):
    """Of a version that is not released yet: today's."""
    version, release = release.name, shutil.copytree(release, tmp_path / "release")
    checkpoints_of_release = sorted(path.parent for path in release.glob("*/config.json"))
    code = code_of(release / golden.CODE) if version in releases() else None
    for folder in checkpoints_of_release:
        golden.add_code(folder, code)
    text = "".join(path.read_text(encoding="utf-8") for path in release.glob("*/pondering_*.py"))
    oldest, newest = ast.literal_eval(re.search(r"^OLDEST, NEWEST = (.+)$", text, re.MULTILINE).group(1))
    installed = tuple(map(int, transformers.__version__.split(".")[:2]))
    expectation = "supported" if oldest <= installed <= newest else "refused"
    program = Path(abilities.__file__).read_text(encoding="utf-8")
    (tmp_path / "copies").mkdir()
    report = json.loads(elsewhere.run(program, tmp_path / "home", release, tmp_path / "copies", expectation))
    problems = [found for outcome in report["outcomes"].values() for found in outcome.values() if found]
    assert problems + report["deprecations"] == []
    assert set(report["outcomes"]["loading"]) == {folder.name for folder in checkpoints_of_release}


@pytest.mark.parametrize("release", RELEASES, ids=name_of)
def test_the_code_beside_them_is_that_of_their_release(release):
    """Of one that is not released yet: none, as it would have to change with every line of it."""
    folder = release / golden.CODE
    found = {name: sha256(content) for name, content in code_of(folder).items()} if folder.exists() else {}
    assert found == releases().get(release.name, {})


def test_the_comparison_sees_other_weights(tmp_path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "copy")
    checkpoints.change_tensors(folder, lambda tensors: tensors["backbone.gpt_neox.final_layer_norm.bias"].add_(0.01))
    found = abilities.measure(PonderingForCausalLM.from_pretrained(folder), "logits")
    with pytest.raises(AssertionError, match="last pass"):
        abilities.compare(found, load_file(FOLDERS[0].with_suffix(".safetensors")), "logits")


def test_a_newer_format_is_refused_in_words(tmp_path):
    tiny.pondering_model().save_pretrained(tmp_path / "checkpoint")
    checkpoints.change_config(tmp_path / "checkpoint", pondering_format_version=FORMAT_VERSION + 1)
    words = f"`pondering_format_version` is {FORMAT_VERSION + 1}, but this code reads formats up to {FORMAT_VERSION}"
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(PonderingError, match=re.escape(words)):
            auto_class.from_pretrained(tmp_path / "checkpoint")
    lines = elsewhere.run(NEWER_FORMAT, tmp_path / "home", tmp_path / "checkpoint").splitlines()
    assert len(lines) == 2
    assert all(line.startswith(words) for line in lines)
