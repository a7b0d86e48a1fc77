"""What the README says is run: its commands and its code; and the commands and the tree of two pages of docs/."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ponder_hf import PonderingForCausalLM
from ponder_hf.cli import main


ROOT = Path(__file__).resolve().parents[1]
README, COMMANDS, DESIGN = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/commands.md", "docs/design.md")
)
TEXT = "Once upon a time there was a small model that thought before it spoke.\nIt thought again, and then it wrote.\n"


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(block):
    """The command lines of a block, without comments."""
    return [line for line in (line.split("#")[0].strip() for line in block.splitlines()) if line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder in which the README's Hub ids are local folders, with a tiny base and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text.txt").write_text(TEXT * 3, encoding="utf-8")
    base = tmp_path / "EleutherAI" / "pythia-70m"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=tiny.VOCAB_SIZE, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
    tiny.base_model("gpt_neox", max_position_embeddings=128).save_pretrained(base)
    return tmp_path


def test_there_are_the_blocks_that_these_tests_run():
    assert len(blocks("python")) == 2
    assert [commands(block)[0].split()[0] for block in blocks("bash")] == ["make"]
    assert len(commands(blocks("bash", COMMANDS)[0])) > 8


def test_it_is_one_screen():
    assert len(README.splitlines()) < 90


def test_the_code_runs_as_it_stands(folder, monkeypatch, capsys):
    def push(self, repository, **arguments):  # the Hub is not there: a folder of that name is
        self.save_pretrained(repository, **arguments)

    monkeypatch.setattr(PonderingForCausalLM, "push_to_hub", push)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(folder / "your-name" / "pondering-pythia-70m")
    assert loaded.config.pondering_steps == 3


def test_the_page_of_the_model_runs_as_it_stands(folder, capsys):
    (block,) = blocks("python", (ROOT / "docs/model.md").read_text(encoding="utf-8"))
    exec(compile(block, "docs/model.md", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out


def test_the_first_block_has_ten_lines():
    lines = [line for line in blocks("python")[0].splitlines() if line and "import" not in line]
    assert len(lines) <= 10


def test_the_command_lines_run_as_they_stand(folder, capsys):
    for line in commands(blocks("bash", COMMANDS)[0]):
        assert main(shlex.split(line)[1:]) == 0, line
    assert (folder / "plain-pythia-70m" / "model.safetensors").exists()
    assert "Once upon a time" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands(blocks("bash")[0]))
def test_the_two_commands_are_what_make_runs(command):
    """`make -n` says what it would run; the demo itself is run by test_demo.py, the tests by this very run."""
    environment = {**os.environ, "MAKEFLAGS": ""}
    done = subprocess.run([*command.split(), "-n"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"make demo": "ponder-hf demo", "make test": "-m pytest"}[command] in done.stdout


def test_every_path_in_the_tree_exists():
    tree = re.search(r"## What is where\n+```\n(.*?)```", DESIGN, flags=re.DOTALL)[1]
    names, parent = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        parent = "" if not line.startswith(" ") else parent
        names.append(parent + name)
        parent = name if name.endswith("/") and not line.startswith(" ") else parent
    assert len(names) > 8
    assert [name for name in names if not (ROOT / name).exists()] == []
    top = {path.name + "/" for path in ROOT.iterdir() if path.is_dir() and (path / "").exists()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    folders = {name.split("/")[0] + "/" for name in tracked if "/" in name and not name.startswith(".")} & top
    assert folders <= set(names)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
