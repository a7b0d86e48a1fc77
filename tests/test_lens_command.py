"""`ponder-hf lens` from its command line to what it prints and writes."""

import io
import json
import sys

import checkpoints
import prepared
import pytest
from checkpoints import run
from transformers import AutoModelForCausalLM, AutoTokenizer

import ponder_hf
from ponder_hf.cli.lens import MEASURES
from ponder_hf.lenses import MEASURES as OF_LIBRARY


TEXT = "once upon a time there was one cat"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    return checkpoints.save_base_and_model(tmp_path_factory.mktemp("lens command"))


@pytest.fixture
def expected(made_once):
    """What the library says of the model in the folder `model`."""
    model = AutoModelForCausalLM.from_pretrained(made_once / "model")
    tokenizer = AutoTokenizer.from_pretrained(made_once / "model")

    def look(text=TEXT, **settings):
        return ponder_hf.lens(model, tokenizer, text, name=str(made_once / "model"), **settings).to_dict()

    return look


def test_the_measures_are_the_library_s():
    assert tuple(OF_LIBRARY) == MEASURES


def test_all_numbers_as_json(made_once, capsys, expected):
    assert run("lens", made_once / "model", "--prompt", TEXT, "--json") == 0
    assert json.loads(capsys.readouterr().out) == expected()
    flags = ["--continue", 3, "--max-tokens", 4, "--pondering-steps", 4, "--top-tokens", 2]
    exits = ["--pondering-exit-criterion", "kl", "--pondering-exit-threshold", 0.5]
    assert run("lens", made_once / "model", "--prompt", TEXT, "--json", *flags, *exits) == 0
    output = capsys.readouterr()
    settings = {"max_new_tokens": 3, "max_tokens": 4, "pondering_steps": 4, "top_tokens": 2}
    assert json.loads(output.out) == expected(**settings, exit_thresholds={"kl": 0.5})
    assert "--pondering-steps is 4, and" in output.err
    assert "were never trained" in output.err


def test_a_text_from_a_file_and_from_standard_input(made_once, tmp_path, capsys, expected, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT + "\n", encoding="utf-8")
    assert run("lens", made_once / "model", "--file", tmp_path / "text.txt", "--json") == 0
    assert json.loads(capsys.readouterr().out) == expected()
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert run("lens", made_once / "model", "--prompt", "-", "--json") == 0
    assert json.loads(capsys.readouterr().out) == expected()


def test_the_table_and_two_models(made_once, capsys):
    assert run("lens", made_once / "model", made_once / "base", "--prompt", TEXT, "--measure", "rank") == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.count("rank of the token that came next") == 2
    assert [line.count("pass") for line in output.out.splitlines() if line.startswith("  token")] == [3, 1]
    assert run("lens", made_once / "model", made_once / "base", "--prompt", TEXT, "--json") == 0
    looks = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [look["pondering_steps"] for look in looks] == [2, 0]


def test_files_are_written_and_not_replaced_unasked(made_once, tmp_path, capsys):
    page, maps = tmp_path / "page.html", tmp_path / "maps.png"
    command = ["lens", made_once / "model", "--prompt", TEXT, "--html", page, "--png", maps]
    assert run(*command) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [f"wrote {page}", f"wrote {maps}"]
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert maps.read_bytes().startswith(b"\x89PNG")
    before = checkpoints.listing(tmp_path)
    assert set(before) == {"page.html", "maps.png"}
    assert run(*command) == 2
    assert "exists: give another name, or --overwrite" in capsys.readouterr().err
    assert checkpoints.listing(tmp_path) == before
    assert run(*command, "--overwrite", "--pondering-steps", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pondering_steps"] == 0
    assert checkpoints.listing(tmp_path) != before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --prompt, --file and --data, the text to look at (see"),
        (["--prompt", "a", "--file", "b"], "the text to look at; here are --prompt and --file (see"),
        (["--data", "b", "--continue", "3"], "--continue goes with --prompt or --file"),
        (["--prompt", "b", "--max-blocks", "3"], "--max-blocks goes with --data"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--prompt", " "], "the text is empty"),
        (["--file", "missing.txt"], "cannot read missing.txt: No such file"),
        (["--file", "latin.txt"], "latin.txt is not UTF-8 text: convert it"),
        (["--file", "empty.txt"], "the text is empty"),
        (["--prompt", TEXT, "--html", "."], "--html writes a file, and . is a folder"),
        (["--prompt", TEXT, "--png", "no/maps.png"], "cannot write no/maps.png: there is no folder no"),
        (["--prompt", TEXT, "--pondering-exit-threshold", "1"], "--pondering-exit-threshold go together"),
        (["--prompt", TEXT, "--continue", "-1"], "--continue must be at least 0, got -1"),
        (["--prompt", TEXT, "--top-tokens", "0"], "--top-tokens must be at least 1, got 0"),
        (["--prompt", TEXT, "--pondering-steps", "-1"], "--pondering-steps must be an integer >= 0"),
        (["--prompt", TEXT, "--measure", "ranks"], "invalid choice: 'ranks'"),
        (["--prompt", "cat " * 65], "a lens looks at 64 by itself: give --max-tokens"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(made_once, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    before = checkpoints.listing(tmp_path)
    assert run("lens", made_once / "model", *flags) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert message in output.err
    assert checkpoints.listing(tmp_path) == before


def test_a_text_that_no_figure_can_show(tmp_path, capsys):
    """Nothing is written then, also not what could be."""
    checkpoints.save_base(tmp_path / "base", "llama", tokenizer=True, max_position_embeddings=512)
    flags = ["--html", tmp_path / "page.html", "--png", tmp_path / "maps.png"]
    assert run("lens", tmp_path / "base", "--prompt", "cat " * 401, *flags) == 2
    assert "at most 400 tokens, and here are 401: give --max-tokens" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_third_model_and_two_in_one_figure_are_refused(made_once, capsys):
    model = made_once / "model"
    assert run("lens", model, model, model, "--prompt", TEXT) == 2
    assert "one or two models, got 3" in capsys.readouterr().err
    assert run("lens", model, model, "--prompt", TEXT, "--png", "maps.png") == 2
    assert "--png draws one model" in capsys.readouterr().err


def test_what_is_not_installed_is_said_before_anything_is_done(tmp_path):
    """In a process of its own, in which nothing has imported it."""
    program = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
from ponder_hf.cli import main
sys.exit(main(["lens", "nowhere", "--prompt", "a", "--png", "maps.png"]))
"""
    result = prepared.run([sys.executable, "-c", program], cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "ponder-hf: error: matplotlib is needed for --png: pip install 'ponder-hf[viz]'\n"
