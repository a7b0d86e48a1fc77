"""Logits that are made when they are read: who reads them gets them, who only hands the output on makes nothing."""

import copy
import pickle

import pytest
import tiny
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch.nn.parallel.distributed import _find_tensors
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from ponder_hf.modeling import pondering_vocabulary
from ponder_hf.modeling.pondering_vocabulary_loss import LogitsOnDemand


READS = {
    "by name": lambda output: output.logits,
    "by key": lambda output: output["logits"],
    "by get": lambda output: output.get("logits"),
    "by index": lambda output: output[1],
    "by slice": lambda output: output[:2][1],
    "as a tuple": lambda output: output.to_tuple()[1],
    "as a dict": lambda output: dict(output)["logits"],
    "as arguments": lambda output: dict(**output)["logits"],
}
HANDED_ON = {
    "untouched": lambda output: output,
    "by accelerate's conversion": lambda output: convert_outputs_to_fp32(lambda: output)(),
    "by pytree": lambda output: _pytree.tree_map(lambda leaf: leaf, output),
    "by DDP's search for tensors": lambda output: list(_find_tensors(output)) and output,
    "by items": lambda output: type(output)(**dict(output.items())),
}


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in _pytree.tree_leaves(result):
            if torch.is_tensor(leaf):
                self.elements = max(self.elements, leaf.numel())
        return result


def training_output(input_ids, **arguments):
    """The output of a training step, and a list that grows with each call of the head's module."""
    torch.manual_seed(1)
    model = tiny.pondering_model("llama").train()
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    model.config.pondering_steps = 0  # with a hook on it the head is called for the loss, too
    output = model(input_ids, labels=input_ids, **arguments)
    calls.clear()
    return output, calls


@pytest.mark.parametrize("hand_on", HANDED_ON.values(), ids=HANDED_ON)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_logits_are_made_once_when_they_are_read(read, hand_on):
    input_ids = tiny.token_ids(2, 9)
    torch.manual_seed(1)
    expected = tiny.pondering_model("llama")(input_ids, pondering_steps=0).logits
    output, calls = training_output(input_ids)
    output = hand_on(output)
    assert output["loss"] is output.loss is output[0] is output.get("loss")
    assert list(output) == list(output.keys()) == ["loss", "logits"]
    assert isinstance(list(output.values())[1], LogitsOnDemand)
    assert not calls
    torch.testing.assert_close(read(output), expected)
    assert read(output) is read(output) is output.logits is list(output.values())[1]
    assert len(calls) == 1


def test_other_reads_are_those_of_any_output():
    output, calls = training_output(tiny.token_ids(2, 9))
    assert output.get("attentions") is output.attentions is None
    with pytest.raises(KeyError):
        output["attentions"]
    assert "logits" in output
    assert not calls
    output.logits = replaced = torch.zeros(1)
    assert output["logits"] is output[1] is replaced
    assert not calls


