"""The demo, from its options to the folder that it writes, and the training functions that it stands on."""

import contextlib
import copy
import dataclasses
import html
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from small_tokenizer import train_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from ponder_hf import PonderingForCausalLM, evaluation
from ponder_hf.cli import main
from ponder_hf.data.blocks import Blocks
from ponder_hf.demo import Options, corpus, experiment, load_and_run, prepare, report, run, separate_process, words
from ponder_hf.demo.figure import draw_png
from ponder_hf.demo.simple_training import Run, train
from ponder_hf.evaluation import evaluate_passes


SENTENCES = [
    f"The {a} {b} {c} the {d}.\n"
    for a in ("old", "red")
    for b in ("cat", "dog", "bird")
    for c in ("saw", "ate")
    for d in ("fish", "sun", "moon")
]
STORY = "".join(SENTENCES[(7 * index * index) % len(SENTENCES)] for index in range(400))


def call(*arguments):
    """Run one command line: (exit code, standard output, standard error)."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    return code, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What one `ponder-hf demo --quick --json` wrote: (results, folder, standard error)."""
    folder = tmp_path_factory.mktemp("demo") / "ponder-demo"
    code, output, errors = call("demo", "--quick", "--output", folder, "--json")
    assert code == 0, errors
    return json.loads(output), folder, errors


def blocks_of_ids(rows, length, seed=0):
    return Blocks(tiny.token_ids(rows, length, seed=seed).int())


# Training functions


def plain_passes(model, blocks):
    """The loss of each pass by ten lines of pondering and the definition of the mean, one row at a time."""
    losses = []
    for steps in range(model.config.pondering_steps + 1):
        total = 0.0
        for row in blocks.rows.long():
            logits = tiny.plain_pondering(model.backbone, row[None], steps)
            total += functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").item()
        losses.append(total / (len(blocks) * (blocks.rows.shape[1] - 1)))
    return losses


@pytest.mark.parametrize("limit", [1, 30, 1 << 24], ids=["one row", "some rows", "all rows"])
def test_evaluate_passes_is_the_mean_over_all_tokens(monkeypatch, limit):
    # The real bounds take more tokens than a test should; what is one batch and what are several cannot be seen else.
    monkeypatch.setitem(evaluation.text._TOKENS_AT_ONCE, "cpu", limit)
    model = tiny.pondering_model("gpt2", base_changes={"embd_pdrop": 0.5}, pondering_steps=2)
    blocks = blocks_of_ids(7, 9)
    with torch.no_grad():
        expected = plain_passes(model, blocks)
    model.train()
    found = evaluate_passes(model, blocks)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3
    assert model.training
    assert evaluate_passes(model.backbone, blocks) == pytest.approx(expected[:1], abs=1e-5)


def test_train_sees_every_block_once_in_order_and_learns():
    model = tiny.base_model()
    model.config.use_cache = True
    blocks = blocks_of_ids(12, 8)
    before = copy.deepcopy(model.state_dict())
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()) if module.training else None,
        with_kwargs=True,
    )
    record = train(
        model,
        blocks,
        held_out=blocks,
        evaluate_every=3,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=2,
        use_cpu=True,
    )
    hook.remove()
    assert torch.equal(torch.cat(seen), blocks.rows.long())
    assert [step for step, _ in record.passes] == [0, 3, 6]
    assert record.passes[-1][1][0] < record.passes[0][1][0]
    assert [step for step, _ in record.losses] == [2, 4, 6]
    assert record.tokens_per_step == 16
    assert len(record.step_seconds) == 6
    assert not model.training
    assert model.config.use_cache
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Text, split and plan


def test_standard_library_is_split_into_disjoint_files():
    chosen = corpus.standard_library(200_000)
    training_names = {document.name for document in chosen.training}
    held_out_names = {document.name for document in chosen.held_out}
    assert training_names
    assert held_out_names
    assert not training_names & held_out_names
    assert chosen.training_characters <= 200_000
    assert not any(re.search("(^|/)(tests?|site-packages)/", name) for name in training_names | held_out_names)
    assert [document.name for document in corpus.standard_library(200_000).training] == [
        document.name for document in chosen.training
    ]


