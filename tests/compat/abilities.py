"""What a pondering checkpoint can do. The same functions run here, on the library's own model, and elsewhere.

`make compat` starts this file in an environment with another transformers and without ponder_hf. Arguments: the folder
that written.py filled, a folder to save in, and "supported" or "refused", whichever is expected. It prints one JSON
object: "versions", "deprecations", and "outcomes", {ability: {checkpoint: null or what went wrong}}.
"""

import dataclasses
import json
import logging
import sys
import warnings
from pathlib import Path

import huggingface_hub
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig


REFUSED = "refused in words"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32; logits are of the order of 10


class Refused(Exception):
    """An ability that this version of transformers lacks was refused in words."""


def prompt():
    """Token ids (2, 10) and their mask: the first row is left-padded by three."""
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def logits(model):
    """The logits of the prompt, of the last pass and of those before."""
    ids, mask = prompt()
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_pondering=True)
    passes = {f"pass {index}": tensor for index, tensor in enumerate(output.pondering_logits)}
    return {name: tensor[mask.bool()] for name, tensor in {**passes, "last pass": output.logits}.items()}


def cached(model):
    """Greedy tokens, which must be the same with and without a cache."""
    ids, mask = prompt()
    tokens = model.generate(ids, attention_mask=mask, **GREEDY)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(tokens, uncached), "cached and uncached generation differ"
    return {"tokens": tokens}


def drafts(model):
    """Greedy tokens with drafts, which must be those without, and the share of drafts that were right."""
    ids, mask = prompt()
    output = model.generate(ids, attention_mask=mask, num_draft_tokens=3, return_dict_in_generate=True, **GREEDY)
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(output.sequences, plain), "drafts change the text"
    return {"acceptance": torch.tensor(output.draft_acceptance_rate, dtype=torch.float32)}


def exits(model):
    """Greedy tokens with early exits and the steps that each took; the backbone must have computed fewer tokens."""
    ids, mask = prompt()
    with torch.no_grad():
        first = model(ids, attention_mask=mask, output_pondering=True).pondering_logits[0][mask.bool()]
    threshold = torch.distributions.Categorical(logits=first).entropy().mean().item()
    counts = []

    def count(module, arguments, keywords):
        counts[-1] += keywords["inputs_embeds"].shape[:2].numel()

    handle = model.backbone.base_model.register_forward_pre_hook(count, with_kwargs=True)
    results = []
    for early in ({"pondering_exit_criterion": "entropy", "pondering_exit_threshold": threshold}, {}):
        counts.append(0)
        results.append(model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **early, **GREEDY))
    handle.remove()
    assert counts[0] < counts[1], f"{counts[0]} tokens were computed with early exits and {counts[1]} without"
    assert len(results[0].pondering_steps_used.unique()) > 1, "the threshold tells no tokens apart"
    return {"tokens": results[0].sequences, "steps": results[0].pondering_steps_used}


def small_paged_cache():
    """Keyword arguments of `generate_batch` for few pages; by default it takes most of the memory."""
    config_class = getattr(transformers, "ContinuousBatchingConfig", None)
    if config_class is None:
        return {}
    names = {field.name for field in dataclasses.fields(config_class)}
    page = "page_size" if "page_size" in names else "block_size"
    return {"continuous_batching_config": config_class(num_blocks=16, max_batch_tokens=32, **{page: 16})}


def batching(model):
    """Continuous batching gives each request what `generate` gives it alone."""
    requests = [list(range(3, 13)), list(range(15, 21))]
    alone = [model.generate(torch.tensor([each]), **GREEDY)[0, len(each) :].tolist() for each in requests]
    settings = GenerationConfig(**{**GREEDY, "eos_token_id": -1})
    try:
        results = model.generate_batch(requests, settings, **small_paged_cache())
    except ValueError as error:
        if "continuous batching" in str(error) and "needs a newer transformers" in str(error):
            raise Refused from error
        raise
    assert [result.generated_tokens for result in results.values()] == alone, "batched and alone differ"
    return {"tokens": torch.tensor(alone)}


def memory(model):
    """A training step must keep no logits whole: in its output stands what makes them when they are read."""
    ids, mask = prompt()
    model.train()
    output = model(ids, attention_mask=mask, labels=ids)
    kept = dict(zip(output.keys(), output.values(), strict=True))
    model.eval()
    assert not torch.is_tensor(kept["logits"]), "a training step makes the logits, which nobody has read"
    return {"logits": output.logits.detach()[mask.bool()]}


def training(model):
    """The loss before and after one step of AdamW on the prompt, and the norm of the gradient. Changes the model."""
    ids, mask = prompt()
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100)  # what follows padding is predicted from it: undefined
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    gradients = [each.grad.norm() for each in model.parameters() if each.grad is not None]
    optimizer.step()
    after = model(ids, attention_mask=mask, labels=labels).loss
    model.eval()
    assert after < loss, "the loss did not fall"
    return {"losses": torch.stack([loss, after]).detach(), "gradient": torch.stack(gradients).norm()}