COMPUTED = {
    "attributes": lambda logits: (*logits.shape, logits.ndim, logits.device.type == "cpu", logits.requires_grad),
    "methods": lambda logits: logits.argmax(-1),
    "detach": lambda logits: logits.detach() + 0,
    "to": lambda logits: logits.to(torch.float64) + 0,
    "operators": lambda logits: (-(logits * 2 - 1) / logits) ** 2 @ logits.transpose(1, 2),
    "from the right": lambda logits: 1 - torch.ones(()) * logits,
    "comparisons": lambda logits: (logits == logits, logits > 0),
    "indices": lambda logits: logits[..., -1],
    "length": lambda logits: len(logits),
    "rows": lambda logits: [*logits],
    "functions of torch": lambda logits: torch.nn.functional.log_softmax(logits, dim=-1),
    "functions of lists": lambda logits: torch.stack([logits, logits]),
    "functions by keyword": lambda logits: torch.softmax(input=logits, dim=-1),
    "losses": lambda logits: torch.nn.functional.cross_entropy(logits[0], torch.zeros(9, dtype=torch.long)),
    "numpy": lambda logits: logits.detach().numpy().tolist(),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_whoever_computes_with_an_item_gets_what_the_logits_give(compute):
    output, calls = training_output(tiny.token_ids(2, 9))
    (stand_in,) = (value for value in dict(output.items()).values() if not torch.is_tensor(value))
    found = compute(stand_in)
    assert len(calls) == 1
    torch.testing.assert_close(found, compute(output.logits), rtol=0, atol=0)


def test_a_dict_of_all_items_works_as_one_of_tensors():
    output, calls = training_output(tiny.token_ids(2, 9), output_pondering=True)
    detached = {name: value.detach() for name, value in output.items() if not isinstance(value, tuple)}
    moved = {name: value.to("cpu") for name, value in detached.items()}
    assert not calls
    torch.testing.assert_close(moved["logits"]().detach(), output.logits.detach(), rtol=0, atol=0)
    for made in (dict(output), {**output}, output | {}, dict(zip(output, output.to_tuple(), strict=True))):
        assert list(made) == ["loss", "logits", "pondering_logits", "pondering_losses"]
        assert made["logits"] is output.logits
    assert len(calls) == 1
    for copied in (pickle.loads(pickle.dumps(moved)), copy.deepcopy(moved)):
        assert all(torch.is_tensor(value) for value in copied.values())


def test_a_stand_in_is_itself_in_sets_and_has_no_special_attributes():
    output, calls = training_output(tiny.token_ids(2, 9))
    stand_in = dict(output.items())["logits"]
    assert stand_in in {stand_in}
    assert not hasattr(stand_in, "__cuda_array_interface__")
    assert not calls


def test_copies_and_pickles_hold_the_logits():
    output, _ = training_output(tiny.token_ids(2, 9))
    assert copy.copy(output).logits is output.logits
    with torch.no_grad():
        output, _ = training_output(tiny.token_ids(2, 9))
    restored = pickle.loads(pickle.dumps(output))
    torch.testing.assert_close(restored.logits, output.logits)
    torch.testing.assert_close(copy.deepcopy(output)["logits"], output.logits)


def test_they_are_made_as_the_forward_pass_would_have_made_them():
    input_ids = tiny.token_ids(2, 9)
    model = tiny.pondering_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids).logits
        output = model.train()(input_ids, labels=input_ids)
    assert dict(output.items())["logits"].dtype == expected.dtype == torch.bfloat16
    with torch.no_grad():
        assert output.logits.requires_grad
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=0)
    with torch.no_grad():
        output = model(input_ids, labels=input_ids)
    assert not output.logits.requires_grad
    output = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model))(input_ids, labels=input_ids)
    torch.testing.assert_close(output.logits, expected.float(), rtol=0, atol=0)


def test_gradients_flow_through_them():
    input_ids = tiny.token_ids(2, 9)
    model = tiny.pondering_model("llama", torch.float64)
    model(input_ids).logits.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.train()(input_ids, labels=input_ids).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_evaluation_a_call_without_labels_and_tuples_give_tensors_at_once():
    input_ids = tiny.token_ids(2, 9)
    model = tiny.pondering_model("llama")
    for output in (model(input_ids, labels=input_ids), model.train()(input_ids)):
        assert torch.is_tensor(dict(output.items())["logits"])
    assert torch.is_tensor(model(input_ids, labels=input_ids, return_dict=False)[1])


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_trainer_never_makes_them_in_training_and_gets_them_in_evaluation(tmp_path, monkeypatch, bf16):
    batch, length, vocabulary = 4, 48, 509
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", 16 * vocabulary)
    rows = [{"input_ids": row, "labels": row} for row in tiny.token_ids(8, length)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=batch,
        bf16=bf16,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    model = tiny.pondering_model("gpt2", base_changes={"vocab_size": vocabulary})
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    with LargestTensor() as largest:
        trainer.train()
    assert 0 < largest.elements < batch * length * vocabulary / 2
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (8, length, vocabulary)


def test_a_compiled_training_step_gives_tensors_and_is_one_graph():
    input_ids = tiny.token_ids(2, 9)
    model = tiny.pondering_model("llama").train()

    def step(input_ids):
        output = model(input_ids, labels=input_ids)
        return output["loss"], output.logits

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)(input_ids)
    torch.testing.assert_close(compiled, step(input_ids))
