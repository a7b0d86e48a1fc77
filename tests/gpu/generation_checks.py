"""Generation on the device: caches, drafts, exits, static caches and graphs, continuous batching, offloading."""

import dataclasses
import tempfile

import tiny
import torch
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.utils import is_accelerate_available

from ponder_hf import PonderingError, PonderingForCausalLM

from .checks import FIELDS, model_on, some
from .machine import count_waits
from .registry import LeftOut, check


GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
BACKBONES = ("gpt_neox", "llama", "gemma2")


def variants(place):
    """(name, a model on the device, a left-padded batch on it)."""
    ids, mask = tiny.left_padded([tiny.token_ids(9, seed=1), tiny.token_ids(4, seed=2)])
    prompt = {"input_ids": ids.to(place.device), "attention_mask": mask.to(place.device)}
    for model_type in BACKBONES[:1] if place.is_tiny else BACKBONES:
        for name, fields in some(place, FIELDS):
            yield f"{model_type}, {name}", model_on(place, model_type, **fields)[0], prompt


def plausible(place, model, prompt, sequences):
    """Raise unless each new token is the best of a whole forward pass over the text, up to rounding."""
    width = prompt["input_ids"].shape[1]
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(sequences[:, width:])], dim=1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, position_ids=position_ids, use_cache=False).logits.float()
    logits = logits[:, width - 1 : -1]
    chosen = logits.gather(-1, sequences[:, width:, None])[..., 0]
    worst = ((logits.amax(-1) - chosen) / logits.std(-1)).max().item()
    limit = 1e-2 if place.dtype == torch.float32 else 1.0
    assert worst <= limit, f"a token lies {worst:.2f} standard deviations below the best of its place"


def same_tokens(place, model, prompt, found, expected, name):
    """In float32 the same tokens; in bfloat16, where rounding decides some, tokens that are plausible."""
    if place.dtype == torch.float32:
        assert torch.equal(found, expected), f"{name}: other tokens"
        return
    try:
        plausible(place, model, prompt, found)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


@check()
def with_and_without_a_cache(place):
    for name, model, prompt in variants(place):
        cached = model.generate(**prompt, **GREEDY)
        uncached = model.generate(**prompt, **GREEDY, use_cache=False)
        same_tokens(place, model, prompt, cached, uncached, name)


@check()
def drafts_are_the_greedy_text(place):
    for name, model, prompt in variants(place):
        model.add_draft_heads()
        expected = model.generate(**prompt, **GREEDY)
        for source in ("own", "heads", "prompt_lookup"):
            found = model.generate(**prompt, **GREEDY, num_draft_tokens=4, draft_source=source)
            same_tokens(place, model, prompt, found, expected, f"{name}, {source}")


@check(torch.float32)
def drafts_change_no_sample(place):
    for name, model, prompt in variants(place):
        found = []
        for num_drafts in (1, 3):
            torch.manual_seed(7)
            settings = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 0}
            found.append(model.generate(**prompt, **settings, num_draft_tokens=num_drafts))
        assert torch.equal(*found), f"{name}: other samples"


@check()
def exits(place):
    for name, model, prompt in variants(place):
        settings = {**GREEDY, "return_dict_in_generate": True}
        plain = model.generate(**prompt, **settings)
        for criterion in ("kl", "entropy", "argmax"):
            exit = {"pondering_exit_criterion": criterion}
            never = model.generate(**prompt, **settings, **exit, pondering_exit_threshold=0.0)
            same_tokens(place, model, prompt, never.sequences, plain.sequences, f"{name}, {criterion}, never")
            assert (never.pondering_steps_used == 2).all()
            soon = model.generate(**prompt, **settings, **exit, pondering_exit_threshold=1e6)
            first = 1 if criterion == "kl" else 0  # which measures nothing, or 1, after pass 0
            assert (soon.pondering_steps_used == first).all(), f"{name}, {criterion}: not at once"
            some = model.generate(**prompt, **settings, **exit, pondering_exit_threshold=0.3)
            assert some.pondering_steps_used.shape == (2, GREEDY["max_new_tokens"])
        if place.dtype == torch.float32:
            mixed = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.3}
            cached = model.generate(**prompt, **GREEDY, **mixed)
            assert torch.equal(cached, model.generate(**prompt, **GREEDY, **mixed, use_cache=False)), name


