"""What pondering does over a whole text: every figure against a count written out token by token."""

import itertools
import json
import math
import random
import re
from collections import Counter

import checkpoints
import pytest
import tiny
import torch
from browser import Browser
from checkpoints import WORDS, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ponder_hf import PonderingError, evaluate_text
from ponder_hf.lenses import lens_text, whole_text
from ponder_hf.lenses.whole_text import GROUPS, OVER_ALL


BLOCK = 16
# Words in no order, some often and some rarely.
_WORDS = WORDS[4:]
TEXT = " ".join(random.Random(0).choices(_WORDS, [1 / (place + 1) for place in range(len(_WORDS))], k=640))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = checkpoints.save_base_and_model(tmp_path_factory.mktemp("lens text"))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model():
    """One that is right now and then: untrained, over the words of the text alone."""
    torch.manual_seed(0)
    base = {"scale": 6.0, "vocab_size": len(WORDS)}
    return tiny.pondering_model("llama", torch.float64, base, pondering_steps=3, pondering_temperature=0.05)


@pytest.fixture(scope="module")
def content(made_once, model):
    found = lens_text(model, str(made_once / "text.txt"), tokenizer=checkpoints.word_tokenizer(), block_size=BLOCK)
    return found.to_dict()


@pytest.fixture(scope="module")
def tokens(model):
    """One dict for each predicted token, from the full logits of every pass."""
    ids = torch.tensor([WORDS.index(word) for word in TEXT.split()])
    end = WORDS.index("</s>")  # behind the text, as for training
    rows = torch.cat([ids, torch.tensor([end])])
    rows = rows[: len(rows) // BLOCK * BLOCK].view(-1, BLOCK)
    with torch.no_grad():
        output = model(rows, output_pondering=True, use_cache=False)
    p = torch.stack([*output.pondering_logits, output.logits]).softmax(-1)
    times, found = Counter(rows[:, 1:].flatten().tolist()), []
    for block, place in itertools.product(range(len(rows)), range(BLOCK - 1)):
        target = int(rows[block, place + 1])
        found.append(
            {
                "block": block,
                "id": target,
                "times": times[target],
                "context": place + 1,
                "losses": [-each[block, place, target].log().item() for each in p],
                "predicted": [int(each[block, place].argmax()) for each in p],
                "confidence": [each[block, place].max().item() for each in p],
                "entropy": torch.special.entr(p[0, block, place]).sum().item(),
            }
        )
        found[-1]["right"] = [each == target for each in found[-1]["predicted"]]
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_there_is_something_to_see(tokens):
    """The checks below compare figures that are not all zero."""
    assert len({tuple(each["right"]) for each in tokens}) > 8
    assert len({each["times"] for each in tokens}) > 8


def test_each_pass_as_evaluate_text_has_it(made_once, model, content, tokens):
    expected = evaluate_text(
        model, str(made_once / "text.txt"), tokenizer=checkpoints.word_tokenizer(), block_size=BLOCK
    )
    assert content["tokens"] == expected["tokens"] == len(tokens)
    for index, (found, figures) in enumerate(zip(content["passes"], expected["passes"], strict=True)):
        for name in ("loss", "accuracy", "agreement"):
            assert found[name] == pytest.approx(figures[name], rel=1e-5)
            assert found[f"{name}_stderr"] == pytest.approx(figures[f"{name}_stderr"], rel=1e-4)
        assert found["confidence"] == pytest.approx(mean(each["confidence"][index] for each in tokens), rel=1e-5)
    assert content["gain"] == pytest.approx(content["passes"][0]["loss"] - content["passes"][-1]["loss"], rel=1e-4)


def check_group(row, own, tokens):
    assert row["tokens"] == len(own)
    assert row["share"] == pytest.approx(len(own) / len(tokens))
    for name, index in (("before", 0), ("after", -1)):
        assert row[f"loss_{name}"] == pytest.approx(mean(each["losses"][index] for each in own), rel=1e-5)
        assert row[f"accuracy_{name}"] == pytest.approx(mean(each["right"][index] for each in own))
    gain = mean(each["losses"][0] - each["losses"][-1] for each in own)
    assert row["gain"] == pytest.approx(gain, rel=1e-4, abs=1e-7)
    # A ratio of two sums over blocks.
    blocks = sorted({each["block"] for each in tokens})
    rests = [
        sum(each["losses"][0] - each["losses"][-1] - gain for each in own if each["block"] == block)
        for block in blocks
    ]
    spread = math.sqrt(sum(rest**2 for rest in rests) * len(blocks) / (len(blocks) - 1))
    assert row["gain_stderr"] == pytest.approx(spread / len(own), rel=1e-3, abs=1e-8)


def test_by_frequency(content, tokens):
    rows = content["groups"]["frequency"]
    assert sum(row["tokens"] for row in rows) == len(tokens)
    for row in rows:
        bounds = [int(each) for each in re.findall(r"\d+", row["label"])]
        inside = [each for each in tokens if bounds[0] <= each["times"] <= bounds[-1]]
        # Kinds that occur equally often may be on both sides of a border.
        assert row["tokens"] <= len(inside)
    kinds = sorted(Counter(each["id"] for each in tokens).items(), key=lambda pair: -pair[1])
    assert rows[0]["tokens"] >= kinds[0][1]


def test_by_position(content, tokens):
    rows = content["groups"]["position"]
    assert [row["label"] for row in rows] == ["1 to 7 tokens", "8 to 15 tokens"]
    for row, (low, high) in zip(rows, ((1, 7), (8, 15)), strict=True):
        check_group(row, [each for each in tokens if low <= each["context"] <= high], tokens)


def test_by_entropy_of_pass_0(content, tokens):
    ordered = sorted(tokens, key=lambda each: each["entropy"])
    rows = content["groups"]["entropy"]
    assert len(rows) == 5
    assert [row["share"] for row in rows] == pytest.approx([0.2] * 5, abs=0.02)
    first = 0
    for row in rows:
        own = ordered[first : first + row["tokens"]]
        check_group(row, own, tokens)
        assert row["label"].startswith(f"{own[0]['entropy']:.2f} to ")
        first += row["tokens"]


def test_how_thoughts_change(content, tokens):
    for step in content["changes"]["steps"]:
        before, after = step["step"], step["step"] + 1
        assert step["lost"] == pytest.approx(
            mean(each["right"][before] and not each["right"][after] for each in tokens)
        )
        assert step["won"] == pytest.approx(
            mean(each["right"][after] and not each["right"][before] for each in tokens)
        )
    expected = dict.fromkeys(OVER_ALL, 0)
    for each in tokens:
        word = "".join("rw"[not right] for right in each["right"])
        expected["kept"] += "w" not in word
        expected["never"] += "r" not in word
        expected["gained"] += bool(re.fullmatch("w.*r", word))
        expected["lost"] += bool(re.fullmatch("r.*w", word))
        expected["lost_and_back"] += bool(re.search("r.*w.*r", word))
        expected["found_and_lost"] += bool(re.search("w.*r.*w", word))
    found = content["changes"]["over_all"]
    assert {name: round(found[name] * len(tokens)) for name in OVER_ALL} == expected
    assert min(expected.values()) > 0
    for one, other in itertools.product(range(4), repeat=2):
        same = mean(each["predicted"][one] == each["predicted"][other] for each in tokens)
        assert content["agreement"][one][other] == pytest.approx(same)


def test_calibration(content, tokens):
    for index, bins in enumerate(content["calibration"]):
        error = 0.0
        assert sum(each["tokens"] for each in bins) == len(tokens)
        for each in bins:
            own = [token for token in tokens if each["low"] <= token["confidence"][index] < each["high"]]
            assert each["tokens"] == len(own)
            assert each["confidence"] == pytest.approx(mean(token["confidence"][index] for token in own), rel=1e-5)
            assert each["accuracy"] == pytest.approx(mean(token["right"][index] for token in own))
            error += abs(sum(token["right"][index] - token["confidence"][index] for token in own))
        assert content["passes"][index]["calibration_error"] == pytest.approx(error / len(tokens), rel=1e-4)
        assert content["passes"][index]["calibration_error_stderr"] > 0


def test_single_tokens(content, tokens):
    sums, times = Counter(), Counter(each["id"] for each in tokens)
    for each in tokens:
        sums[each["id"]] += each["losses"][0] - each["losses"][-1]
    often = {token_id: total for token_id, total in sums.items() if times[token_id] >= 5}
    for name, sign in (("gain", 1), ("lose", -1)):
        expected = sorted((each for each in often if sign * often[each] > 0), key=lambda each: -sign * often[each])[
            :12
        ]
        rows = content["most_changed"][name]
        assert [row["id"] for row in rows] == expected
        for row in rows:
            assert row["token"] == WORDS[row["id"]]
            assert row["times"] == times[row["id"]]
            assert row["sum"] == pytest.approx(often[row["id"]], rel=1e-3)
            assert row["gain"] == pytest.approx(often[row["id"]] / times[row["id"]], rel=1e-3)


@pytest.mark.parametrize(
    ("marker", "pieces", "expected"),
    [
        (
            "Ġ",
            "Ġthe Ġca t Ċ dog s Ġ42 . ' s Ġ( red Ċ",
            "start start inside space start inside digits other other inside",
        ),
        ("", "the cat 42 .", "start start digits other"),
    ],
    ids=["byte level", "words"],
)
def test_kinds_of_tokens(marker, pieces, expected):
    """Where a word begins; the pieces with a space before them, or where no piece has one, all."""
    names = dict.fromkeys(pieces.split())
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(names))))
    if marker:
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    targets = torch.tensor([[vocabulary[piece] for piece in pieces.split()]])
    strings = whole_text.token_strings(fast, targets.unique().tolist())
    # `lens_text` tells how many tokens a group has, not which ones they are.
    groups = dict(whole_text._by_kind(targets, strings))
    short = {"start of a word": "start", "inside of a word": "inside", "white space": "space", "digits": "digits"}
    kinds = ["?"] * targets.numel()
    for label, mask in groups.items():
        for place in mask[0].nonzero().flatten().tolist():
            assert kinds[place] == "?"
            kinds[place] = short.get(label, "other")
    assert kinds[: len(expected.split())] == expected.split()
    assert "?" not in kinds


