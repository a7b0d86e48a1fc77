"""examples/evidence: runs that can be killed, and tables that say what was measured."""

import collections
import json
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


EVIDENCE = Path(__file__).resolve().parents[1] / "examples" / "evidence"
sys.path.insert(0, str(EVIDENCE))  # its files import each other by their bare names, as scripts do

checkpoint, decoding, page, report, run, runs, training = map(
    __import__, "checkpoint decoding page report run runs training".split()
)

BASE = runs.Run("base", "tiny", steps=3, layers=1, width=32, batch=2, evaluate_every=2, constant_rate=True)
PLAIN = replace(BASE, label="plain", steps=6, base=BASE, constant_rate=False)
GATED = replace(PLAIN, label="gated", pondering_steps=2, **runs.gated(rate=10.0), dropout=0.1)
DRAWN = replace(
    PLAIN, label="drawn", pondering_steps=2, sampled=((0.5, (1.0, 1.0)), (1.0, (0.0, 0.0, 1.0))), base=None
)
FED_BACK = replace(PLAIN, label="fed-back", pondering_steps=2, feeds_back_hidden_state=True)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A table of tiny runs on a text that needs no file."""
    text = bytes(random.Random(0).choices(b"to be or not to be", k=3000))
    tensors = tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text[:2000], text[2000:]))
    table = [PLAIN, GATED, DRAWN, FED_BACK, *(runs.with_seed(each, 1) for each in (PLAIN, GATED))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "read_text", lambda *_: tensors)
        patch.setitem(runs.TABLES, "tiny", table)
        yield tensors


def measure(folder, *more):
    run.main(["tiny", "--results", str(folder), "--threads", str(torch.get_num_threads()), *more])
    return report.read_results(folder)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Where the tiny table has been measured."""
    folder = tmp_path_factory.mktemp("evidence") / "results"
    torch.manual_seed(0)  # as before each test, since dropout draws from it
    measure(folder)
    return folder


@pytest.fixture
def results(folder):
    return report.read_results(folder)