@check()
def a_static_cache(place):
    for name, model, prompt in variants(place):
        expected = model.generate(**prompt, **GREEDY)
        found = model.generate(**prompt, **GREEDY, cache_implementation="static", disable_compile=True)
        same_tokens(place, model, prompt, found, expected, name)


@check(torch.float32)
def a_static_cache_compiled(place):
    """As `generate` compiles by itself on a GPU, with CUDA graphs there; in one graph, with no recompilation."""
    skipped = 0
    for _, fields in some(place, dict(list(FIELDS.items())[1:])):
        model = model_on(place, "llama", **fields)[0]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = CompileConfig(backend="aot_eager", mode=None) if place.is_tiny else CompileConfig()
        config.dynamic, config.fullgraph, config._compile_all_devices = False, True, True
        for length in (9, 5):
            ids = tiny.token_ids(1, length).to(place.device)
            expected = model.generate(ids, **GREEDY)
            found = model.generate(ids, **GREEDY, cache_implementation="static", compile_config=config)
            assert torch.equal(found, expected), "other tokens"
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == 1, f"{counters['stats']['unique_graphs']} graphs"
        skipped += counters["inductor"]["cudagraph_skips"]
    torch._dynamo.reset()
    return f"CUDA graphs were skipped {skipped} times" if skipped else None


