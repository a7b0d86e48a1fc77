"""Tasks by lm-evaluation-harness, from items on this machine: the same numbers as its own command gives."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import checkpoints
import prepared
import pytest
import torch
from checkpoints import change_tensors, run
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from ponder_hf import PonderingForCausalLM, evaluate_tasks
from ponder_hf.evaluation import tasks_table
from ponder_hf.evaluation.published import published_averages
from ponder_hf.evaluation.tasks import items
from ponder_hf.hub import card as card_module
from ponder_hf.hub.card_results import write_results


CHOICES = [
    {"query": "Question: who sat by the sea", "choices": ["one cat", "two dogs"], "gold": 0},
    {"query": "Question: who sat upon a time", "choices": ["the dogs who sat", "one"], "gold": 1},
    {"query": "Question: once", "choices": ["upon a time there was one cat", "sea"], "gold": 0},
]
WINOGRANDE = [
    {"context_options": ["one cat sat by", "two dogs sat by"], "continuation": "the sea.", "gold": 1},
    {"context_options": ["there was a", "there was the"], "continuation": "time", "gold": 0},
]
LAMBADA = [{"context": "once upon a", "continuation": "time"}, {"context": "two dogs by the", "continuation": "sea"}]


def requests(without_question=()):
    for doc_id, item in enumerate(CHOICES):
        for number, shift in ((doc_id, 0), *(((doc_id + 1_000_000), 1),) * bool(without_question)):
            for index, choice in enumerate(item["choices"]):
                context = "Answer:" if shift else item["query"] + "\nAnswer:"
                request = {"context": context, "continuation": f" {choice}"}
                yield {"doc_id": number, "idx": index, "label": item["gold"], "request": request}


def write(path, rows):
    text = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = checkpoints.save_base_and_model(tmp_path_factory.mktemp("made"))
    (folder / "items").mkdir()
    write(folder / "items/piqa.jsonl", CHOICES)
    write(folder / "items/winogrande.jsonl.gz", WINOGRANDE)
    write(folder / "items/lambada_openai.jsonl", LAMBADA)
    write(folder / "items/sciq-1k.requests.jsonl.gz", requests(without_question=True))
    write(folder / "items/own.jsonl", CHOICES)
    return folder


# Items: need no harness


def test_both_formats_give_the_same_items(made):
    folder = made / "items"
    assert items.names(folder) == ["lambada_openai", "own", "piqa", "sciq-1k", "winogrande"]
    plain = items.load(items.find(folder, "piqa"), after_query="\nAnswer:")
    assert items.load(items.find(folder, "sciq")) == plain
    assert plain[0] == {"context": CHOICES[0]["query"] + "\nAnswer:", "choices": ["one cat", "two dogs"], "gold": 0}
    assert items.load(items.find(folder, "winogrande")) == WINOGRANDE
    assert items.find(folder, "race") is None
    assert items.read(str(folder), "piqa")["test"].num_rows == 3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "x"}], "line 1 of .* is in neither format of items .its fields: question"),
        ([CHOICES[0], {"query": "x"}], "line 2 of .* is in neither format"),
        ([{**CHOICES[0], "gold": 2}], "the right choice is 2, of 2 choices"),
        ([{**CHOICES[0], "choices": ["one", 2]}], "is no text"),
        ([{**CHOICES[0], "choices": ["one"]}], "at least two choices"),
        ([], "has no items"),
        ([["a list"]], "in neither format"),
        ([{"request": {"context": "a"}, "doc_id": 0}], "in neither format"),
        ([{"request": {"context": "a", "continuation": "b"}, "doc_id": 0}], "begins without a space"),
    ],
)
def test_items_that_cannot_be_used(tmp_path, rows, says):
    write(tmp_path / "piqa.jsonl", rows)
    with pytest.raises(items.ItemsError, match=says):
        items.load(tmp_path / "piqa.jsonl")


def test_items_of_the_real_sets(shared):
    folder = shared / "data/eval"
    counts = {"piqa": 1838, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172, "sciq": 1000}
    counts |= {"hellaswag": 1000, "lambada_openai": 5153}
    assert {name: len(items.load(items.find(folder, name))) for name in counts} == counts


def test_published_averages():
    assert [each["average"] for each in published_averages("EleutherAI/pythia-1b")] == [50.4, 50.6]
    assert all(each["source"] for each in published_averages("zeng123/PonderingPythia-2.8B"))
    assert published_averages("somebody/else") == []


# The harness


@pytest.fixture
def evaluated(made, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (ponder-hf[eval])")
    monkeypatch.chdir(made)

    def evaluate(source, tasks, *words):
        capsys.readouterr()
        assert run("eval", source, "--tasks", tasks, "--tasks-from", "items", *words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return evaluate


def by_hand(made, steps):
    """Accuracies of the choices by the definition: the sum of the log-probabilities of the choice's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = PonderingForCausalLM.from_pretrained(made / "model")
    right = []
    for item in CHOICES:
        context = tokenizer(item["query"] + "\nAnswer:", add_special_tokens=False)["input_ids"]
        scores = []
        for choice in item["choices"]:
            ids = context + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids]), pondering_steps=steps).logits[0].log_softmax(-1)
            scores.append(sum(logits[at - 1, ids[at]].item() for at in range(len(context), len(ids))))
        right.append(scores.index(max(scores)) == item["gold"])
    return sum(right) / len(right)


