"""Whoever writes is killed at any moment, or finds a full or a read-only disk: whole or absent, then it succeeds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_client
import hub_server
import pytest
from checkpoints import listing


pytest_plugins = ["refusals"]
pytest.importorskip("matplotlib", reason="needs ponder-hf[viz]")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed otherwise there")

# Moments for each kind of fault. The hundred: PONDER_FAULTS=50 make test PYTEST_ARGS=tests/test_faults.py
NUM_FAULTS = int(os.environ.get("PONDER_FAULTS", "1"))
TEXT = "once upon a time there was one cat and two dogs who sat by the sea " * 20

# What trains and looks at the checkpoint in a process of its own writes nothing, and takes longest: it is done before.
DEMO_BEFORE = """
import dataclasses
from ponder_hf.demo import Options, experiment, prepare, run
prepare.QUICK = dataclasses.replace(prepare.QUICK, hidden_size=16, batch_size=1, held_out_blocks=1)
options = Options(quick=True, text=("text.txt",), steps=1, base_steps=1, text_blocks=1)
setup = prepare.prepare(dataclasses.replace(options, text=("TEMPLATE/text.txt",)))
schedule = experiment.make_schedule(setup)
outcome = experiment.run_experiment(setup, schedule)
found = {"class": "", "loss": 1.0, "expected_loss": 1.0, "same_bits": True, "drafts": None}
run.make_schedule, run.run_experiment = lambda *_: schedule, lambda *_: outcome
run.check_checkpoint = lambda folder, model, ids, prompts, **job: found | {"texts": [""] * len(prompts)}
"""
DEMO = 'run.run_demo(dataclasses.replace(options, output="out", overwrite=False))'
EVIDENCE_BEFORE = f"""
import random, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1] / "examples/evidence")!r})
import run, runs, training
text = torch.tensor(random.Random(0).choices(b"to be or not to be", k=3000), dtype=torch.uint8)
run.read_text, training.CHECKPOINT_SECONDS = (lambda *_: (text[:2000], text[2000:])), 0
base = runs.Run("base", "tiny", steps=2, layers=1, width=32, batch=2, evaluate_every=1, constant_rate=True)
runs.TABLES["tiny"] = [runs.Run("gated", "tiny", steps=2, layers=1, width=32, batch=2, evaluate_every=1,
                                pondering_steps=1, base=base, **runs.gated())]
