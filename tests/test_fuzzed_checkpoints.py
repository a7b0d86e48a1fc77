"""Checkpoints that were damaged at random: an error in one line, or a whole model; never a part, never a crash."""

import json
import random
import shutil
import struct

import pytest
import tiny
import torch
from checkpoints import change_tensors, listing, run
from safetensors.torch import load_file

from ponder_hf import PonderingForCausalLM


pytest_plugins = ["refusals"]

FILE = "pondering/model.safetensors"


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def flipped(content, chance, start=0, end=None):
    """One bit of it is another."""
    place = chance.randrange(start, len(content) if end is None else end)
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def flip_in_header(content, chance):
    return flipped(content, chance, 0, 8 + struct.unpack("<Q", content[:8])[0])


def truncate(content, chance):
    return content[: chance.randrange(len(content))]


def huge_header(content, chance):
    return struct.pack("<Q", chance.choice([2**63, 2**40, 10**8, len(content)])) + content[8:]


def other_offsets(content, chance):
    """Of one tensor: beyond the end, backwards, or those of another."""
    header, rest = header_of(content)
    names = [name for name in header if name != "__metadata__"]
    one, other = chance.sample(names, 2)
    begin, end = header[one]["data_offsets"]
    header[one]["data_offsets"] = chance.choice(
        [
            [begin, end + 10**9],
            [end, begin],
            [-4, end],
            header[other]["data_offsets"],
            [begin, end - 4],
            "none",
            [begin],
        ]
    )
    return with_header(header, rest)


def other_description(content, chance):
    """Of one tensor: a dtype or a shape that its bytes are not."""
    header, rest = header_of(content)
    name = chance.choice([name for name in header if name != "__metadata__"])
    field, values = chance.choice(
        [("dtype", ["I64", "F16", "BOOL", "F4", "", None, 3]), ("shape", [[], [-1], [2**62, 2**62], [0], None, ["3"]])]
    )
    header[name][field] = chance.choice(values)
    return with_header(header, rest)


def other_json(content, chance):
    header, rest = header_of(content)
    name = chance.choice(list(header))
    made = chance.choice([[], "text", None, {"a": {}}, {**header, name: 3}, {**header, "": {}}])
    return with_header(made, rest)


BYTES = [flip_in_header, truncate, huge_header, other_offsets, other_description, other_json, flipped]


def swap(tensors, chance):
    one, other = chance.sample(sorted(tensors), 2)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def remove(tensors, chance):
    for name in chance.sample(sorted(tensors), chance.randint(1, 3)):
        del tensors[name]


def add(tensors, chance):
    tensors[chance.choice(["backbone.more", "more", "pondering_gate.weight", ""])] = torch.ones(chance.randint(1, 40))


def another_dtype(tensors, chance):
    name = chance.choice(sorted(tensors))
    tensors[name] = tensors[name].to(chance.choice([torch.int64, torch.bool, torch.complex64, torch.uint8]))


def another_shape(tensors, chance):
    name = chance.choice(sorted(tensors))
    one = tensors[name]
    changes = [one.flatten()[:-1], one[None], one.repeat_interleave(2, 0), one.flatten()[:0]]
    tensors[name] = chance.choice(changes).contiguous().clone()


TENSORS = [swap, remove, add, another_dtype, another_shape]


def holds(place):
    """Export and load: both refuse in one line with nothing written, or both give every weight that is stored."""
    before = listing(place / "pondering")
    code = run("export", "pondering", "out", "--overwrite")
    assert code in (0, 2)
    assert (place / "out").exists() == (code == 0)
    assert {path.name for path in place.iterdir()} <= {"base", "sharded", "pondering", "out"}
    assert listing(place / "pondering") == before
    if code == 0:
        stored = load_file(place / FILE)
        model = PonderingForCausalLM.from_pretrained(place / "pondering")
        for name, parameter in model.state_dict().items():
            if name in stored:
                torch.testing.assert_close(parameter, stored[name], rtol=0, atol=0, equal_nan=True)
        shutil.rmtree(place / "out")
    return code


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ponder-hf: error: ")]
    assert len(said) == 1
    assert "unexpected" not in said[0]
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("damage", BYTES, ids=lambda function: function.__name__)
def test_bytes(place, capsys, damage):
    whole, codes = (place / FILE).read_bytes(), []
    for seed in range(12):
        (place / FILE).write_bytes(damage(whole, random.Random(seed)))
        capsys.readouterr()
        codes.append(holds(place))
        if codes[-1]:
            one_line(capsys)
    assert (2 in codes) == (damage is not flipped)  # of the weights a bit may be anything


