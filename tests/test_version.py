"""Older versions of transformers are refused in words, and newer ones are used with a warning and a self-check."""

import copy
import json
import logging
import os
import re
import sys
from pathlib import Path

import checkpoints
import elsewhere
import prepared
import pytest
import tiny
import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.modeling.pondering_errors import NEWEST, OLDEST, TRANSFORMERS_RANGE, is_supported, is_tested
from ponder_hf.modeling.pondering_generate_wave import Wave


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
# The same model under a version that is newer than all that were tested. Arguments: the folder, the version to say,
# and a second checkpoint. Prints the tokens that it generates, and what it found out about caches. The version is said
# before anything of transformers is used, which imports itself anew while a model is loaded.
USE = """
import json
import torch
import transformers

transformers.__version__ = sys.argv[2]
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
ids = torch.arange(3, 23).view(2, 10)
settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
exit = dict(pondering_exit_criterion="kl", pondering_exit_threshold=0.05)
ways = [{}, dict(use_cache=False), dict(num_draft_tokens=2), exit]
tokens = [model.generate(ids, **settings, **way).tolist() for way in ways]
print(json.dumps([*tokens, getattr(model, "_caches_work", None)]))
"""
# Importing the library, under one version after another, where transformers has no masking_utils, as before 4.53; or
# the configuration where it has nothing at all. Arguments: the repository, the versions. Prints how each import ended.
IMPORT = """
import os
import sys
import traceback
import transformers

sys.modules["transformers.masking_utils"] = None
"""
IMPORT_FROM_STUB = """
import os
import sys
import traceback
import types

transformers = sys.modules["transformers"] = types.ModuleType("transformers")
sys.path.insert(0, sys.argv[1])
"""
FOR_EACH_VERSION = """
for transformers.__version__ in sys.argv[2:]:
    if os.fork():
        os.wait()
        continue
    try:
        import MODULE
        print("imported", flush=True)
    except Exception as error:
        print(traceback.format_exception_only(error)[-1].rstrip().splitlines()[-1], flush=True)
    os._exit(0)
"""


@pytest.fixture
def pretend(monkeypatch):
    """A function that makes transformers say another version."""
    # By name: transformers puts another module object in its place when it first loads a model.
    return lambda version: monkeypatch.setattr("transformers.__version__", version)


@pytest.fixture
def newer(pretend):
    """transformers that says it is newer than all that were tested; the warning has been given already or not."""
    logger = logging.getLogger("transformers.pondering")
    had = getattr(logger, "has_warned", False)
    logger.has_warned = False
    tiny.base_model()  # transformers puts another module object in its place when it first loads a model
    pretend("5.31.0")
    yield "5.31.0"
    logger.has_warned = had


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("4.9.0", "refused"),
        ("4.56.2", "refused"),
        ("4.57.0", "tested"),
        ("4.57.6", "tested"),
        ("5.0.0", "tested"),
        ("5.0.0rc1", "tested"),
        ("5.24.0", "tested"),
        ("5.24.7", "tested"),
        ("5.24.0+local", "tested"),
        ("5.24.1.post1", "tested"),
        ("5.24.0.dev0", "tested"),
        ("5.25.0.dev0", "used"),
        ("5.100.0", "used"),
        ("6.2.0", "used"),
        ("unknown", "used"),
    ],
)
def test_what_becomes_of_versions(version, expected):
    assert (is_supported(version), is_tested(version)) == (expected != "refused", expected == "tested")


def test_the_installation_takes_newer_versions_and_the_code_names_the_tested_ones():
    requirement = re.search(r'"transformers(>=[^"]*)"', (REPOSITORY / "pyproject.toml").read_text()).group(1)
    assert requirement == ">=5.0"
    assert f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}" == TRANSFORMERS_RANGE
    constraints = (REPOSITORY / "constraints.txt").read_text()
    assert f"transformers=={NEWEST[0]}.{NEWEST[1]}." in constraints


def test_a_checkpoints_own_code_refuses_what_is_too_old(tmp_path):
    tiny.pondering_model().save_pretrained(tmp_path / "checkpoint")
    lines = elsewhere.run(LOAD, tmp_path / "home", tmp_path / "checkpoint", "4.56.2").splitlines()
    expected = (
        f"transformers 4.56.2 is outside {TRANSFORMERS_RANGE}, the range that this code is tested with, and too old "
        f'for it: pip install "transformers{TRANSFORMERS_RANGE}"'
    )
    assert lines == [expected] * 3
    patch = elsewhere.run(LOAD, tmp_path / "another", tmp_path / "checkpoint", "5.24.99").splitlines()
    assert patch == ["loaded"] * 3