"""
EVIDENCE = 'run.main(["tiny", "--results", "results"])'
PUSH_MODEL = """
from ponder_hf import PonderingForCausalLM
PonderingForCausalLM.from_pretrained("pondering").push_to_hub("somebody/model-NUMBER")
"""

TRAIN = (
    "train pondering --data text.txt --output out --max-steps 2 --save-steps 1 --block-size 16 "
    "--per-device-train-batch-size 2 --disable-tqdm true"
)
WRITERS = {
    "convert": "convert base out",
    "convert, overwriting": "convert base old --overwrite",
    "export": "export pondering out",
    "export, overwriting": "export pondering old --overwrite",
    "lens": "lens pondering --prompt once --html page.html --png heat.png",
    "lens, overwriting": "lens pondering --prompt once --html old.html --overwrite",
    "eval": "eval pondering --data text.txt --block-size 16 --card",
    "train": TRAIN,
    "demo": DEMO,
    "demo, overwriting": DEMO.replace("False", "True").replace('"out"', '"old"'),
    "evidence": EVIDENCE,
    "push": "push pondering somebody/pushed-NUMBER",
    "push a model": PUSH_MODEL,
    "push while training": f"{TRAIN} --push-to-hub true --hub-model-id somebody/run-NUMBER --hub-strategy every_save "
    "--hub-always-push true",
}
PROGRAMS = ("demo", "demo, overwriting", "evidence", "push a model")
BEFORE = {"demo": DEMO_BEFORE, "demo, overwriting": DEMO_BEFORE, "evidence": EVIDENCE_BEFORE}
# They write a folder, and find one to replace or none.
WHOLE_FOLDERS = [name for name in WRITERS if name.split(",")[0] in ("convert", "export", "demo")]
PUSHING = [name for name in WRITERS if name.startswith("push")]
QUICK = ("convert", "eval", "push")
PARAMETERS = [pytest.param(each, marks=[] if each in QUICK else [pytest.mark.slow]) for each in WRITERS]


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def faults_of(made_once, hub, tmp_path_factory):
    """A function that gives how a writer ended with each fault, and the folder with what was left, see killing.py."""
    template = tmp_path_factory.mktemp("template")
    shutil.copytree(made_once, template, dirs_exist_ok=True)
    (template / "text.txt").write_text(TEXT)
    (template / "old").mkdir()
    (template / "old/mine").write_text("mine")
    (template / "old.html").write_text("mine")
    (template / "pondering/README.md").write_text("---\nlicense: mit\n---\n\nWhat I wrote.\n")
    home, known = tmp_path_factory.mktemp("home"), {}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("killing.py"))],
        env=hub_client.environment(hub, home) | {"HF_TOKEN": hub_server.WRITER},
        cwd=home,  # where this is run from there may be a demo already
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def find(writer):
        if writer not in known:
            what, work = WRITERS[writer], tmp_path_factory.mktemp("work")
            again = what.replace("overwrite=False", "overwrite=True")
            if what.split()[0] in ("train", "lens") and "--overwrite" not in what:
                again += " --overwrite"
            kinds = ["kill", "time"] if NUM_FAULTS > 2 else ["kill"]
            job = {
                "template": str(template),
                "work": str(work),
                "before": BEFORE.get(writer, "").replace("TEMPLATE", str(template)),
                "run": what if writer in PROGRAMS else what.split(),
                "again": again if writer in PROGRAMS else again.split(),
                "kinds": kinds if writer in PUSHING else [*kinds, "full", "read-only"],
                "num_faults": NUM_FAULTS,
            }
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, "killing.py has ended"
            whole, *faults = json.loads(answer)
            assert whole["code"] == 0, whole
            known[writer] = list(enumerate(faults)), template, work
        return known[writer]

    yield find
    process.stdin.close()
    process.wait()


def is_leftover(name):
    """Hidden, or with an underscore in front: what a killed run leaves and the next one removes."""
    return any(part.startswith((".", "_")) and ("partial" in part or "re" in part) for part in name.split("/"))


def contents(folder):
    return {name: content for name, content in everything(folder).items() if not is_leftover(name)}


def everything(folder):
    """The listing of a folder, but for temporary files, which belong to the system."""
    return {name: content for name, content in listing(folder).items() if name.split("/")[0] != "tmp"}


def is_same_but_for_numbers(found, expected, writer):
    """Whether a folder is what the writer leaves; of training, cards and pages, times are in the files."""
    if writer.split(",")[0] in ("convert", "export", "push", "push a model", "evidence"):
        return found == expected
    return found.keys() == expected.keys()


def check_killed(place, template, writer, whole, fault):
    """What a killed writer leaves in a folder is whole or absent."""
    before, after = everything(template), contents(place)
    if writer in ("train", "push while training"):  # whole checkpoints, as many as there are
        for checkpoint in (place / "out").glob("checkpoint-*"):
            assert contents(checkpoint).keys() == contents(whole / "out" / checkpoint.name).keys(), fault
    elif writer in WHOLE_FOLDERS:
        # Between two renames neither may be there; then the old one is beside it, and comes back.
        assert any(is_same_but_for_numbers(after, each, writer) for each in (before, everything(whole))) or (
            "overwriting" in writer
            and not any(name.startswith("old/") for name in after)
            and any(".old.replaced-" in name for name in everything(place))
        ), fault
    elif writer == "lens":  # two files, each whole or absent
        for name in ("page.html", "heat.png"):
            path = place / name
            assert not path.exists() or path.stat().st_size > 0.9 * (whole / name).stat().st_size, fault
    elif writer == "eval":
        card = (place / "pondering/README.md").read_text()
        assert "What I wrote." in card, fault
        assert "license: mit" in card, fault
    elif writer == "evidence":
        expected = contents(whole)
        for name, content in after.items():
            if name.endswith((".json", ".weights")):
                assert expected[name] == content, fault
    elif writer in ("push", "push a model"):
        assert after == before, fault
    else:
        page = (place / "old.html").read_text()
        assert page == "mine" or page.rstrip().endswith("</html>"), fault


def check_repository(hub, writer, number, fault):
    """What a killed push leaves on the Hub: each commit but the first is a whole model, and the last one is there."""
    prefix = {"push": "pushed", "push a model": "model", "push while training": "run"}[writer]
    whole = hub[f"somebody/{prefix}-whole"]
    repository = hub[f"somebody/{prefix}-{number}"]
    for commit in list(repository.commits.values())[1:]:
        assert commit.files.keys() - {".gitattributes"} == whole.contents().keys(), fault
    if writer != "push while training":  # whose cards tell times
        assert repository.contents().keys() == whole.contents().keys(), fault
        assert repository.contents()["model.safetensors"] == whole.contents()["model.safetensors"], fault


@pytest.mark.parametrize("writer", PARAMETERS)
def test_killed(faults_of, hub, writer):
    faults, template, work = faults_of(writer)
    whole, num_killed = work / "whole", 0
    faults = [(number, fault) for number, fault in faults if fault["kind"] in ("kill", "time")]
    for number, fault in faults:
        num_killed += fault["first"]["code"] == -9
        check_killed(work / str(number) / "after", template, writer, whole, fault)
        if writer in PUSHING:
            check_repository(hub, writer, number, fault)
        if fault["second"]["code"] == 2 and "--overwrite" in str(fault["second"]["said"]):
            # The first had finished already.
            assert contents(work / str(number) / "after").keys() == everything(whole).keys(), fault
            continue
        assert fault["second"]["code"] == 0, fault
        assert is_same_but_for_numbers(everything(work / str(number) / "again"), everything(whole), writer), fault
    assert num_killed, faults  # a run may be over before a child is killed after a time
    print(f"{writer}: killed {num_killed} times of {len(faults)}")


@pytest.mark.parametrize("writer", [each for each in PARAMETERS if each.values[0] not in PUSHING])
def test_full_and_read_only_disks(faults_of, writer):
    faults, template, work = faults_of(writer)
    before, whole = everything(template), everything(work / "whole")
    faults = [(number, fault) for number, fault in faults if fault["kind"] in ("full", "read-only")]
    for number, fault in faults:
        first = fault["first"]
        if first["code"] == 0:  # the moment came after all was written
            continue
        if writer not in PROGRAMS:
            errors = [each for each in first["said"] if each.startswith("ponder-hf: error: ")]
            assert len(errors) == 1, fault
            assert "unexpected" not in errors[0], fault
            assert "Traceback" not in "".join(first["said"]), fault
        assert first["code"] in (1, 2), fault
        after = everything(work / str(number) / "after")
        if writer == "train":  # its whole checkpoints stay, and say so
            after = {name: content for name, content in after.items() if name.split("/")[0] != "out"}
        elif writer == "lens":  # one of the two files may be whole
            after = {name: content for name, content in after.items() if name not in ("page.html", "heat.png")}
        elif writer == "evidence":  # what it has measured stays
            check_killed(work / str(number) / "after", template, writer, work / "whole", fault)
            after = {name: content for name, content in after.items() if name.split("/")[0] != "results"}
        assert after == before, fault
        assert fault["second"]["code"] == 0 or "--overwrite" in str(fault["second"]["said"]), fault
        if fault["second"]["code"] == 0:
            assert is_same_but_for_numbers(everything(work / str(number) / "again"), whole, writer), fault
    assert any(fault["first"]["code"] for _, fault in faults)