def test_many_documents_are_split_whole(tmp_path):
    path = tmp_path / "many.jsonl"
    texts = [f"{line} Number {index % 300}." for index, line in enumerate(SENTENCES * 25)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts), encoding="utf-8")
    chosen = corpus.own_text([path], "text", 10**6)
    training_texts, held_out_texts = (
        [document.text for document in side] for side in (chosen.training, chosen.held_out)
    )
    assert sorted(training_texts + held_out_texts) == sorted(texts)
    assert not set(training_texts) & set(held_out_texts)
    assert 0.01 < len(held_out_texts) / len(texts) < 0.12


def test_few_documents_give_their_ends(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    chosen = corpus.own_text([path], "text", 10**6)
    (beginning,), (end,) = chosen.training, chosen.held_out
    assert beginning.text + end.text == STORY
    assert 0.03 < len(end.text) / len(STORY) < 0.07
    assert beginning.text.endswith("\n")


def test_own_text_stops_at_the_limit(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    chosen = corpus.own_text([path, tmp_path / "never read"], "text", 1000)
    assert "".join(document.text for document in (*chosen.training, *chosen.held_out)) == STORY[:1000]


def small_setup(tmp_path, **options):
    """A Setup that is smaller still than --quick, of a short story."""
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    options = Options(output=str(tmp_path / "out"), text=(str(path),), quick=True, **options)
    setup = prepare.prepare(options)
    return dataclasses.replace(
        setup, size=dataclasses.replace(setup.size, base_steps=6, steps=4, batch_size=4, evaluations=1)
    )


@pytest.mark.parametrize("content", ["", "a<s> <|endoftext|>\r\n\t  é 漢字 🎉 don't", "".join(map(chr, range(300)))])
def test_every_byte_is_a_token_and_every_text_comes_back(tmp_path, content):
    corpus.byte_tokenizer(64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == tokenizer.vocab_size == 256
    assert tokenizer(content)["input_ids"] == list(content.encode())
    assert tokenizer.decode(list(content.encode())) == content
    assert tokenizer.decode(list(content.encode()), skip_special_tokens=True) == content
    assert tokenizer.eos_token_id is None
    assert tokenizer.model_max_length == 64


def test_operations_are_those_of_the_weights_that_a_token_meets():
    plain, tied = tiny.base_model("gpt_neox"), tiny.base_model("gpt2")
    head = plain.get_output_embeddings().weight.numel()
    layers = plain.num_parameters() - 2 * head
    assert experiment.operations_per_token(plain) == 6 * (layers + head)
    pondering = PonderingForCausalLM.from_base(plain, pondering_steps=3, pondering_gate="zero_init")
    assert experiment.operations_per_token(pondering) == 6 * (4 * (layers + head) + 3 * head)
    assert experiment.operations_per_token(tied) == 6 * tied.num_parameters()


def test_schedule_is_cut_until_it_fits(tmp_path, monkeypatch):
    setup = small_setup(tmp_path)
    setup = dataclasses.replace(setup, text_blocks=40, size=dataclasses.replace(setup.size, base_steps=160, steps=96))
    seconds = {"plain": 0.01, "pondering": 0.05}
    monkeypatch.setattr(
        experiment,
        "_step_seconds",
        lambda model, size, repeats: seconds["pondering" if isinstance(model, PonderingForCausalLM) else "plain"],
    )
    full = experiment.make_schedule(setup)
    assert (full.base_steps, full.steps, full.text_blocks, full.share) == (160, 96, 40, 1)
    pondering = PonderingForCausalLM.from_base(copy.deepcopy(setup.base), pondering_steps=3)
    ratio = experiment.operations_per_token(pondering) / experiment.operations_per_token(setup.base)
    assert full.longer_steps == round(96 * ratio)
    slower = setup.size.budget_seconds / full.seconds
    seconds.update(plain=0.01 * slower, pondering=0.05 * slower)
    assert experiment.make_schedule(setup).share == 1
    seconds.update(plain=0.012 * slower, pondering=0.06 * slower)
    cut = experiment.make_schedule(setup)
    assert (cut.base_steps, cut.steps, cut.text_blocks, cut.share) == (120, 72, 40, 0.75)
    assert cut.seconds <= setup.size.budget_seconds
    seconds.update(plain=1e6, pondering=1e6)
    assert experiment.make_schedule(setup).steps >= 8
    chosen = dataclasses.replace(setup, options=dataclasses.replace(setup.options, steps=77))
    schedule = experiment.make_schedule(chosen)
    assert (schedule.base_steps, schedule.steps, schedule.text_blocks, schedule.share) == (160, 77, 40, 1)


def small_schedule(**changes):
    plan = {"base_steps": 6, "steps": 4, "longer_steps": 9, "text_blocks": 12, "evaluations": 1, "threads": 1}
    return experiment.Schedule(**{**plan, "share": 1.0, "seconds": 1.0, **changes})


def bytes_of(row):
    return row.numpy().tobytes()


def test_experiment_is_fair_repeats_itself_and_leaves_out_what_would_end_too_late(tmp_path, monkeypatch):
    calls = []

    def recording(model, blocks, label, held_out, every, **arguments):
        calls.append((label.strip(), model, blocks.rows.clone(), arguments))
        return train(model, blocks, label, held_out, every, **arguments)

    monkeypatch.setattr(experiment, "train", recording)
    outcomes = []
    for seed, steps in ((3, 4), (3, None), (4, None)):  # there is no time, but where the user says how many steps
        setup = small_setup(tmp_path, seed=seed, text_blocks=12, steps=steps)
        late = dataclasses.replace(setup, size=dataclasses.replace(setup.size, budget_seconds=0.0))
        outcomes.append(experiment.run_experiment(late, small_schedule()))
    first, second, other = outcomes
    assert first.left_out == []
    assert second.left_out == other.left_out == ["more_text", "deeper", "longer"]
    assert set(second.models) == {"base", "control", "pondering"}
    names, _, rows, arguments = (dict(enumerate(column)) for column in zip(*calls[:7], strict=True))
    assert list(names.values()) == ["base", "control", "pondering", "more text", "deeper", "deeper", "longer"]
    assert torch.equal(rows[1], rows[2])
    assert arguments[1] == arguments[2] == arguments[5]
    assert torch.equal(rows[6][: len(rows[1])], rows[1])
    assert torch.equal(torch.cat([rows[4], rows[5]]), torch.cat([rows[0], rows[1]]))
    first_blocks, later_blocks = (
        {*map(bytes_of, each)} for each in setup.blocks.rows.split([12, len(setup.blocks) - 12])
    )
    assert {bytes_of(row) for row in torch.cat([rows[0], rows[1], rows[6]])} == first_blocks
    assert {bytes_of(row) for row in rows[3]} <= later_blocks
    assert arguments[1]["seed"] == 3
    models = first.models
    base, control, pondering, deeper = (models[name] for name in ("base", "control", "pondering", "deeper"))
    assert pondering.runs[0].passes[0][1] == pytest.approx([base.losses[0]] * 4, abs=1e-6)
    assert control.losses[0] < base.losses[0]
    assert control.tokens == pondering.tokens == deeper.tokens == 10 * control.runs[0].tokens_per_step
    assert models["more_text"].tokens == control.tokens
    assert models["longer"].tokens == 15 * control.runs[0].tokens_per_step
    assert base.operations < control.operations < pondering.operations
    assert deeper.parameters > 1.3 * control.parameters
    assert control.points()[0][:2] == base.points()[-1][:2]
    assert pondering.losses == second.models["pondering"].losses
    assert control.losses == second.models["control"].losses
    assert control.losses != other.models["control"].losses
    weights = dict(first.pondering.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.pondering.named_parameters())
    assert first.pondering.pondering_gate.weight.abs().max() > 0


def test_lowest_loss_is_of_its_last_run_and_never_nan():
    trained = experiment.Trained(1, 1)
    trained.runs = [Run(passes=[(0, [0.5])]), Run(passes=[(0, [3.0]), (1, [9.0, 2.0]), (2, [2.5]), (3, [math.nan])])]
    assert trained.lowest_loss == 2.0


# The whole demo


def test_results_are_whole_and_say_what_was_done(demo):
    results, folder, _ = demo
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint",
        "curves.png",
        "lens.html",
        "report.html",
        "results.json",
    ]
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    losses, lowest = results["held_out_loss"], results["lowest_loss"]
    assert 0 < losses["control"] < losses["base"] < 7
    assert losses["converted"] == pytest.approx(losses["base"], abs=1e-6)
    assert results["unit"] == "nats per byte"
    assert set(lowest) == set(words.NAMES) == set(results["arithmetic"])
    assert all(0 < lowest[name] <= losses[name] for name in lowest)
    assert results["loss_of_each_pass"]["converted"] == pytest.approx([losses["base"]] * 4, abs=1e-5)
    assert len(results["loss_of_each_pass"]["pondering"]) == 4
    assert results["loss_of_each_pass"]["pondering"][-1] == losses["pondering"]
    assert results["loss_difference"] == pytest.approx(losses["pondering"] - losses["control"])
    rates = results["tokens_per_second"]
    assert rates["ratio"] == pytest.approx(rates["control"] / rates["pondering"])
    assert rates["ratio"] > 1.5
    assert results["bits_per_byte"]["control"] == pytest.approx(losses["control"] / 0.6931, rel=1e-3)
    assert results["checkpoint"]["loss"] == pytest.approx(results["checkpoint"]["expected_loss"], abs=1e-5)
    assert results["checkpoint"]["class"].startswith("transformers_modules.")
    assert all(sample["control"] and sample["pondering"] for sample in results["samples"])
    settings = results["settings"]
    assert settings["tokens"] == settings["steps"] * 8 * 64
    assert results["text"]["tokens"] == settings["text_blocks"] * 64
    arithmetic = results["arithmetic"]
    assert arithmetic["control"] == 1
    assert arithmetic["more_text"] == 1
    assert arithmetic["longer"] == pytest.approx(arithmetic["pondering"], rel=0.02)
    assert 1.4 < arithmetic["deeper"] < 2
    drafts = results["drafts"]
    assert drafts["num_draft_tokens"] == 3
    assert drafts["same_text"] is True
    assert min(drafts["plain_seconds"], drafts["drafted_seconds"], drafts["speed"]) > 0


def test_passage_is_what_each_pass_finds_probable(demo):
    results, folder, _ = demo
    model = PonderingForCausalLM.from_pretrained(folder / "checkpoint")
    passage = results["passage"]
    ids = torch.tensor([list("".join(passage["tokens"]).encode())])
    for steps, found in enumerate(passage["probabilities"]):
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids, pondering_steps=steps).loss
        assert len(found) == ids.shape[1] - 1
        assert -sum(map(math.log, found)) / len(found) == pytest.approx(loss.item(), abs=1e-4)
    assert len(passage["probabilities"]) == 4


def test_folder_is_small_and_leaves_nothing_beside_it(demo):
    _, folder, _ = demo
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sizes["curves.png"] < 500_000
    assert sizes["report.html"] < 1_000_000
    assert sizes["lens.html"] < 1_000_000
    assert sum(sizes.values()) < 3_000_000
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_holds_the_numbers_and_needs_no_other_file(demo):
    results, folder, _ = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = html.unescape(page)
    for losses in (results["lowest_loss"].values(), *results["loss_of_each_pass"].values()):
        for loss in losses:
            assert f"{loss:.3f}" in text
    for name in results["lowest_loss"]:
        for part in ("bits_per_byte", "held_out_loss"):
            assert f"{results[part][name]:.3f}" in text
    assert text.index(words.headline(results)) < text.index(words.findings(results)[0]) < text.index("<table>")
    assert all(sentence in text for sentence in words.findings(results))
    assert f"{results['drafts']['speed']:.1f} times" in text
    assert results["repeat"] in text
    assert results["versions"]["transformers"] in text
    assert all(sample["pondering"] in text for sample in results["samples"])
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|srcset)=["']""", page)
    assert set(re.findall(r"""href=["'](?!#)(.*?)["']""", page)) == {"lens.html"}  # a link, not a part of the page
    assert page.count("<svg") == 2
    assert len(re.findall(r' id="([^"]*)"', page)) == len(set(re.findall(r' id="([^"]*)"', page)))
    assert str(folder.parent) not in json.dumps({**results, "output": ""})


