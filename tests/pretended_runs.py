"""A program: pondering models on two GPUs that are not there. Prints what happened as JSON; see test_devices.py."""

import json
import sys

import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pretended import Pretended, Watch, put

from ponder_hf import PonderingForCausalLM
from ponder_hf.modeling import pondering_backbone, pondering_generate_speculation


EAGER = {"attn_implementation": "eager"}  # the others choose a kernel by the device
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FIELDS = {
    "top 20": {"pondering_top_k": 20},
    "gate, intermediate losses": {"pondering_gate": "zero_init", "intermediate_loss_weight": 0.3},
}
CALLS = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "drafts": {"num_draft_tokens": 2, "draft_source": "own"},
    "drafts by heads": {"num_draft_tokens": 2, "draft_source": "heads"},
    "drafts by prompt lookup": {"num_draft_tokens": 2, "draft_source": "prompt_lookup"},
    "exits": {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.3},
    "exits by argmax": {"pondering_exit_criterion": "argmax", "pondering_exit_threshold": 0.9},
}


def model_of(fields):
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", base_changes=EAGER, pondering_steps=2, **fields)
    model.add_draft_heads()
    if model.pondering_gate is not None:
        torch.nn.init.normal_(model.pondering_gate.weight)
    return model


def spread(model, first, second):
    """The model over two devices, with the hooks that accelerate's dispatch_model sets for a device_map."""
    backbone = model.backbone
    decoder = backbone.model
    for device, parts in {
        first: (decoder.embed_tokens, decoder.layers[0], decoder.rotary_emb),
        second: (decoder.layers[1], decoder.norm, backbone.lm_head, model.pondering_gate, model.draft_heads),
    }.items():
        for part in parts:
            if part is None:
                continue
            put(part, device)
            for module in part.modules():
                if module is part or module.state_dict():
                    add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    add_hook_to_module(
        model, AlignDevicesHook(execution_device=first, io_same_device=True, skip_keys="past_key_values")
    )
    return model


def gradients(model, inputs):
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]


def on_two_devices():
    """{what: "ok" or what went wrong} for each call and a training step, against the same model on the CPU."""
    found = {}
    ids, mask = tiny.left_padded([tiny.token_ids(6), tiny.token_ids(4, seed=3)])
    inputs = {"input_ids": ids, "attention_mask": mask}
    for (name, fields), devices in zip(
        FIELDS.items(), (("pretend:0", "pretend:1"), ("pretend:1", "pretend:0")), strict=True
    ):
        model = model_of(fields)
        expected = {call: model.generate(**inputs, **GREEDY, **settings) for call, settings in CALLS.items()}
        wanted = gradients(model, inputs)
        model.eval().zero_grad()
        spread(model, *devices)
        with Watch():
            there = {key: value.to(devices[0]) for key, value in inputs.items()}
            for call, settings in CALLS.items():
                try:
                    tokens = model.generate(**there, **GREEDY, **settings)
                    outcome = "ok" if torch.equal(tokens.cpu(), expected[call]) else "other tokens"
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"[:300]
                found[f"{name}, {call}"] = outcome
            try:
                for one, other in zip(gradients(model, there), wanted, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
                found[f"{name}, training"] = "ok"
            except Exception as error:
                found[f"{name}, training"] = f"{type(error).__name__}: {error}"[:300]
        found[f"converted there, {name}"] = converted(inputs, devices)
    return found


def converted(inputs, devices):
    """A base that lies on two devices is made to ponder there; while its new gate is shut it generates as before."""
    model = model_of({})
    base = model.to_base()
    expected = base.generate(**inputs, **GREEDY)
    spread(model, *devices)
    with Watch():
        try:
            again = PonderingForCausalLM.from_base(base, pondering_steps=2, pondering_gate="zero_init")
            tokens = again.generate(**{key: value.to(devices[0]) for key, value in inputs.items()}, **GREEDY)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]
    if again.pondering_gate.weight.device != torch.device(devices[0]):
        return f"the gate is on {again.pondering_gate.weight.device}, where no embedding is"
    return "ok" if torch.equal(tokens.cpu(), expected) else "other tokens"


def waits_a_tick():
    """{call: how often the host waits for the device in a tick}; a tick of plain decoding is a token."""
    # A pretended tensor is none of torch's own types, for which alone it says yes.
    pondering_backbone._is_bare = lambda module: type(module.weight) is Pretended  # so that the kernels are used
    model = put(model_of(FIELDS["top 20"]), "pretend:0")
    assert model.pondering_kernel == "top_k"
    run, ticks, found = pondering_generate_speculation.Speculation.run, [], {}

    def run_and_count(speculation):
        run(speculation)
        ticks.append(speculation.wave.num_ticks)
        return speculation

    pondering_generate_speculation.Speculation.run = run_and_count
    with Watch() as watch:
        ids = tiny.token_ids(2, 6).to("pretend:0")
        calls = {"plain": (model.to_base(), {})} | {name: (model, settings) for name, settings in CALLS.items()}
        for name, (which, settings) in calls.items():
            if name in ("uncached", "static cache"):
                continue
            counts = []
            for number in (5, 10):
                watch.waits.clear()
                ticks[:] = [number]
                which.generate(ids, **{**GREEDY, "max_new_tokens": number}, **settings)
                counts.append((sum(watch.waits.values()), ticks[-1]))
            found[name] = (counts[1][0] - counts[0][0]) / (counts[1][1] - counts[0][1])
        model.train()
        watch.waits.clear()
        model(ids, labels=ids).loss.backward()
        found["training step"] = sum(watch.waits.values())
        half = put(tiny.pondering_model("llama", torch.bfloat16, EAGER, pondering_top_k=20), "pretend:0").train()
        half(ids, labels=ids).loss.backward()  # by operations that GPUs have in bfloat16
    return found


if __name__ == "__main__":
    print(json.dumps({"two devices": on_two_devices(), "waits": waits_a_tick()}), file=sys.stdout)