@pytest.mark.parametrize("version", ["5.31.0", "6.2.0"])
def test_a_checkpoints_own_code_runs_on_newer_versions(tmp_path, version):
    for name, model_type in (("checkpoint", "llama"), ("another", "gpt_neox")):
        torch.manual_seed(0)
        tiny.pondering_model(model_type, pondering_steps=2).save_pretrained(tmp_path / name)
    arguments = (tmp_path / "checkpoint", version, tmp_path / "another")
    output, errors = elsewhere.run_and_read(USE, tmp_path / "home", *arguments)
    *tokens, caches_work = json.loads(output)
    assert caches_work is True
    assert tokens[0] == tokens[1] == tokens[2]
    tested = json.loads(elsewhere.run(USE, tmp_path / "home 2", arguments[0], "5.24.0", arguments[2]))
    assert [*tokens, None] == tested
    warnings = [line for line in errors.splitlines() if "newer than" in line]
    assert len(warnings) == 1, errors
    assert f"transformers {version} is newer than {TRANSFORMERS_RANGE}" in warnings[0]


def test_the_library_refuses_what_is_too_old(tmp_path, pretend):
    base = tiny.base_model()
    PonderingForCausalLM.from_base(base).save_pretrained(tmp_path)
    pretend("4.56.2")
    with pytest.raises(PonderingError, match=re.escape(TRANSFORMERS_RANGE)):
        PonderingForCausalLM.from_base(base)
    with pytest.raises(PonderingError, match=re.escape(TRANSFORMERS_RANGE)):
        PonderingForCausalLM.from_pretrained(tmp_path)


def generated(model, **settings):
    ids = torch.arange(3, 23).view(2, 10)
    return model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)


EXIT = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.05}


def test_a_model_checks_itself_once_and_is_left_as_it_was(newer):
    model = tiny.pondering_model("llama", pondering_steps=2)
    model.train()
    model.backbone.model.norm.eval()  # as somebody may have frozen it
    settings, passes = model.generation_config, []
    model.backbone.model.register_forward_hook(lambda *_: passes.append(1))
    first = generated(model)
    assert len(passes) > 6 * 3
    passes.clear()
    assert torch.equal(generated(model), first)
    assert len(passes) == 6 * 3  # one of each of six tokens: nothing is checked again
    assert model.training
    assert not model.backbone.model.norm.training
    assert model.generation_config is settings


def broken_cache(monkeypatch, error=None):
    def update(self, key_states, value_states, *args, **kwargs):
        if error is not None:
            raise error
        return key_states, value_states  # forgets what was before

    monkeypatch.setattr(DynamicLayer, "update", update)


@pytest.mark.parametrize("error", [None, TypeError("update() got an unexpected keyword argument 'pages'")], ids=str)
def test_where_only_the_cache_is_wrong_generation_goes_without(newer, monkeypatch, caplog, error):
    model = tiny.pondering_model("llama", pondering_steps=2)
    expected = generated(copy.deepcopy(model), use_cache=False)
    broken_cache(monkeypatch, error)
    caplog.set_level("WARNING")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert torch.equal(generated(model), expected)
    assert torch.equal(generated(model, use_cache=True), expected)
    (line,) = [record.getMessage() for record in caplog.records if "cache does not work" in record.getMessage()]
    assert "under transformers 5.31.0, which is newer than what this code is tested with" in line
    for settings, name in (({"num_draft_tokens": 2}, "num_draft_tokens"), (EXIT, "pondering_exit_threshold")):
        with pytest.raises(PonderingError, match=f"`{name}` needs a cache, which does not work under transformers"):
            generated(model, **settings)
    with pytest.raises(PonderingError, match="continuous batching needs a cache, which does not work"):
        model.generate_batch([[5, 6, 7]])


