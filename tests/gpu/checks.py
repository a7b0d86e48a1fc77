"""Kernels, whole texts, training and loading, on the device: against plain code, float64, or the CPU."""

import copy
import tempfile

import tiny
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ponder_hf import PonderingForCausalLM
from ponder_hf.modeling import pondering_vocabulary
from ponder_hf.modeling.pondering_vocabulary import Readout
from ponder_hf.modeling.pondering_vocabulary_embedding import plain_embedding, top_k_embedding, vocabulary_embedding
from ponder_hf.modeling.pondering_vocabulary_loss import causal_lm_loss, linear_causal_lm_loss

from .machine import peak_memory
from .registry import LeftOut, check


FIELDS = {
    "whole vocabulary": {},
    "top 20": {"pondering_top_k": 20, "pondering_temperature": 0.8},
    "gate, intermediate losses": {"pondering_gate": "zero_init", "intermediate_loss_weight": 0.3},
}


def some(place, named):
    """All items of a dict; of a tiny run the last one only."""
    return list(named.items())[-1:] if place.is_tiny else list(named.items())


def model_on(place, model_type="gpt_neox", base_changes=None, **fields):
    """(a tiny model on the device, the same in float32 on the CPU), both with the weights of place.dtype."""
    model = tiny.pondering_model(model_type, place.dtype, base_changes, **{"pondering_steps": 2, **fields})
    if model.pondering_gate is not None:
        torch.nn.init.normal_(model.pondering_gate.weight)
    reference = copy.deepcopy(model).float()
    return model.to(place.device), reference


def leaves(place, tokens, vocab_size=997, width=64, tied=False):
    """(hidden states, head, bias, table) on the device, and the same in float64 on the CPU, each with gradients."""
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab_size, width) / width**0.5 * 2
    table, bias = torch.randn(vocab_size, width), torch.randn(vocab_size)
    on_device, wide = [], []
    for tensor in (hidden, weight, bias, table):
        tensor = tensor.to(place.dtype)
        on_device.append(tensor.to(place.device, copy=True).requires_grad_())
        wide.append(tensor.double().requires_grad_())
    if tied:
        on_device[3], wide[3] = on_device[1], wide[1]
    return on_device, wide


def compare_kernel(place, fast, plain, has_bias=True, tied=False):
    """Values and gradients of `fast` on the device and `plain` on the CPU; in one chunk and in several."""
    chunk_elements = pondering_vocabulary.CHUNK_ELEMENTS
    for elements in (2**26, 16 * 997):
        kept = dict(chunk_elements)
        chunk_elements.update(dict.fromkeys([*kept, place.device.type], elements))
        try:
            tensors, wide = leaves(place, 37, tied=tied)
            if not has_bias:
                tensors[2] = wide[2] = None
            found, expected = fast(*tensors), plain(*wide)
            direction = torch.randn(expected.shape)
            (found * direction.to(found)).sum().backward()
            (expected * direction.double()).sum().backward()
        finally:
            chunk_elements.clear()
            chunk_elements.update(kept)
        place.close(found, expected)
        for tensor, reference in zip(tensors, wide, strict=True):
            if tensor is not None and reference.grad is not None:  # the loss does not read the table
                assert tensor.grad is not None, "a gradient is missing"
                place.close(tensor.grad, reference.grad, 2.0)


@check()
def kernel_of_the_whole_vocabulary(place):
    for cap, factor, has_bias, tied in ((None, 1.0, True, False), (1.5, 0.5, False, False), (None, 2.0, False, True)):
        compare_kernel(
            place,
            lambda h, w, b, t, cap=cap, factor=factor: vocabulary_embedding(h, Readout(w, b, cap, factor), t, 0.7),
            lambda h, w, b, t, cap=cap, factor=factor: plain_embedding(
                Readout(w, b, cap, factor).finish(functional.linear(h, w, b)), t, 0.7
            ),
            has_bias,
            tied,
        )


@check()
def kernel_of_the_k_largest(place):
    # Of bfloat16 scores other tokens are the last of the K; their weights are small where K is not.
    for top_k, cap, has_bias in ((200, None, True), (400, 3.0, False), (997, None, False)):
        compare_kernel(
            place,
            lambda h, w, b, t, k=top_k, cap=cap: top_k_embedding(h, Readout(w, b, cap), t, 0.7, k),
            lambda h, w, b, t, k=top_k, cap=cap: plain_embedding(
                Readout(w, b, cap).finish(functional.linear(h, w, b)), t, 0.7, k
            ),
            has_bias,
        )