def test_summary_and_progress_go_to_standard_error(demo):
    results, folder, errors = demo
    assert f"Report: {folder / 'report.html'}" in errors
    assert f'ponder-hf generate {folder / "checkpoint"} --prompt "def "' in errors
    assert words.headline(results) in errors
    assert all(sentence in errors for sentence in words.findings(results))
    assert "base     : 100%" in errors
    assert "more text: 100%" in errors


def test_checkpoint_loads_and_gives_the_held_out_loss(demo):
    results, folder, _ = demo
    model = PonderingForCausalLM.from_pretrained(folder / "checkpoint")
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint").config.pondering_steps == 3
    assert "use_cache" not in json.loads((folder / "checkpoint/config.json").read_text(encoding="utf-8"))
    setup = prepare.prepare(Options(output=str(folder.parent / "other"), quick=True))
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    content = "def f(x):\n    return x\n"
    assert tokenizer(content)["input_ids"] == setup.tokenizer(content)["input_ids"]
    found = evaluate_passes(model, setup.watched)
    assert found == pytest.approx(results["loss_of_each_pass"]["pondering"], abs=1e-5)


def test_repeat_command_is_one_that_the_parser_takes(demo):
    results, _, _ = demo
    assert results["repeat"] == "ponder-hf demo --quick --steps 24 --base-steps 40 --text-blocks 80"


