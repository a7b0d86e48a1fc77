"""`--tasks paper` by name from a Hub: the harness's own task files, data sets under the names that it asks for."""

import json

import checkpoints
import hub_server
import pytest
from hub_client import connected

from ponder_hf.evaluation import PAPER_TASKS


CHOICES = ["one cat", "two dogs", "the sea", "a time"]
ARC = {"question": "who sat", "choices": {"text": CHOICES, "label": ["A", "B", "C", "D"]}, "answerKey": "C"}
SCIQ = {"support": "once upon a time", "question": "who sat by the sea", "correct_answer": "one cat"}
SCIQ |= {f"distractor{number}": words for number, words in enumerate(CHOICES[1:], start=1)}
WINOGRANDE = {"sentence": "one cat sat by _ who sat", "option1": "the sea", "option2": "two dogs", "answer": "1"}
HELLASWAG = {"ctx_a": "once upon a time.", "ctx_b": "one cat", "activity_label": "Sea"}
HELLASWAG |= {"endings": CHOICES, "label": "2"}
PROBLEM = {"question": "who sat by  _  .", "options": CHOICES, "answer": "B"}
ALL_SPLITS = ["train", "validation", "test"]
# Each data set: its configurations, and of each the splits that the task's file names, with one kind of item.
DATA_SETS = {
    "EleutherAI/lambada_openai": ({"default": ["test"]}, {"text": "once upon a time there was one cat"}),
    "cimec/lambada": ({"default": ["validation", "test"]}, {"text": "two dogs sat by the sea"}),
    "baber/piqa": (
        {"default": ["train", "validation"]},
        {"goal": "sat by the sea", "sol1": CHOICES[0], "sol2": CHOICES[1], "label": 1},
    ),
    "allenai/winogrande": ({"winogrande_xl": ["train", "validation"]}, WINOGRANDE),
    "allenai/ai2_arc": ({"ARC-Easy": ALL_SPLITS, "ARC-Challenge": ALL_SPLITS}, ARC),
    "allenai/sciq": ({"default": ALL_SPLITS}, SCIQ),
    "Rowan/hellaswag": ({"default": ["train", "validation"]}, HELLASWAG),
    "EleutherAI/race": ({"high": ["test"]}, {"article": "one cat sat.", "problems": repr([PROBLEM, PROBLEM])}),
}
ITEMS = 3


def make_data_set(folder, configurations, item):
    """As data sets lie on the Hub: JSON lines, and a card that says which file is which split."""
    listed = []
    for name, splits in configurations.items():
        files = [{"split": split, "path": f"{name}/{split}.jsonl"} for split in splits]
        listed.append({"config_name": name, "data_files": files})
        (folder / name).mkdir(parents=True)
        for each in files:
            rows = [{**item, "number": number} for number in range(ITEMS)]  # no two are equal
            (folder / each["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (ponder-hf[eval])")
    return checkpoints.save_base_and_model(tmp_path_factory.mktemp("made"))


@pytest.fixture
def hub(tmp_path):
    with hub_server.serving() as running:
        for name, (configurations, item) in DATA_SETS.items():
            folder = tmp_path / "elsewhere" / name  # a folder of that name where the client runs would be read itself
            make_data_set(folder, configurations, item)
            running.add(f"datasets/{name}", folder)
        yield running


@pytest.mark.slow
def test_the_nine_tasks_by_name(made, hub, tmp_path):
    """All of them are found, under these names, with examples before the questions, and averaged."""
    with connected(hub, tmp_path) as client:
        words = ["eval", made / "model", "--tasks", "paper", "--limit", 2, "--pondering-steps", 1]
        result = client.json(*words, "--num-fewshot", 1)
        assert list(result["tasks"]) == list(PAPER_TASKS)
        assert all("acc" in metrics for metrics in result["tasks"].values())
        assert set(result["num_fewshot"].values()) == {1}
        assert set(result["num_items"].values()) == {2}
        assert result["items_from"] is None
        code, out, err = client.command(*words)
        assert code == 0, err
        assert "on average over the nine tasks (acc)" in out
    asked = " ".join(path for _, path in hub.requests)
    assert all(f"/api/datasets/{name}" in asked for name in DATA_SETS)


def test_a_hub_that_does_not_give_them(made, hub, tmp_path):
    hub.fail("GET", "baber/piqa", times=10_000, status=500)
    hub.fail("POST", "baber/piqa", times=10_000, status=500)
    with connected(hub, tmp_path) as client:
        line = client.refused("eval", made / "model", "--tasks", "piqa")
        assert "the data of a task is not in the cache, and the Hub does not give it" in line
        line = client.refused("eval", made / "model", "--tasks", "piqa,race,pica")
        assert "did you mean" in line
        assert "piqa" in line