# What is measured on a model, by the name of its column. Training comes last, since it changes the weights.
MEASURED = {
    "logits": logits,
    "cached": cached,
    "drafts": drafts,
    "exits": exits,
    "batching": batching,
    "memory": memory,
    "training": training,
}
ABILITIES = ("loading", *MEASURED, "saving")


def measure(model, ability):
    """What a model does, as {"ability: quantity": tensor}."""
    return {f"{ability}: {name}": tensor.contiguous() for name, tensor in MEASURED[ability](model).items()}


def compare(found, expected, ability):
    """Raise AssertionError unless the measurement is the expected one; whole numbers must be equal."""
    expected = {name: tensor for name, tensor in expected.items() if name.startswith(f"{ability}: ")}
    assert found.keys() == expected.keys(), f"{sorted(found)} was measured and {sorted(expected)} expected"
    for name, tensor in expected.items():
        exact = not tensor.is_floating_point()
        tolerance = {"rtol": 0, "atol": 0} if exact else TOLERANCE
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def load(folder):
    """Load a checkpoint by all three Auto classes, from its own code. Returns the causal language model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert {type(each).__module__.partition(".")[0] for each in (config, decoder, model)} == {"transformers_modules"}
    ids, mask = prompt()
    with torch.no_grad():
        hidden = decoder.eval()(ids, attention_mask=mask).last_hidden_state
        whole = model.eval()(ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(hidden, whole.hidden_states[-1]), "AutoModel computes something else than the language model"
    return model


def save(model, folder, code):
    """Save a model and load the copy, which must have the same code and logits. The logits are saved beside it."""
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("*.py")) == code, "the copy has other code files"
    expected = measure(model, "logits")
    for name, tensor in measure(load(folder), "logits").items():
        assert torch.equal(tensor, expected[name]), f"{name} of the copy"
    save_file(expected, folder.with_suffix(".safetensors"))


def try_checkpoint(folder, copy):
    """Map each ability to None, to REFUSED, or to the first line of what went wrong, for one checkpoint.

    One that does not load has no other abilities.
    """
    outcomes = {}
    expected = load_file(folder.with_suffix(".safetensors"))

    def attempt(ability, action):
        outcomes[ability] = None
        try:
            return action()
        except Refused:
            outcomes[ability] = REFUSED
        except Exception as error:
            outcomes[ability] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        return None

    model = attempt("loading", lambda: load(folder))
    if model is None:
        return outcomes
    for ability in MEASURED:
        attempt(ability, lambda ability=ability: compare(measure(model, ability), expected, ability))
    attempt("saving", lambda: save(model, copy, sorted(path.name for path in folder.glob("*.py"))))
    return outcomes


def try_refusal(folder):
    """Map "loading" to None if every Auto class names the range of versions instead of loading the checkpoint."""
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
        try:
            auto_class.from_pretrained(folder, trust_remote_code=True)
        except ValueError as error:
            if f"transformers {transformers.__version__} is outside >=" not in str(error):
                return {"loading": f"{auto_class.__name__}: {error}"}
        else:
            return {"loading": f"{auto_class.__name__} loads it"}
    return {"loading": None}


class Deprecations(logging.Handler):
    """Collects what transformers, or the checkpoint's code inside it, calls deprecated: in warnings and in its log."""

    def __init__(self):
        super().__init__(level=logging.WARNING)
        self.messages = []

    def emit(self, record):
        if "deprecated" in record.getMessage():
            self.messages.append(record.getMessage())

    def show_warning(self, message, category, filename, *rest):
        names = {"transformers", "transformers_modules"}  # the latter is where remote code lies
        if issubclass(category, (DeprecationWarning, FutureWarning)) and names & set(Path(filename).parts):
            self.messages.append(f"{category.__name__}: {message}")


def main(source, copies, expectation):
    deprecations = Deprecations()
    logging.getLogger("transformers").addHandler(deprecations)
    warnings.resetwarnings()
    warnings.simplefilter("always")
    warnings.showwarning = deprecations.show_warning
    outcomes = {}
    for folder in sorted(path.parent for path in Path(source).glob("*/config.json")):
        if expectation == "refused":
            found = try_refusal(folder)
        else:
            found = try_checkpoint(folder, Path(copies) / folder.name)
        for ability, problem in found.items():
            outcomes.setdefault(ability, {})[folder.name] = problem
    versions = {
        "transformers": transformers.__version__,
        "huggingface-hub": huggingface_hub.__version__,
        "tokenizers": tokenizers.__version__,
        "torch": torch.__version__.partition("+")[0],
    }
    assert "ponder_hf" not in sys.modules
    print(json.dumps({"versions": versions, "deprecations": sorted(set(deprecations.messages)), "outcomes": outcomes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