def test_diverged_training_ends_with_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "check_checkpoint", lambda *args, **job: FOUND | {"texts": list(job["prompts"])})
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    sizes = {"--steps": 4, "--base-steps": 4, "--text": tmp_path / "story.txt", "--output": tmp_path / "out"}
    words = [word for pair in sizes.items() for word in pair]
    code, output, errors = call("demo", "--quick", "--json", "--learning-rate", "1e30", *words)
    assert code == 0, errors
    assert json.loads(output)["loss_difference"] is None
    assert json.loads(output)["samples"] == []
    assert "training diverged" in errors


def test_own_base_and_text(tmp_path, monkeypatch):
    """A base of another architecture in bfloat16, .jsonl text, a gate; the other process is left out for its time."""
    monkeypatch.setattr(
        run,
        "check_checkpoint",
        lambda folder, model, ids, prompts, **job: FOUND | {"texts": ["</pre>"] * len(prompts)},
    )
    rows = "".join(json.dumps({"content": line}) + "\n" for line in SENTENCES * 12)
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = train_tokenizer(STORY, tiny.VOCAB_SIZE + 141, 64)
    base = tiny.base_model("llama", dtype=torch.bfloat16, vocab_size=len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code, output, errors = call(
        *("demo", "--quick", "--json", "--output", tmp_path / "out", "--base", tmp_path / "base"),
        *("--text", tmp_path / "a.jsonl", "--text-field", "content", "--steps", 5, "--text-blocks", 2),
        *("--pondering-steps", 2, "--seed", 7),
    )
    assert code == 0, errors
    results = json.loads(output)
    assert results["base"]["model_type"] == "llama"
    assert set(results["curves"]) == {"control", "pondering", "longer", "more_text"}
    assert results["unit"] == "nats per token"
    assert results["settings"]["base_steps"] == 0
    assert results["loss_of_each_pass"]["converted"] == pytest.approx([results["held_out_loss"]["base"]] * 3, abs=1e-6)
    assert results["held_out_loss"]["control"] < results["held_out_loss"]["base"]
    assert "--text-blocks 2" in results["repeat"]
    assert "&lt;/pre&gt;" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    model = PonderingForCausalLM.from_pretrained(tmp_path / "out/checkpoint")
    assert model.dtype == torch.float32
    assert model.pondering_gate.weight.abs().max() > 0


FOUND = {
    "class": "transformers_modules.x.PonderingForCausalLM",
    "loss": 1.0,
    "expected_loss": 1.0,
    "same_bits": True,
    "drafts": None,
}


# The other process


def test_other_process_cannot_import_ponder_hf():
    program = (
        Path(load_and_run.__file__)
        .read_text(encoding="utf-8")
        .replace('if __name__ == "__main__":', "sys.meta_path.insert(0, NoPonderHf())\nimport ponder_hf\nif False:")
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ponder_hf is hidden from this process" in done.stderr
    assert "ponder_hf" not in {
        line.split(".")[0] for line in re.findall(r"^(?:from|import) (\S+)", program, re.M)[:-1]
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"loss": 1.5, "checksum": "other"}, "the saved checkpoint has the loss 1.5"),
        ({"loss": float("nan"), "checksum": "other"}, "the saved checkpoint has the loss nan"),
        ({"saw_ponder_hf": True}, "imported ponder_hf"),
    ],
)
def test_another_model_in_the_checkpoint_is_noticed(monkeypatch, answer, message):
    good = {"class": "c", "saw_ponder_hf": False, "loss": 2.0, "checksum": "same", "texts": [], "drafts": None}
    monkeypatch.setattr(separate_process, "fingerprint", lambda model, ids: (2.0, "same"))

    def pretend(answer):
        done = subprocess.CompletedProcess([], 0, f"loading\n{json.dumps(good | answer)}\n", "")
        monkeypatch.setattr(subprocess, "run", lambda *args, **settings: done)

    pretend(answer)
    with pytest.raises(RuntimeError, match=message):
        separate_process.check_checkpoint("folder", None, torch.zeros(1, 2), prompts=())
    pretend({"loss": 2.0 + 1e-6, "checksum": "rounded"})
    found = separate_process.check_checkpoint("folder", None, torch.zeros(1, 2), prompts=())
    assert found["same_bits"] is False