def test_where_the_backbone_is_another_it_is_said(newer, monkeypatch, tmp_path):
    model = tiny.pondering_model("llama", pondering_steps=2)
    model.save_pretrained(tmp_path)
    embed = type(model.backbone.model).forward

    def forward(self, *args, inputs_embeds=None, input_ids=None, **kwargs):
        if inputs_embeds is None:  # it scales its embeddings now
            inputs_embeds = 3 * self.embed_tokens(input_ids)
        return embed(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(type(model.backbone.model), "forward", forward)
    words = r"it does more between tokens and logits than embedding, decoder and head; under transformers 5\.31\.0"
    model = PonderingForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(PonderingError, match=words):
        generated(model)
    with pytest.raises(PonderingError, match=words):
        model(torch.tensor([[3, 4]]))


def test_where_generate_is_another_it_is_said(newer, monkeypatch):
    model = tiny.pondering_model("llama", pondering_steps=2)
    prepare = GenerationMixin.prepare_inputs_for_generation

    def backwards(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {**inputs, "input_ids": inputs["input_ids"].flip(1)}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", backwards)
    with pytest.raises(PonderingError, match="`generate` does not give what the model predicts: pip install"):
        generated(model)


def test_where_exits_or_drafts_are_others_they_are_refused(newer, monkeypatch):
    model = tiny.pondering_model("llama", pondering_steps=2)
    generated(model)
    decoder = type(model.backbone.model)
    forward, tick = decoder.forward, Wave.tick

    def mixing_rows(self, *args, inputs_embeds, **kwargs):
        return forward(self, *args, inputs_embeds=inputs_embeds + inputs_embeds.mean(0, keepdim=True), **kwargs)

    with monkeypatch.context() as changed:  # so that a row is another one when others have left
        changed.setattr(decoder, "forward", mixing_rows)
        with pytest.raises(PonderingError, match=r"`pondering_exit_threshold` does not work under transformers 5\.31"):
            generated(model, **EXIT)
    with monkeypatch.context() as moved:
        # A transformers that calls `_sample` by another name.
        moved.setattr(PonderingForCausalLM, "_sample", GenerationMixin._sample)
        with pytest.raises(PonderingError, match="nothing was drafted, as transformers took another way"):
            generated(model, num_draft_tokens=2)

    def other_logits(wave, pending):
        *places, logits = tick(wave, pending)
        return *places, logits.flip(-1)

    monkeypatch.setattr(Wave, "tick", other_logits)
    with pytest.raises(PonderingError, match=r"`num_draft_tokens` does not work under transformers 5\.31"):
        generated(model, num_draft_tokens=2)


@pytest.mark.parametrize("command", ["convert base out", "generate pondering --prompt cat", "export pondering out"])
def test_the_command_line_refuses_what_is_too_old(check_refused, pretend, command):
    pretend("4.56.2")
    line = check_refused(*command.split(), words=[TRANSFORMERS_RANGE])
    assert line.startswith("transformers 4.56.2 is outside ")


@pytest.mark.parametrize(("version", "is_good"), [("4.56.2", False), ("5.31.0", True)])
def test_doctor_still_reports(pretend, monkeypatch, capsys, version, is_good):
    pretend(version)
    monkeypatch.setattr("ponder_hf.diagnosis.metadata.version", lambda name: version)
    assert checkpoints.run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["transformers"]["good_for_checkpoints"] is is_good
    assert report["transformers"]["tested"] is False
    assert any(TRANSFORMERS_RANGE in problem for problem in report["problems"])


@pytest.mark.skipif(os.name != "posix", reason="starts a process for each version by a fork")
@pytest.mark.parametrize(
    ("program", "module"),
    [(IMPORT, "ponder_hf"), (IMPORT_FROM_STUB, "modeling.configuration_pondering")],
    ids=["library", "stub"],
)
def test_a_version_that_lacks_what_is_imported_is_named(tmp_path, program, module):
    program += FOR_EACH_VERSION.replace("MODULE", module)
    command = [sys.executable, "-c", program, str(REPOSITORY), "4.50.3", "6.2.0", "5.24.0"]
    result = prepared.run(command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    old, new, tested = result.stdout.splitlines()
    assert TRANSFORMERS_RANGE in old
    assert re.search(rf"6\.2\.0 is newer than {TRANSFORMERS_RANGE}, .* lacks what it needs \(.+\): pip", new)
    assert tested != "imported"
    assert TRANSFORMERS_RANGE not in tested  # something else is wrong, and is said as it is