def test_one_block_has_no_intervals_and_a_plain_model_no_gain(made_once):
    found = lens_text(str(made_once / "base"), str(made_once / "text.txt"), block_size=BLOCK, max_blocks=1).to_dict()
    assert found["gain"] == 0
    assert found["passes"][0]["loss_stderr"] is None
    assert found["changes"]["steps"] == []
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_used_is_refused(made_once):
    with pytest.raises(PonderingError, match=r"missing\.txt"):
        lens_text(str(made_once / "model"), str(made_once / "missing.txt"))
    with pytest.raises(PonderingError, match="`pondering_steps` must be an integer"):
        lens_text(str(made_once / "model"), str(made_once / "text.txt"), pondering_steps=-1)


def command(made_once, *flags):
    return run("lens", made_once / "model", "--data", made_once / "text.txt", "--block-size", BLOCK, *flags)


def test_the_command(made_once, tmp_path, capsys):
    assert command(made_once, "--json") == 0
    expected = lens_text(str(made_once / "model"), str(made_once / "text.txt"), block_size=BLOCK).to_dict()
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected))
    assert command(made_once) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    for title in (*GROUPS.values(), *OVER_ALL.values(), "Each pass"):
        assert title in output
    assert f"{expected['passes'][1]['loss']:.3f}" in output
    assert command(made_once, "--html", tmp_path / "page.html", "--png", tmp_path / "plots.png") == 0
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    model = made_once / "model"
    two = ("lens", model, model, "--data", made_once / "text.txt", "--html", tmp_path / "two.html")
    assert run(*two) == 2
    assert "about one model" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_the_page(made_once, model, content, tmp_path, width, dark):
    browser = Browser()
    try:
        found = whole_text.TextLens(content)
        (tmp_path / "page.html").write_text(found.to_html(), encoding="utf-8")
        browser.open(tmp_path / "page.html", width=width, dark=dark)
        assert browser.complaints() == []
        assert browser.script("return document.documentElement.scrollWidth") <= width
        text = browser.one("body").text
        for row in itertools.chain(*content["groups"].values()):
            assert row["label"] in text
            assert f"{row['gain']:+.3f}" in text
        for each in content["passes"]:
            assert f"{each['loss']:.3f} ± {1.96 * each['loss_stderr']:.3f}" in text
        assert len(browser.all("td svg")) == sum(map(len, content["groups"].values()))
        assert len(browser.all("polyline")) == 4
        assert browser.texts("td.level") == [f"{100 * each:.1f}" for row in content["agreement"] for each in row]
        assert all(each.get_attribute("aria-label") for each in browser.all(".scroll"))
    finally:
        browser.close()


def test_the_figure(content):
    figure = whole_text.TextLens(content).figure()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["Loss of each pass", *GROUPS.values(), "Calibration"]
    (line,) = figure.axes[0].lines[:1]
    assert line.get_ydata() == pytest.approx([each["loss"] for each in content["passes"]])