@pytest.mark.parametrize("damage", TENSORS, ids=lambda function: function.__name__)
def test_tensors(place, capsys, damage):
    whole, codes = (place / FILE).read_bytes(), []
    for seed in range(8):
        (place / FILE).write_bytes(whole)
        change_tensors(place / "pondering", lambda tensors, seed=seed: damage(tensors, random.Random(seed)))
        capsys.readouterr()
        codes.append(holds(place))
        if codes[-1]:
            one_line(capsys)
    assert 2 in codes


INDICES = {
    "itself": {"weight_map": {"backbone.embed_out.weight": "model.safetensors.index.json"}},
    "a file outside": {"weight_map": {"backbone.embed_out.weight": "../../base/model.safetensors"}},
    "a missing file": {"weight_map": {"backbone.embed_out.weight": "model-00001-of-00002.safetensors"}},
    "nothing": {"weight_map": {}},
    "no map": {"metadata": {}},
    "a list": [],
    "numbers": {"weight_map": {"backbone.embed_out.weight": 3}},
    "an absolute path": {"weight_map": {"backbone.embed_out.weight": "/dev/zero"}},
    "no JSON": None,
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_names(place, capsys, case):
    (place / FILE).unlink()
    index = INDICES[case]
    (place / f"{FILE}.index.json").write_text("{" if index is None else json.dumps(index))
    capsys.readouterr()
    assert holds(place) == 2
    one_line(capsys)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "mixtral"])
def test_the_configuration_of_another_model(place, capsys, model_type):
    tiny.pondering_model(model_type).config.save_pretrained(place / "pondering")
    capsys.readouterr()
    assert holds(place) == 2
    one_line(capsys)


@pytest.mark.parametrize("command", ["export", "eval"])
def test_weights_that_are_no_numbers(place, capsys, command):
    """Copied as they are; who measures with them is told."""
    change_tensors(place / "pondering", lambda tensors: tensors["backbone.embed_out.weight"].fill_(float("nan")))
    (place / "text.txt").write_text("once upon a time there was one cat " * 30)
    words = {"eval": ["--data", "text.txt", "--block-size", "16"], "export": ["out"]}
    capsys.readouterr()
    assert run(command, "pondering", *words[command]) == (0 if command == "export" else 2)
    if command != "export":
        one_line(capsys)


DEEP = '{"a":' * 100_000
JSON = {
    "nested too deep": lambda text: DEEP.encode(),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "half of it": lambda text: text.encode()[: len(text) // 2],
}
READERS = {
    "config.json": [
        "convert base out",
        "export pondering out",
        "inspect pondering",
        "inspect-code pondering",
        "push pondering me/it --dry-run",
        "generate pondering --prompt once",
        "lens pondering --prompt once",
        "eval pondering --data text.txt",
        "train base --data text.txt --output out",
        "train pondering --data text.txt --output out",
    ],
    "generation_config.json": ["convert base out", "generate pondering --prompt once"],
    "tokenizer_config.json": ["convert base out", "generate pondering --prompt once", "inspect-code pondering"],
    "model.safetensors.index.json": ["convert sharded out"],
}


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize(("file", "line"), [(file, line) for file, lines in READERS.items() for line in lines])
def test_json_that_transformers_cannot_read(place, check_refused, file, line, kind):
    (place / "text.txt").write_text("once upon a time there was one cat " * 30)
    command = line.split()
    source = next(word for word in command if word in ("base", "pondering", "sharded"))
    path = place / source / file
    path.write_bytes(JSON[kind](path.read_text()))
    said = check_refused(*command)
    assert source in said
    assert "unexpected" not in said


def test_items_that_are_nested_too_deep(place, check_refused):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (ponder-hf[eval])")
    (place / "items").mkdir()
    (place / "items/piqa.jsonl").write_text(DEEP)
    check_refused("eval", "pondering", "--tasks", "piqa", "--tasks-from", "items", words=["line 1 of", "is not JSON"])