# Words


def outcome(demo, **lowest):
    """The results of the demo with other lowest losses."""
    return {**demo[0], "lowest_loss": {**demo[0]["lowest_loss"], **lowest}}


@pytest.mark.parametrize(
    ("pondering", "expected"),
    [
        (1.5, "Pondering lowered the loss from 2.000 to 1.500, for 4.4 times the arithmetic"),
        (2.25, "Pondering did not lower the loss: 2.250 against 2.000, for 4.4 times the arithmetic"),
        (2.0001, "Pondering made no difference, for 4.4 times the arithmetic"),
    ],
)
def test_headline_says_what_came_out_and_its_price(demo, pondering, expected):
    results = outcome(demo, control=2.0, pondering=pondering)
    results["arithmetic"] = {**results["arithmetic"], "pondering": 4.43}
    assert words.headline(results) == expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"pondering": 1.5}, "0.500 less with pondering, whose training took"),
        ({"pondering": 2.25}, "0.250 more with pondering, whose training took"),
        ({"pondering": 2.0}, "no difference with pondering"),
        ({"pondering": 1.5, "longer": 1.75}, "1.750 at best, 0.250 more than pondering: pondering was the better"),
        ({"pondering": 1.5, "longer": 1.25}, "1.250 at best, 0.250 less than pondering: that was the better use"),
        ({"pondering": 1.5, "longer": 1.5}, "1.500 at best, as pondering did."),
        ({"pondering": 1.75, "deeper": 1.5}, "1.500 on the same text: pondering was worth 50% of that gain."),
        ({"pondering": 1.5, "deeper": 1.75}, "1.750 on the same text: pondering was worth 200% of that gain."),
        ({"pondering": 2.25, "deeper": 1.75}, "1.750 on the same text, 0.500 less than pondering."),
        ({"pondering": 1.75, "deeper": 2.25}, "2.250 on the same text, 0.500 more than pondering."),
        ({"pondering": 2.25, "deeper": 2.25}, "2.250 on the same text, as pondering did."),
        (
            {"pondering": 1.5, "more_text": 1.0},
            "1.000, 0.500 less than pondering: where there is more text, train on that",
        ),
        ({"pondering": 1.5, "more_text": 1.75}, "1.750, not better than pondering."),
    ],
)
def test_findings_say_who_won(demo, losses, expected):
    sentences = words.findings(outcome(demo, control=2.0, **losses))
    assert len(sentences) == 4
    assert sum(expected in sentence for sentence in sentences) == 1, sentences


