"""Read and change the hidden state of layer l in pass i, with nothing but PyTorch's hooks.

    python examples/hooks.py MODEL "clean prompt" "corrupted prompt"

MODEL is a pondering checkpoint. A forward pass runs every layer of the backbone S + 1 times, so a hook on a layer is
called once a pass: its k-th call within a forward pass is pass k. That is all that tools which look at models by hooks
need to know. The names are the backbone's own, below `backbone.`.

As an example, activation patching: which layer of which pass carries what tells two prompts apart? Both must have the
same number of tokens. The state of the last token of the clean prompt is put into the run of the corrupted one, one
layer and pass at a time, and the table shows how much of the difference that brings back: 0 nothing, 1 all of it. What
is measured is the logit of the clean prompt's most probable next token less that of the corrupted one's.
"""

import argparse
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ponder_hf  # noqa: F401 - makes the Auto classes know pondering models


def layers_of(model):
    """The backbone's layers, of whatever architecture."""
    count = model.config.num_hidden_layers
    return next(each for each in model.backbone.modules() if isinstance(each, nn.ModuleList) and len(each) == count)


@contextmanager
def on_pass(model, layer, pass_index, change):
    """While this is open, `change(hidden_state)` sees what a layer puts out in one pass of each forward pass.

    Args:
        model: a pondering model.
        layer: the index of the layer, from 0.
        pass_index: from 0 to S.
        change: called with the hidden state (B, T, d). What it gives back takes its place; None leaves it.
    """
    calls = 0

    def begin(module, arguments):
        nonlocal calls
        calls = 0

    def after_layer(module, arguments, output):
        nonlocal calls
        calls += 1
        if calls != pass_index + 1:
            return None
        is_tuple = isinstance(output, tuple)  # some layers put out more than the hidden state
        changed = change(output[0] if is_tuple else output)
        return output if changed is None else (changed, *output[1:]) if is_tuple else changed

    hooks = [model.register_forward_pre_hook(begin), layers_of(model)[layer].register_forward_hook(after_layer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read(model, input_ids, layer, pass_index):
    """The hidden state (B, T, d) that a layer puts out in a pass."""
    found = []
    with torch.no_grad(), on_pass(model, layer, pass_index, found.append):
        model(input_ids, use_cache=False)
    return found[0]


def patched(model, input_ids, layer, pass_index, state, position):
    """The logits (B, T, V) of the model where the hidden state at one position is replaced by `state` (B, d)."""

    def change(hidden_state):
        hidden_state = hidden_state.clone()
        hidden_state[:, position] = state
        return hidden_state

    with torch.no_grad(), on_pass(model, layer, pass_index, change):
        return model(input_ids, use_cache=False).logits


def recovered(model, clean, corrupted, position=-1):
    """How much of the difference of two prompts each state of the clean one brings back in the run of the other.

    Args:
        model: a pondering model.
        clean, corrupted: token ids (1, T) each.
        position: of the states that are patched.

    Returns:
        (S + 1, layers): 0 where patching does nothing, 1 where it makes the prediction that of the clean prompt.
    """
    with torch.no_grad():
        runs = [model(ids, use_cache=False).logits[0, -1] for ids in (clean, corrupted)]
    right, wrong = (logits.argmax() for logits in runs)

    def difference(logits):
        return logits[right] - logits[wrong]

    best, worst = map(difference, runs)
    if right == wrong:
        raise SystemExit("both prompts predict the same next token: there is nothing to bring back")
    table = torch.zeros(model.config.pondering_steps + 1, model.config.num_hidden_layers)
    for pass_index, row in enumerate(table):
        for layer in range(len(row)):
            state = read(model, clean, layer, pass_index)[:, position]
            logits = patched(model, corrupted, layer, pass_index, state, position)
            row[layer] = (difference(logits[0, -1]) - worst) / (best - worst)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("clean", help="a prompt")
    parser.add_argument("corrupted", help="another one of the same number of tokens")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    clean, corrupted = (
        tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        for text in (arguments.clean, arguments.corrupted)
    )
    if clean.shape != corrupted.shape:
        raise SystemExit(f"the prompts have {clean.shape[1]} and {corrupted.shape[1]} tokens: give two of one length")
    table = recovered(model, clean, corrupted)
    print("recovered   " + " ".join(f"layer {layer:<3}" for layer in range(table.shape[1])))
    for pass_index, row in enumerate(table):
        print(f"pass {pass_index:<6} " + " ".join(f"{value:9.3f}" for value in row.tolist()))


if __name__ == "__main__":
    main()