def test_a_curve_over_the_passes(made, evaluated, capsys):
    result = evaluated("model", "piqa,sciq,own", "--pondering-steps", "0,1,2")
    for steps in (0, 1, 2):
        expected = by_hand(made, steps)
        assert result["tasks"]["piqa"][str(steps)]["acc"] == pytest.approx(expected)
        assert result["tasks"]["sciq"][str(steps)] == result["tasks"]["piqa"][str(steps)]
    assert result["harness"]["version"]
    assert result["num_items"] == {"piqa": 3, "sciq": 3, "own": 3}
    rows = [line.split() for line in tasks_table([result]).splitlines()]
    assert rows[0] == ["S", "task", "shots", "items", "metric", "value"]
    assert ["0", "piqa", "0", "3", "acc"] in [row[:5] for row in rows]
    plain = evaluated("base", "piqa")
    assert plain["tasks"]["piqa"] == result["tasks"]["piqa"]["0"]


HARNESS = """
import sys
from lm_eval.__main__ import cli_evaluate

sys.argv[0] = "lm_eval"
cli_evaluate()
"""


@pytest.mark.slow
def test_the_harness_own_command_gives_the_same_numbers(made, evaluated, tmp_path):
    tasks = "winogrande,piqa,sciq,lambada_openai"
    found = evaluated("model", tasks, "--pondering-steps", 1)["tasks"]
    include = tmp_path / "tasks"  # without ponder_hf above it, as for somebody who has only the files
    include.mkdir()
    for path in Path(items.__file__).parent.iterdir():
        if path.is_file():
            (include / path.name).write_bytes(path.read_bytes())
    model_args = f"pretrained={made / 'model'},trust_remote_code=True,pondering_steps=1"
    command = [sys.executable, "-W", "ignore", "-c", HARNESS, "run", "--model", "hf", "--model_args", model_args]
    command += ["--include_path", str(include), "--metadata", json.dumps({"items_folder": str(made / "items")})]
    command += ["--tasks", tasks, "--device", "cpu", "--batch_size", "1", "--output_path", str(tmp_path / "out")]
    result = prepared.run(command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("*.json")
    results = json.loads(file.read_text())["results"]
    for name, metrics in found.items():
        theirs = {key.removesuffix(",none"): value for key, value in results[name].items()}
        assert metrics == {key: theirs[key] for key in metrics}
        assert {key for key in theirs if "acc" in key} <= set(metrics)


def test_batch_size_and_padding_change_nothing(evaluated, monkeypatch):
    """On a CPU to the last digit. Where rows do go together, as on a GPU, those of one length do, without padding."""
    from ponder_hf.evaluation import harness_model

    tasks = "piqa,winogrande,lambada_openai"
    one, many = (evaluated("model", tasks, "--batch-size", size)["tasks"] for size in (1, 4))
    assert one == many
    batches, call = [], harness_model.UnpaddedModel._model_call
    monkeypatch.setattr(
        harness_model.UnpaddedModel, "_model_call", lambda self, rows: batches.append(rows) or call(self, rows)
    )
    monkeypatch.setattr(harness_model, "rows_at_once", lambda model, batch_size: batch_size)
    many = evaluated("model", tasks, "--batch-size", 4)["tasks"]
    for name, metrics in one.items():
        assert metrics == pytest.approx(many[name], rel=1e-5)
    assert max(map(len, batches)) > 1
    pad = 0  # what the harness pads with
    assert not any((rows[:, -1] == pad).any() for rows in batches)


def test_python_hears_nothing_that_it_did_not_ask_for(made, capfd, monkeypatch):
    """Neither bars nor what the harness prints by itself, such as git's complaint where no repository is."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (ponder-hf[eval])")
    monkeypatch.chdir(made)
    model, tokenizer = PonderingForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    capfd.readouterr()
    found = evaluate_tasks(model, "lambada_openai", tasks_from="items", tokenizer=tokenizer)
    assert capfd.readouterr() == ("", "")
    assert evaluate_tasks("model", "lambada_openai", tasks_from="items", progress=True)["tasks"] == found["tasks"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "evaluating: 100%" in err
    assert "fatal" not in err


def test_shots_and_limit(evaluated):
    result = evaluated("model", "piqa", "--num-fewshot", 1, "--limit", 2)
    assert result["num_fewshot"] == {"piqa": 1}
    assert result["num_items"] == {"piqa": 2}


def test_a_killed_run_goes_on(made, evaluated, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    whole = evaluated("model", "piqa,winogrande")
    calls, call = [], HFLM._model_call

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4 and not is_second:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    is_second = False
    monkeypatch.setattr(HFLM, "_model_call", counted)
    words = ("eval", "model", "--tasks", "piqa,winogrande", "--tasks-from", "items", "--json")
    assert run(*words) == 130
    first, is_second = len(calls), True
    calls.clear()
    assert evaluated("model", "piqa,winogrande")["tasks"] == whole["tasks"]
    needed = len(calls)
    calls.clear()
    evaluated("model", "piqa,winogrande")  # what is done is not kept
    assert needed == len(calls) - (first - 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model", "--tasks", "pica", "--tasks-from", "items"], " or piqa?"),
        (["model", "--tasks", "piqa", "--tasks-from", "nowhere"], "there is no folder nowhere"),
        (["model", "--tasks", "arc_easy", "--tasks-from", "bad"], "is in neither format of items"),
        (["bare", "--tasks", "piqa", "--tasks-from", "items"], "has no tokenizer"),
        (["model", "--tasks", "piqa"], "the Hub does not give it"),
        (["model", "--tasks", ","], "names no task"),
        (["model", "--tasks", "piqa", "--tasks-from", "items", "--num-fewshot", "3"], "lower --num-fewshot"),
        (["model", "--tasks", "piqa", "--tasks-from", "items", "--limit", "0"], "--limit must be at least 1"),
        (["model", "--tasks", "piqa", "--tasks-from", "items", "--pondering-steps", "-1"], "--pondering-steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(made, evaluated, capsys, words, says):
    (made / "bad").mkdir(exist_ok=True)
    write(made / "bad/arc_easy.jsonl", [{"question": "x"}])
    PonderingForCausalLM.from_pretrained("model").save_pretrained("bare")
    capsys.readouterr()
    assert run("eval", *words) == 2
    out, err = capsys.readouterr()
    last = err.replace("\r", "\n").splitlines()[-1]
    assert (out, last.startswith("ponder-hf: error: ")) == ("", True)
    assert says in last


def test_items_that_are_longer_than_the_model(made, evaluated, capsys):
    """Of a question the beginning is cut off, with a warning; an answer must fit."""
    (made / "long").mkdir(exist_ok=True)
    question = "Question: " + " ".join(["once"] * 80)
    write(made / "long/piqa.jsonl", [CHOICES[0], {**CHOICES[1], "query": question}])
    write(made / "long/sciq.jsonl", [{**CHOICES[1], "choices": ["one", question]}])
    assert run("eval", "model", "--tasks", "piqa", "--tasks-from", "long") == 0
    warning = "warning: 2 of 4 questions with their answers are longer than the 64 tokens that the model reads"
    assert warning in capsys.readouterr().err
    assert run("eval", "model", "--tasks", "sciq", "--tasks-from", "long") == 2
    assert "error: an answer of the task sciq has 82 tokens, more than the 64" in capsys.readouterr().err


def test_nan_answers_no_question(made, evaluated, capsys):
    """An accuracy would come out all the same; nor may the answers be kept for a second run."""
    shutil.copytree(made / "model", made / "spoiled")
    change_tensors(made / "spoiled", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    for tasks in ("piqa", "lambada_openai", "piqa"):
        assert run("eval", "spoiled", "--tasks", tasks, "--tasks-from", "items", "--json") == 2
        out, err = capsys.readouterr()
        assert (out, "spoiled predicts NaN: get its weights again, or use --dtype float32" in err) == ("", True)


def test_untrained_passes_are_warned_of(evaluated, made, capsys):
    assert run("eval", "model", "--tasks", "piqa", "--tasks-from", "items", "--pondering-steps", "1,3") == 0
    out, err = capsys.readouterr()
    assert "warning: --pondering-steps is 3, and model was trained with 2" in err
    assert "lm-evaluation-harness" in out


RESULT = {
    "tasks": {"piqa": {"0": {"acc": 0.5, "acc_stderr": 0.1}, "1": {"acc": 0.75, "acc_stderr": 0.1}}},
    "pondering_steps": [0, 1],
    "num_fewshot": {"piqa": 5},
    "num_items": {"piqa": 3},
    "items_from": None,
    "harness": {"name": "lm-evaluation-harness", "version": "0.4.13"},
}


def test_results_stand_in_the_card(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    for _ in range(2):  # the second time replaces them
        write_results(tmp_path / "model", RESULT)
    card = ModelCard.load(tmp_path / "model/README.md")
    found = card.data.eval_results
    assert [(each.dataset_type, each.metric_value, each.metric_args) for each in found] == [
        ("piqa", 0.5, {"pondering_steps": 0}),
        ("piqa", 0.75, {"pondering_steps": 1}),
    ]
    assert found[0].source_name == "lm-evaluation-harness 0.4.13"
    assert found[0].dataset_args == {"num_few_shot": 5, "num_items": 3}
    write_results(tmp_path / "model", {**RESULT, "num_fewshot": {"piqa": 0}})
    text = (tmp_path / "model/README.md").read_text()
    assert len(ModelCard(text).data.eval_results) == 4
    # A push brings the card up to date and leaves them where they are.
    merged = card_module.merge(card_module.render(card_module.facts_of_folder(tmp_path / "model")), text)
    assert len(ModelCard(merged).data.eval_results) == 4


def test_only_a_folder_has_a_card_here(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert run("eval", "somebody/model", "--tasks", "piqa", "--card") == 2
    assert "--card writes into a folder" in capsys.readouterr().err


def test_without_the_harness_one_line_says_what_brings_it(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.chdir(made)
    assert run("eval", "model", "--tasks", "piqa") == 2
    assert "pip install 'ponder-hf[eval]'" in capsys.readouterr().err