def test_findings_leave_out_what_was_not_compared(demo):
    results = outcome(demo)
    for name in ("longer", "deeper", "more_text"):
        del results["lowest_loss"][name]
    assert len(words.findings(results)) == 1
    results["left_out"] = ["more_text"]
    assert "too busy: plain, fresh text." in report.write_report(results)


@pytest.mark.parametrize(
    ("speed", "same", "expected"),
    [(2.5, True, "wrote 2.5 times as fast"), (0.8, True, "wrote slower, at 0.8 times"), (2.0, False, "it should not")],
)
def test_drafts_are_told_as_they_came_out(demo, speed, same, expected):
    drafts = {**demo[0]["drafts"], "speed": speed, "same_text": same}
    assert expected in report.write_report({**demo[0], "drafts": drafts})


def test_diverged_training_is_reported(demo):
    results = json.loads(json.dumps(demo[0]))
    results["loss_difference"] = results["held_out_loss"]["pondering"] = results["bits_per_byte"]["pondering"] = None
    results["loss_of_each_pass"]["pondering"] = [5.0, None, None, None]
    results["lowest_loss"]["pondering"] = None
    results["curves"]["pondering"] = [[*costs, None] for *costs, _ in results["curves"]["pondering"]]
    results["passage"] = None
    results["drafts"] = None
    assert "diverged" in report.write_report(results)
    assert "not a number" in report.summary(results)
    assert draw_png(results).startswith(b"\x89PNG")