def test_a_killed_run_comes_to_the_same_numbers(results, tmp_path, monkeypatch, capsys):
    again, take_step, left = tmp_path / "again", training.Training.take_step, [0]

    def dies(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return take_step(self)

    monkeypatch.setattr(training.Training, "take_step", dies)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    for _ in range(100):  # two steps and a kill, again and again
        left[0] = 2
        try:
            measure(again)
            break
        except KeyboardInterrupt:
            assert not list(again.glob("*.partial"))
    assert "goes on from step 2" in capsys.readouterr().err
    assert report.read_results(again) == results
    assert not list((again / "work").glob("*.checkpoint"))


def test_what_is_done_is_not_done_again(results, folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "Training", None)
    left = folder / "work/tiny-plain-seed0.checkpoint"  # of a run that was killed when its result was there
    left.touch()
    assert measure(folder) == results
    assert not left.exists()
    assert measure(folder, "--list") == results
    assert capsys.readouterr().out.count("done") == 4 + 2 + 2  # with a base for each seed
    assert (
        run.with_all_fields({"label": "a", "text": "b", "steps": 1, "base": None}) == runs.Run("a", "b", 1).as_json()
    )
    monkeypatch.setitem(runs.TABLES, "tiny", [replace(PLAIN, learning_rate=1.0)])
    with pytest.raises(SystemExit, match="of another run than its name means"):
        measure(folder)


def test_a_result_says_what_was_measured(results, folder):
    result = results["tiny-gated-seed0"]
    assert result["run"] == GATED.as_json()
    assert result["tokens"] == 6 * 2 * runs.BLOCK
    assert [point["step"] for point in result["curve"]] == [0, 2, 4, 6]
    assert [len(point["losses"]) for point in result["curve"]] == [3, 3, 3, 3]
    assert result["losses_by_steps"][:3] == result["curve"][-1]["losses"]
    assert len(result["losses_by_steps"]) == 5
    assert result["gate"]["mean_absolute"] > 0
    base, start = results["tiny-base-seed0"]["curve"][-1]["losses"], result["curve"][0]["losses"]
    assert start == pytest.approx(base * 3, abs=1e-5)  # the gate is closed at first
    assert set(result["machine"]) == {"processor", "threads", "python", "torch", "transformers", "ponder_hf"}
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.json")]
    assert not any(str(Path.home()) in text or str(folder) in text for text in texts)


def test_arithmetic_is_counted_by_the_passes_that_ran(results):
    layer = 12 * 32 * 32 + 13 * 32 + 2 * 32  # four matrices, their biases, three norms
    one_pass, product = 2 * layer + 4 * runs.BLOCK * 32, 2 * 256 * 32
    passes = {0: one_pass + product, 1: 2 * one_pass + 3 * product, 2: 3 * one_pass + 5 * product}
    drawn = [training.steps_at(DRAWN, step) for step in range(6)]
    assert drawn[3:] == [2, 2, 2]
    assert set(drawn[:3]) <= {0, 1}
    for name, steps in (("plain", [0] * 6), ("drawn", drawn)):
        expected = 3 * 2 * runs.BLOCK * sum(passes[each] for each in steps)
        assert results[f"tiny-{name}-seed0"]["training_flops"] == expected


def test_steps_are_drawn_as_often_as_asked():
    drawn = replace(DRAWN, steps=2000, sampled=((1.0, (5, 5, 10, 80)),))
    counts = collections.Counter(training.steps_at(drawn, step) for step in range(2000))
    assert [counts[steps] / 2000 for steps in range(4)] == pytest.approx([0.05, 0.05, 0.1, 0.8], abs=0.03)
    assert training.steps_at(drawn, 5) == training.steps_at(drawn, 5)


def test_the_gate_has_a_rate_of_its_own_and_no_decay():
    model = training.make_model(GATED)
    groups = training.make_optimizer(replace(GATED, weight_decay=0.3), model).param_groups
    (gate,) = (group for group in groups if group["params"][0] is model.pondering_gate.weight)
    others = [group for group in groups if group is not gate]
    assert (gate["rate"], gate["weight_decay"]) == (10 * GATED.learning_rate, 0)
    assert [group["weight_decay"] for group in others] == [0, 0.3]
    assert {group["rate"] for group in others} == {GATED.learning_rate}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_steps_and_seeds_see_their_own_places():
    text = torch.tensor(random.Random(0).choices(range(100), k=5000) + [200] * 5000, dtype=torch.uint8)
    alike = {"text_bytes": 5000, "base": None}
    chosen = [replace(PLAIN, **alike), runs.with_seed(replace(PLAIN, **alike), 1), replace(PLAIN, text_bytes=5000)]
    batches = [training.batch_at(each, text, step) for each in chosen for step in range(4)]
    assert torch.equal(batches[3], batches[8])  # the first step after a base of three
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 11
    assert max(batch.max().item() for batch in batches) < 100


def test_rates_warm_up_and_fall_to_a_tenth():
    long = replace(PLAIN, steps=100, warmup=0.1)
    rates = [training.rate_at(long, step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert training.rate_at(replace(long, constant_rate=True), 99) == 1


def test_passes_of_all_kinds_begin_with_the_plain_model(tiny):
    rows = tiny[1][: 4 * runs.BLOCK].view(4, -1).long()
    plain = training.held_out_losses(training.make_plain(PLAIN), rows, 0)
    for other in (replace(DRAWN, base=None), FED_BACK):
        losses = training.held_out_losses(training.make_model(other), rows, 2)
        assert losses[0] == pytest.approx(plain[0], abs=1e-5)
        assert len(set(losses)) == 3


def test_families_differ_and_learn():
    ids = torch.arange(runs.BLOCK).view(1, -1)
    for family in ("gpt_neox", "llama", "gpt2"):
        model = training.make_model(replace(GATED, family=family, dropout=0.0))
        assert model.config.base_config.model_type == family
        training.loss_of(model, ids, 1).backward()
        assert model.pondering_gate.weight.grad.abs().max() > 0


def test_gates_start_as_asked():
    started = {
        name: training.make_model(replace(GATED, **settings)).pondering_gate.weight
        for name, settings in (
            ("half", {"gate_start": 0.5}),
            ("signs", {"gate_start": 0.5, "gate_signs": True}),
            ("matrix", {"gate_matrix": True}),
        )
    }
    assert set(started["half"].tolist()) == {0.5}
    assert set(started["signs"].tolist()) == {0.5, -0.5}
    assert started["matrix"].shape == (32, 32)
    assert not started["matrix"].any()


def test_a_name_means_one_run():
    named = {}
    for table in runs.TABLES.values():
        for each in run.with_bases(table):
            assert named.setdefault(each.name, each) == each


def test_the_report_says_what_the_results_say(results, folder, capsys, tmp_path):
    report.main([str(folder), "tiny", "--plots", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    lines = [
        line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ") and "---" not in line
    ]
    rows = {line[0]: dict(zip(lines[0], line, strict=False)) for line in lines[1:]}
    assert list(rows) == ["plain", "gated", "drawn", "fed-back"]
    last = {name: result["curve"][-1]["losses"][-1] for name, result in results.items()}
    pair = [last["tiny-gated-seed0"], last["tiny-gated-seed1"]]
    assert rows["gated"]["seeds"] == "2"
    assert rows["gated"]["loss"] == f"{sum(pair) / 2:.3f} ± {abs(pair[0] - pair[1]) / 2:.3f}"
    gains = [last[f"tiny-plain-seed{seed}"] - last[f"tiny-gated-seed{seed}"] for seed in (0, 1)]
    assert rows["gated"]["gain"].startswith(f"{sum(gains) / 2:+.3f} ± ")
    assert rows["drawn"]["loss"] == f"{last['tiny-drawn-seed0']:.3f}"
    assert rows["drawn"]["tokens"] == f"{6 * 2 * runs.BLOCK:,}"
    assert rows["plain"]["tokens"] == f"{9 * 2 * runs.BLOCK:,}"  # with its base
    by_steps = re.sub(r"\*", "", rows["drawn"]["S = 0, 1, ..."]).split()
    assert by_steps == [f"{loss:.3f}" for loss in results["tiny-drawn-seed0"]["losses_by_steps"]]
    curves = [
        [point["losses"][-1] for point in results[f"tiny-{name}-seed0"]["curve"]] for name in ("fed-back", "plain")
    ]
    assert rows["fed-back"]["most behind"] == f"{max(a - b for a, b in list(zip(*curves, strict=True))[1:]):+.3f}"
    assert not rows["drawn"]["gain"]  # it has no base, so nothing here is its control
    assert (tmp_path / "plots" / "tiny.svg").stat().st_size > 1000


def test_decoding_is_measured_and_reported(folder, tiny, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(folder, tmp_path / "results")  # whose files get one more entry
    monkeypatch.setattr(decoding, "read_text", lambda name, folder: tiny)
    monkeypatch.setattr(decoding, "DRAFTED", (2, 5))
    monkeypatch.setattr(decoding, "EXITING", (3, 4))
    monkeypatch.setattr(decoding, "EXIT_THRESHOLDS", (0.0, 1e9))
    decoding.main(["tiny", "--results", str(folder), "--threads", str(torch.get_num_threads())])
    results = report.read_results(folder)
    assert [name for name, result in results.items() if "decoding" in result] == [
        "tiny-drawn-seed0",
        "tiny-gated-seed0",
        "tiny-gated-seed1",
    ]
    measured = results["tiny-gated-seed0"]["decoding"]
    assert 1 <= measured["ticks"] <= 4
    assert 0 <= measured["acceptance"] <= 1
    never, always = measured["exits"]
    assert (never["passes"], never["agree"]) == (3, 1)
    assert always["passes"] == 2  # pass 1 is the first that has another one before it
    capsys.readouterr()
    report.main([str(folder), "tiny"])
    assert f"| {measured['ticks']:.2f} | 3.00 100%, 2.00 {always['agree']:.0%} |" in capsys.readouterr().out


def test_worth_in_layers_finds_the_law_that_made_the_losses(monkeypatch):
    shapes = [(layers, 0) for layers in (1, 2, 4, 8, 16)] + [(layers, steps) for layers in (1, 2) for steps in (1, 3)]
    table = [replace(BASE, label=f"{each}", layers=each[0], pondering_steps=each[1]) for each in shapes]
    monkeypatch.setitem(runs.TABLES, "tiny", table)
    losses = {
        each.name: 3 - 0.5 * torch.tensor(each.layers * (each.pondering_steps + 1) ** 0.46).log().item()
        for each in table
    }
    results = {
        each.name: {
            "name": each.name,
            "run": json.loads(json.dumps(each.as_json())),
            "curve": [{"losses": [losses[each.name]]}],
        }
        for each in table
    }
    found = report.exponents(results, "tiny")
    assert [each["exponent"] for each in found] == pytest.approx([0.46] * 4, abs=1e-6)
    assert "(S + 1)^0.46, standard error 0.00" in report.worth("tiny", results)
    assert report.worth_in_layers(2.0, {1: 3.0, 2: 2.5}) is None


def test_the_page_and_the_readme_say_what_the_results_say():
    page.main(["--check"])


def test_a_page_out_of_date_is_noticed(monkeypatch):
    results = report.read_results(EVIDENCE / "results")
    for name, result in results.items():
        if name.startswith("shakespeare-2layers-S3-"):
            result["curve"][-1]["losses"][-1] += 0.01
    monkeypatch.setattr(page, "read_results", lambda folder: results)
    with pytest.raises(SystemExit, match=r"evidence.md, README.md, evidence.svg: not what the results say"):
        page.main(["--check"])


def test_figures_of_a_page(results):
    figures = page.Figures(results)
    last = {name: result["curve"][-1]["losses"][-1] for name, result in results.items()}
    pair = [last["tiny-gated-seed0"], last["tiny-gated-seed1"]]
    gains = [last[f"tiny-plain-seed{seed}"] - last[f"tiny-gated-seed{seed}"] for seed in (0, 1)]
    assert page.filled("a {loss tiny/gated} b", figures) == f"a {sum(pair) / 2:.3f} b"
    assert figures.gain("tiny/gated", "tiny/plain") == f"{sum(gains) / 2:+.3f}"
    assert figures.spread("tiny/gated", "tiny/plain") == f"{abs(gains[0] - gains[1]) / 2:.3f}"
    assert figures.gain0("tiny/gated", "tiny/plain") == f"{gains[0]:+.3f}"
    assert figures.share("tiny/gated", "tiny/plain", "tiny/gated") == "100 %"
    middle = (
        results["tiny-gated-seed0"]["curve"][1]["losses"][-1],
        results["tiny-gated-seed1"]["curve"][1]["losses"][-1],
    )
    assert figures.loss("tiny/gated", "2") == f"{sum(middle) / 2:.3f}"
    with pytest.raises(KeyError, match="tiny/none has not been measured"):
        page.filled("{loss tiny/none}", figures)


@pytest.mark.parametrize("name", ["tiny-gated-seed0", "tiny-plain-seed0"])
def test_a_model_becomes_a_checkpoint(folder, tiny, results, tmp_path, name):
    checkpoint.main([name, str(tmp_path / "out"), "--results", str(folder)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("to be")["input_ids"] == list(b"to be")
    rows = tiny[1][: len(tiny[1]) // runs.BLOCK * runs.BLOCK].view(-1, runs.BLOCK).long()
    losses = training.held_out_losses(model, rows, 2 * ("gated" in name))
    assert losses[-1] == pytest.approx(report.last_losses(results[name])[-1], abs=1e-6)
    with pytest.raises(SystemExit, match="is no run of bytes"):
        checkpoint.main(["tiny-fed-back-seed0", str(tmp_path / "other"), "--results", str(folder)])
    assert not (tmp_path / "other").exists()