class Graph:
    """Greedy decoding of one token, captured once as a CUDA graph and replayed; elsewhere, the same without a graph.

    ids: (B, 1), the newest tokens; each call replaces them.
    """

    def __init__(self, model, prompt, max_length, **settings):
        self.model, self.settings, device = model, settings, prompt.device
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=max_length)
        self.columns = torch.arange(max_length, device=device)
        with torch.no_grad():
            output = model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **settings)
        self.ids = output.logits[:, -1:].argmax(-1)
        self.position_ids = torch.full_like(self.ids, prompt.shape[1])
        self.graph = None
        if device.type == "cuda":
            self._capture()

    def _states(self):
        lengths = [getattr(layer, "cumulative_length", None) for layer in self.cache.layers]
        return [self.ids, self.position_ids, *(tensor for tensor in lengths if torch.is_tensor(tensor))]

    def _capture(self):
        kept = [tensor.clone() for tensor in self._states()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
        for tensor, value in zip(self._states(), kept, strict=True):
            tensor.copy_(value)

    @torch.no_grad()
    def _step(self):
        mask = (self.columns <= self.position_ids)[:, None, None]
        output = self.model(
            self.ids,
            position_ids=self.position_ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **self.settings,
        )
        self.ids.copy_(output.logits[:, -1:].argmax(-1))
        self.position_ids.add_(1)

    def __call__(self):
        """Decode one token; returns `ids`."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.ids


@check()
def a_captured_graph(place):
    """Decoding waits for nothing, so that CUDA can record and replay it."""
    for _, fields in some(place, FIELDS):
        model = model_on(place, "llama", **fields)[0]
        ids = tiny.token_ids(2, 6).to(place.device)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(**prompt, **GREEDY)
        graph = Graph(model, ids, 32)
        tokens = [graph.ids.clone()]
        tokens += [graph().clone() for _ in range(GREEDY["max_new_tokens"] - 1)]
        same_tokens(place, model, prompt, torch.cat([ids, *tokens], dim=1), expected, str(fields))


@check()
def who_waits_for_the_device(place):
    """A decoding step waits for nothing; a training step no more than its passes, which look for packed texts."""
    if place.device.type != "cuda":
        raise LeftOut("only CUDA tells who waits")
    plain = tiny.base_model("llama", place.dtype).to(place.device)
    decoding, training = _waits(plain)
    found = [f"plain: {decoding} and {training}"]
    for name, fields in some(place, FIELDS):
        model = model_on(place, "llama", **fields)[0]
        ours = _waits(model)
        found.append(f"{name}: {ours[0]} and {ours[1]}")
        passes = model.config.pondering_steps + 1
        assert ours[0] <= decoding * passes, "; ".join(found)
        assert ours[1] <= training * passes, "; ".join(found)
    return "waits of a decoding and a training step: " + "; ".join(found)


def _waits(model):
    ids = tiny.token_ids(2, 6).to(model.device)
    position_ids = torch.full_like(ids[:, :1], 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

        def decode():
            model(ids[:, :1], position_ids=position_ids, past_key_values=cache, use_cache=True)

        decode()  # the first call may set things up
        decoding = count_waits(decode)
    model.train()

    def train():
        model(ids, labels=ids, use_cache=False)["loss"].backward()

    train()
    return decoding, count_waits(train)


@check()
def continuous_batching(place):
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        raise LeftOut("this transformers has no ContinuousBatchingConfig") from None
    model = model_on(place, "llama", pondering_top_k=20)[0]
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    sizes = {"num_blocks": 8, "max_batch_tokens": 16, "page_size" if "page_size" in known else "block_size": 4}
    rows = [tiny.token_ids(length, seed=length).tolist() for length in (5, 20, 2)]
    try:
        results = model.generate_batch(
            rows,
            GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
        )
    except PonderingError as error:
        raise LeftOut(str(error)) from error
    assert len(results) == len(rows), f"{len(results)} of {len(rows)} requests came back"
    for row, result in zip(rows, results.values(), strict=True):
        ids = torch.tensor([row], device=place.device)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(**prompt, **{**GREEDY, "max_new_tokens": 8})
        found = torch.tensor([row + list(result.generated_tokens)], device=place.device)
        assert found.shape == expected.shape, f"{found.shape[1]} tokens, not {expected.shape[1]}: {result.error}"
        same_tokens(place, model, prompt, found, expected, f"a prompt of {len(row)} tokens")


def _everything(place, model, prompt, expected, name):
    """Generation, drafts, exits and a training step of a model that accelerate has spread."""
    found = model.generate(**prompt, **GREEDY)
    same_tokens(place, model, prompt, found, expected, name)
    found = model.generate(**prompt, **GREEDY, num_draft_tokens=3)
    same_tokens(place, model, prompt, found, expected, f"{name}, drafts")
    exit = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": 0.0}
    same_tokens(place, model, prompt, model.generate(**prompt, **GREEDY, **exit), expected, f"{name}, exits")


@check()
def device_map_auto_and_offloaded(place):
    """On one GPU `device_map="auto"` puts all there; with little memory some layers wait on the CPU or on disk."""
    if not is_accelerate_available():
        raise LeftOut("accelerate is not installed")
    for _, fields in some(place, FIELDS):
        model = model_on(place, "llama", **fields)[0]
        ids = tiny.token_ids(2, 6).to(place.device)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(**prompt, **GREEDY)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PonderingForCausalLM.from_pretrained(folder, device_map="auto", dtype=place.dtype)
            _everything(place, loaded, prompt, expected, "auto")
            loaded.train()
            loaded(ids, labels=ids).loss.backward()
            here, away = str(place.device), "disk" if place.device.type == "cpu" else "cpu"
            names = ("backbone.model.rotary_emb", "backbone.model.norm", "backbone.lm_head", "backbone.model.layers.0")
            where = dict.fromkeys([*names, *(["pondering_gate"] if model.pondering_gate is not None else [])], here)
            where |= {"backbone.model.embed_tokens": away, "backbone.model.layers.1": away}
            with tempfile.TemporaryDirectory() as offloaded:
                loaded = PonderingForCausalLM.from_pretrained(
                    folder, device_map=where, dtype=place.dtype, offload_folder=offloaded
                )
                _everything(place, loaded, prompt, expected, "half of it elsewhere")


@check(torch.float32)
def moving_between_devices(place):
    """A cache goes on after a copy of the model has been made; a model moved to the CPU and back gives the same."""
    model = model_on(place, "gpt_neox")[0]
    ids = tiny.token_ids(1, 6).to(place.device)
    expected = model.generate(ids, **GREEDY)
    half = {**GREEDY, "max_new_tokens": GREEDY["max_new_tokens"] // 2}
    first = model.generate(ids, **half, return_dict_in_generate=True)
    model.to("cpu").to(place.device)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    found = model.generate(first.sequences, past_key_values=first.past_key_values, **half)
    assert torch.equal(found, expected), "a cache went on with other tokens"