# Bad input


FILES = {
    "binary.txt": b"ab\0cd",
    "latin.txt": b"caf\xe9",
    "empty.txt": b"",
    "short.txt": b"One line.",
    "broken.txt.gz": b"no gzip",
    "other.jsonl": b'{"text": "x"}\n{"body": "x"}\n',
    "story.txt": STORY.encode(),
    "full/mine.txt": STORY.encode(),
}
BAD_INPUT = {
    "binary": (["--text", "binary.txt"], "binary.txt is not text (line 1 has a NUL byte)"),
    "not UTF-8": (["--text", "latin.txt"], "latin.txt is not UTF-8 text (line 1 has the byte 0xe9)"),
    "missing": (["--text", "nowhere.txt"], "there is no file nowhere.txt"),
    "empty": (["--text", "empty.txt"], "empty.txt holds no text"),
    "too short": (["--text", "short.txt"], "fewer tokens than one block"),
    "second of two": (["--text", "story.txt", "binary.txt"], "binary.txt is not text"),
    "no field": (["--text", "other.jsonl"], "line 2 of other.jsonl has no field 'text'"),
    "damaged gzip": (["--text", "broken.txt.gz"], "broken.txt.gz is not a whole gzip file"),
    "no base": (["--base", "./nowhere"], "there is no folder ./nowhere"),
    "base without a model": (["--base", "full"], "full is not a model"),
    "base with base steps": (["--base", "full", "--base-steps", "3"], "--base-steps is for the demo's own base"),
    "full output": (["--output", "full"], "full exists and is not empty"),
    "text in the output": (["--output", "full", "--overwrite", "--text", "full/mine.txt"], "would be replaced"),
    "output is a file": (["--output", "story.txt"], "story.txt is a file"),
    "negative S": (["--pondering-steps", "-1"], "--pondering-steps must be an integer >= 0"),
    "unknown gate": (["--pondering-gate", "open"], "--pondering-gate must be one of"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "no text": (["--text-blocks", "0"], "--text-blocks must be at least 1"),
    "negative seed": (["--seed", "-1"], "--seed must be at least 0"),
    "learning rate": (["--learning-rate", "nan"], "--learning-rate must be a finite number > 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, case):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_INPUT[case]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, output, errors = call("demo", "--quick", *arguments)
    assert code == 2, errors
    assert output == ""
    assert errors.splitlines()[-1].startswith("ponder-hf: error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_failure_on_the_way_leaves_the_old_folder_alone(tmp_path, monkeypatch):
    raised, outcomes = [], []

    def fail(*args, **kwargs):
        assert [path.name[:13] for path in tmp_path.iterdir() if path.name.startswith(".")] == [".out.partial-"]
        raise raised[-1]

    def train_once(*arguments):
        if not outcomes:
            outcomes.append(experiment.run_experiment(*arguments))
        return outcomes[0]

    monkeypatch.setattr(run, "check_checkpoint", fail)
    monkeypatch.setattr(run, "run_experiment", train_once)
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old", encoding="utf-8")
    sizes = {"--steps": 2, "--base-steps": 2, "--text": tmp_path / "story.txt", "--output": tmp_path / "out"}
    for error, expected in ((RuntimeError("boom"), 1), (KeyboardInterrupt(), 130)):
        raised.append(error)
        code, _, errors = call("demo", "--quick", "--overwrite", *(word for pair in sizes.items() for word in pair))
        assert code == expected, errors
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "story.txt"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["old.txt"]


def test_the_next_command_is_one_that_the_shell_finds(monkeypatch, tmp_path):
    monkeypatch.setattr("ponder_hf.demo.report.shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert report.program() == "ponder-hf"  # nor does it lie there
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/ponder-hf").touch()
    assert report.program() == ".venv/bin/ponder-hf"
    monkeypatch.setattr("ponder_hf.demo.report.shutil.which", lambda name: name)
    assert report.program() == "ponder-hf"