@check()
def kernel_of_the_loss(place):
    labels = torch.randint(0, 997, (1, 37))
    labels[0, 5:9] = -100
    for cap, factor, items in ((None, 1.0, None), (1.5, 0.5, torch.tensor(50))):
        count = None if items is None else items.to(place.device)
        compare_kernel(
            place,
            lambda h, w, b, t, cap=cap, factor=factor, count=count: linear_causal_lm_loss(
                h[None], Readout(w, b, cap, factor), labels.to(place.device), count
            ),
            lambda h, w, b, t, cap=cap, factor=factor, items=items: causal_lm_loss(
                Readout(w, b, cap, factor).finish(functional.linear(h, w, b))[None], labels, items
            ),
        )


@check()
def kernels_at_the_size_of_a_real_vocabulary(place):
    tokens, vocab_size, width = (40, 997, 64) if place.is_tiny else (6000, 50304, 256)
    hidden, weight = (torch.randn(size, width, device=place.device).to(place.dtype) for size in (tokens, vocab_size))
    table, readout = torch.randn_like(weight), Readout(weight / width**0.5)
    sample = torch.arange(0, tokens, max(1, tokens // 40), device=place.device)
    scores = readout.finish(functional.linear(hidden[sample], readout.weight)).float()
    with torch.no_grad():
        place.close(vocabulary_embedding(hidden, readout, table, 1.0)[sample], plain_embedding(scores, table.float()))
        found = top_k_embedding(hidden, readout, table, 1.0, 100)[sample].float()
    expected = plain_embedding(scores, table.float(), 1.0, 100)
    # Rounding may put another token in the hundredth place, here and there; of bfloat16 scores many are equal.
    errors = ((found - expected).norm(dim=1) / expected.norm(dim=1)).sort().values[:-2]
    assert errors.max() <= 4 * place.tolerance, f"off by {errors.max():.1e} of a row's norm"


@check()
def whole_texts_of_every_backbone(place):
    ids = tiny.token_ids(2, 12)
    for model_type in tiny.SPINE[:2] if place.is_tiny else tiny.SPINE:
        for name, fields in some(place, FIELDS):
            model, reference = model_on(place, model_type, **fields)
            with torch.no_grad():
                found, expected = model(ids.to(place.device)).logits, reference(ids).logits
            try:
                # Random models of this kind amplify rounding, over the layers and from pass to pass.
                place.close(found, expected, 5.0 if place.dtype == torch.float32 else 8.0)
            except AssertionError as error:
                raise AssertionError(f"{model_type}, {name}: {error}") from error


@check(torch.float32)
def gradients_of_whole_models(place):
    ids = tiny.token_ids(2, 12)
    for model_type in ("gpt_neox", "gpt2", "gemma2"):
        for name, fields in some(place, FIELDS):
            model, reference = model_on(place, model_type, **fields)
            model.train().requires_grad_(True)
            reference.train()
            for which in (model, reference):
                device_ids = ids.to(which.device)
                which(device_ids, labels=device_ids).loss.backward()
            # All gradients as one vector: those of a single bias may be rounding and nothing else.
            found, expected = (
                torch.cat([p.grad.flatten().cpu() for p in which.parameters() if p.grad is not None])
                for which in (model, reference)
            )
            try:
                place.close(found, expected, 10.0)
            except AssertionError as error:
                raise AssertionError(f"{model_type}, {name}: {error}") from error


def train_steps(model, ids, count, **autocast):
    """Losses of some AdamW steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(count):
        with torch.autocast(ids.device.type, **autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@check()
def training_steps(place):
    """In float32: plain, checkpointed, compiled. In bfloat16: autocast over float32 weights."""
    is_half = place.dtype != torch.float32
    ids = tiny.token_ids(2, 16).to(place.device)
    for _, fields in some(place, FIELDS):
        model = tiny.pondering_model("gpt_neox", pondering_steps=2, **fields).to(place.device).train()
        twin = copy.deepcopy(model)
        twin.gradient_checkpointing_enable({"use_reentrant": False})
        losses = train_steps(model, ids, 4, enabled=is_half, dtype=torch.bfloat16)
        assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
        again = train_steps(twin, ids, 4, enabled=is_half, dtype=torch.bfloat16)
        place.close(torch.tensor(again), torch.tensor(losses), 10.0)


@check(torch.float32)
def a_compiled_training_step(place):
    """Gradients of compiled steps: without pondering, over the K largest, over the whole vocabulary."""
    ids = tiny.token_ids(2, 16).to(place.device)
    cases = {"S = 0": {"pondering_steps": 0}, "top 20": {"pondering_steps": 1, "pondering_top_k": 20}}
    cases["whole vocabulary"] = {"pondering_steps": 1}
    wrong = []
    for backend in ("aot_eager",) if place.is_tiny else ("aot_eager", "inductor"):
        for name, fields in some(place, cases):
            model = tiny.pondering_model("llama", **fields).to(place.device).train()
            twin = copy.deepcopy(model)
            torch._dynamo.reset()

            def step(ids, labels, twin=twin):
                return twin(ids, labels=labels).loss

            loss, found = model(ids, labels=ids).loss, torch.compile(step, backend=backend)(ids, ids)
            loss.backward()
            found.backward()
            pairs = {"loss": (found, loss)}
            parameters = zip(model.named_parameters(), twin.parameters(), strict=True)
            pairs |= {parameter: (other.grad, one.grad) for (parameter, one), other in parameters}
            for part, pair in pairs.items():
                try:
                    place.close(*pair, 10.0)
                except AssertionError as error:
                    wrong.append(f"{backend}, {name}, {part}: {error}")
    assert not wrong, f"{len(wrong)} wrong: {'; '.join(wrong)}"


@check()
def the_trainer(place):
    """transformers' Trainer moves the model to the accelerator by itself; generation goes on there."""
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tiny.token_ids(8, 16)]
    model = tiny.pondering_model("gpt_neox", pondering_steps=1, pondering_top_k=20)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=3e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=place.dtype == torch.bfloat16,
            use_cpu=place.device.type == "cpu",
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
        assert model.device.type == place.device.type
        prompt = tiny.token_ids(1, 4).to(model.device)
        assert model.eval().generate(prompt, max_new_tokens=3, pad_token_id=0, eos_token_id=None).shape == (1, 7)


@check()
def lora(place):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise LeftOut("peft is not installed") from None
    ids = tiny.token_ids(2, 12).to(place.device)
    model = tiny.pondering_model("llama", place.dtype, pondering_steps=2).to(place.device).train()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"]))
    losses = train_steps(model, ids, 4, enabled=False)
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"


@check()
def checkpoints_onto_the_device(place):
    """Saved and loaded by the library, by their own code, and `from_base` of a plain folder, each straight there."""
    ids = tiny.token_ids(2, 12).to(place.device)
    model, _ = model_on(place, "llama", pondering_top_k=20)
    with torch.no_grad():
        saved = model(ids).logits
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(folder)
        model.to_base().save_pretrained(plain)
        loading = {"device_map": str(place.device), "dtype": place.dtype}
        loaded = {
            "the library": PonderingForCausalLM.from_pretrained(folder, **loading),
            "its own code": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **loading),
            "from_base": PonderingForCausalLM.from_base(plain, pondering_steps=2, pondering_top_k=20, **loading),
        }
        found = {}
        for name, other in loaded.items():
            assert other.device.type == place.device.type, f"{name}: it is on {other.device}"
            with torch.no_grad():
                found[name] = other.eval()(ids).logits
            # Loaded rotations keep float32, those of a model that was converted as a whole do not.
            place.close(found[name], saved, 1.0 if place.dtype == torch.float32 else 8.0)
            assert torch.equal(found[name], found["the library"]), f"{name}: other logits"


@check(torch.float32)
def memory_of_a_training_step(place):
    """No (tokens, vocabulary) tensor is kept: the peak stays far below what the logits of all passes take."""
    if peak_memory(place.device) is None:
        raise LeftOut("torch does not tell the memory of this device")
    vocab_size, tokens = 50304, 4 * 2048
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": 2048}
    model = tiny.pondering_model("gpt_neox", base_changes=sizes, pondering_steps=3)
    model = model.to(place.device).train()
    ids = torch.randint(3, vocab_size, (4, 2048), device=place.device)
    kept = dict(pondering_vocabulary.CHUNK_ELEMENTS)
    pondering_vocabulary.CHUNK_ELEMENTS[place.device.type] = 2**24
    try:
        model(ids, labels=ids).loss.backward()
    finally:
        pondering_vocabulary.CHUNK_ELEMENTS.update(kept)
    one = 4 * vocab_size * tokens / 1e9
    assert peak_memory(place.device) < one, f"{peak_memory(place.device):.2f} GB, one pass's logits take {one:.2f}"
