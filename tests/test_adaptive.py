"""Adaptive pondering: passes that are not needed do not run, and what they would have left behind is defined."""

import pytest
import tiny
import torch
from transformers import DynamicCache
from transformers.generation import utils

from ponder_hf import PonderingError, PonderingForCausalLM
from ponder_hf.modeling import pondering_vocabulary
from ponder_hf.modeling.pondering_cache import CACHE_NAME
from ponder_hf.modeling.pondering_generate_exits import CRITERIA, PonderingExit


STEPS = 3
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}


def kl(logits, before):
    if before is None:
        return float("inf")
    return (logits.softmax(-1) * (logits.log_softmax(-1) - before.log_softmax(-1))).sum().item()


def entropy(logits, before):
    return torch.distributions.Categorical(logits=logits).entropy().item()


def argmax(logits, before):
    if before is None or logits.argmax() != before.argmax():
        return 1.0
    return 1 - logits.softmax(-1).max().item()


DISTANCES = {"kl": kl, "entropy": entropy, "argmax": argmax}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_measures_the_distance_that_it_is_named_after(criterion):
    logits, before = 3 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before[:3] += 2 * logits[:3]  # so that some of both have the same largest
    expected = [DISTANCES[criterion](*pair) for pair in zip(logits, before, strict=True)]
    assert CRITERIA[criterion]()(logits, before).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_token_stops_below_the_threshold_not_at_it():
    early = PonderingExit(lambda logits, before: torch.tensor([0.25, 0.5, 0.75]), 0.5)
    assert early.converged(torch.zeros(3, 2), None).tolist() == [True, False, False]


def plain_adaptive(backbone, row, steps, distance, threshold):
    """Adaptive pondering token by token, by nothing but the backbone with one cache a pass. row: (T,).

    Returns for each token its logits (V,), the number of steps that it took, and the distances that were measured.
    """
    module = backbone.get_input_embeddings()
    table = module(torch.arange(module.num_embeddings))
    caches = [DynamicCache(config=backbone.config) for _ in range(steps + 1)]
    results = []
    for token in row:
        inputs, before, distances = table[token].view(1, 1, -1), None, []
        for index in range(steps + 1):
            logits = backbone(inputs_embeds=inputs, use_cache=True, **{CACHE_NAME: caches[index]}).logits[0, 0]
            if index == steps:
                break
            distances.append(distance(logits, before))
            if distances[-1] < threshold:
                break
            inputs, before = inputs + logits.softmax(-1) @ table, logits
        results.append((logits, index, distances))
        for later in caches[index + 1 :]:
            for layer_index, layer in enumerate(caches[index].layers):
                later.update(layer.keys[:, :, -1:], layer.values[:, :, -1:], layer_index)
    return results


def telling_threshold(backbone, row, distance, index=1):
    """A threshold that about half of the tokens reach after a pass, well apart from any distance that was measured."""
    distances = sorted(found[index] for _, _, found in plain_adaptive(backbone, row, STEPS, distance, threshold=-1))
    middle = len(distances) // 2
    return (distances[middle] + distances[middle - 1]) / 2


CASES = [(criterion, True) for criterion in CRITERIA] + [("kl", False)]


@pytest.mark.parametrize(("criterion", "use_cache"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("model_type", tiny.SPINE)
def test_a_ragged_batch_equals_its_rows_token_by_token(model_type, criterion, use_cache, float64_throughout):
    model = tiny.pondering_model(model_type, torch.float64, pondering_steps=STEPS)
    rows = [tiny.token_ids(length, seed=length) for length in (5, 9, 2)]
    input_ids, mask = tiny.left_padded(rows)
    distance = DISTANCES[criterion]
    with torch.no_grad():
        threshold = telling_threshold(model.backbone, torch.cat(rows), distance)
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=5,
            pondering_exit_criterion=criterion,
            pondering_exit_threshold=threshold,
            output_logits=True,
            use_cache=use_cache,
            **GREEDY,
        )
        for index, row in enumerate(rows):
            whole = torch.cat([row, output.sequences[index, 9:]])
            expected = plain_adaptive(model.backbone, whole[:-1], STEPS, distance, threshold)[len(row) - 1 :]
            for count, (logits, used, _) in enumerate(expected):
                assert output.sequences[index, 9 + count] == logits.argmax()
                assert output.pondering_steps_used[index, count] == used
                assert (output.logits[count][index] - logits).abs().max() <= 1e-9 * logits.abs().max()
        assert len(output.pondering_steps_used.unique()) > 1, "the threshold tells no tokens apart"


def counted(model):
    """A list to which every forward pass of the backbone appends the (rows, tokens) that it computes."""
    shapes = []
    model.backbone.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes


class Scripted:
    """A criterion that lets the n-th token that it is asked about, pass by pass, go on or stop as told."""

    def __init__(self, *passes):
        self.passes, self.asked = list(passes), 0

    def __call__(self, logits, previous_logits):
        distances = torch.tensor(self.passes[self.asked % len(self.passes)])
        self.asked += 1
        return distances[: len(logits)]


def test_passes_that_are_not_needed_do_not_run_row_by_row():
    model = tiny.pondering_model("llama", pondering_steps=STEPS)
    shapes = counted(model)
    # Of three rows the second stops after pass 0, the first after pass 1, the third never.
    exit = Scripted([1.0, 0.0, 1.0], [0.0, 1.0], [1.0])
    prompt = tiny.token_ids(3, 1)
    output = model.generate(
        prompt, max_new_tokens=3, pondering_exit_criterion=exit, pondering_exit_threshold=0.5, **GREEDY
    )
    assert shapes == [(3, 1), (2, 1), (1, 1), (1, 1)] * 3
    assert output.pondering_steps_used.tolist() == [[1, 1, 1], [0, 0, 0], [3, 3, 3]]


def test_no_pass_runs_once_all_have_stopped():
    model = tiny.pondering_model("gpt_neox", pondering_steps=5)
    shapes = counted(model)
    output = model.generate(
        tiny.token_ids(2, 7), max_new_tokens=4, pondering_exit_criterion="kl", pondering_exit_threshold=1e9, **GREEDY
    )
    assert shapes == [(2, 7), (2, 7)] + [(2, 1), (2, 1)] * 3  # a divergence takes two passes
    assert output.pondering_steps_used.tolist() == [[1] * 4] * 2


def test_in_a_prompt_each_token_stops_by_itself():
    model = tiny.pondering_model("qwen2", pondering_steps=STEPS)
    shapes = counted(model)
    exit = Scripted([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0])
    position_ids = torch.arange(4).expand(2, 4)
    recorded = []
    with torch.no_grad():
        model(
            tiny.token_ids(2, 4),
            position_ids=position_ids,
            pondering_exit=PonderingExit(exit, 0.5, recorded.append),
        )
    assert shapes == [(2, 4), (2, 2), (1, 1), (1, 1)]
    assert recorded[0].tolist() == [[0, 3, 1, 0], [1, 0, 0, 0]]


def test_padding_holds_up_no_row():
    model = tiny.pondering_model("llama", pondering_steps=STEPS)
    shapes = counted(model)
    input_ids, mask = tiny.left_padded([tiny.token_ids(3), tiny.token_ids(1)])
    exit = Scripted([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])  # would leave the padding of the second row to go on
    settings = {"pondering_exit_criterion": exit, "pondering_exit_threshold": 0.5}
    model.generate(input_ids, attention_mask=mask, max_new_tokens=1, **settings, **GREEDY)
    assert shapes == [(2, 3)]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("model_type", tiny.SPINE)
@pytest.mark.parametrize("top_k", [None, 5], ids=["vocabulary", "top 5"])
def test_a_threshold_that_is_never_reached_changes_no_bit(model_type, criterion, top_k):
    model = tiny.pondering_model(model_type, pondering_steps=STEPS, pondering_top_k=top_k)
    input_ids, mask = tiny.left_padded([tiny.token_ids(length, seed=length) for length in (7, 4)])
    outputs = [
        model.generate(input_ids, attention_mask=mask, max_new_tokens=4, output_logits=True, **GREEDY, **settings)
        for settings in ({}, {"pondering_exit_criterion": criterion, "pondering_exit_threshold": 0})
    ]
    assert all(torch.equal(one, other) for one, other in zip(*(output.logits for output in outputs), strict=True))
    assert all((output.pondering_steps_used == STEPS).all() for output in outputs)


def test_the_prompt_may_come_in_chunks_and_from_a_cache(float64_throughout):
    model = tiny.pondering_model("mistral", torch.float64, pondering_steps=STEPS)
    row = tiny.token_ids(11)
    exit = {"pondering_exit_criterion": "kl"}
    with torch.no_grad():
        exit["pondering_exit_threshold"] = telling_threshold(model.backbone, row, kl)
        whole = model.generate(row.unsqueeze(0), max_new_tokens=6, **exit, **GREEDY)
        chunks = model.generate(row.unsqueeze(0), max_new_tokens=6, prefill_chunk_size=4, **exit, **GREEDY)
        first = model.generate(row.unsqueeze(0), max_new_tokens=3, **exit, **GREEDY)
        rest = model.generate(first.sequences, past_key_values=first[CACHE_NAME], max_new_tokens=3, **exit, **GREEDY)
    used = whole.pondering_steps_used
    assert len(used.unique()) > 1
    assert chunks.sequences.tolist() == rest.sequences.tolist() == whole.sequences.tolist()
    assert chunks.pondering_steps_used.tolist() == used.tolist()
    assert rest.pondering_steps_used.tolist() == used[:, 3:].tolist()


STRATEGIES = {
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "several sequences": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_strategies_report_the_steps_of_the_tokens_that_they_return(strategy, float64_throughout):
    model = tiny.pondering_model("gpt_neox", torch.float64, pondering_steps=STEPS)
    prompt = tiny.token_ids(1, 5).repeat(1, 2)
    with torch.no_grad():
        threshold = telling_threshold(model.backbone, prompt[0], kl)
        output = model.generate(
            prompt,
            max_new_tokens=7,
            pondering_exit_criterion="kl",
            pondering_exit_threshold=threshold,
            **{**GREEDY, **strategy},
        )
        for row, used in zip(output.sequences, output.pondering_steps_used, strict=True):
            expected = plain_adaptive(model.backbone, row[:-1], STEPS, kl, threshold)[len(prompt[0]) - 1 :]
            assert used.tolist() == [steps for _, steps, _ in expected]


def test_the_loss_of_tokens_that_stop_is_that_of_their_last_pass():
    model = tiny.pondering_model("llama", torch.float64, pondering_steps=STEPS)
    row = tiny.token_ids(1, 12)
    with torch.no_grad():
        threshold = telling_threshold(model.backbone, row[0], kl)
        output = model(row, labels=row, pondering_exit=PonderingExit(CRITERIA["kl"](), threshold))
        results = plain_adaptive(model.backbone, row[0], STEPS, kl, threshold)
    logits = torch.stack([logits for logits, _, _ in results])
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(logits[:-1], row[0, 1:]), rtol=1e-6, atol=0
    )


def test_no_gradient_is_missing_without_a_word():
    model = tiny.pondering_model("llama", pondering_steps=STEPS)
    row, early = tiny.token_ids(1, 12), PonderingExit(CRITERIA["kl"](), 0.1)
    with pytest.raises(PonderingError, match="a loss with `pondering_exit` has no gradient of the passes"):
        model(row, labels=row, pondering_exit=early)
    assert not model(row, pondering_exit=early).logits.requires_grad
    with torch.inference_mode():
        assert model(row, labels=row, pondering_exit=early).loss > 0


CHANGES = {
    "plain matrices": lambda model: None,
    "a head with a hook": lambda model: model.get_output_embeddings().register_forward_hook(lambda *arguments: None),
    "an embedding with a hook": lambda model: model.get_input_embeddings().register_forward_pre_hook(
        lambda *arguments: None
    ),
}


@pytest.mark.parametrize("chunk", [2**24, 5 * tiny.VOCAB_SIZE], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_criterion_sees_float32(model_type, change, chunk, monkeypatch):
    monkeypatch.setitem(pondering_vocabulary.CHUNK_ELEMENTS, "cpu", chunk)
    model = tiny.pondering_model(model_type, torch.bfloat16, pondering_steps=2)
    change(model)
    seen = []

    def criterion(logits, previous_logits):
        seen.append((logits, previous_logits))
        return logits.new_ones(len(logits))

    with torch.no_grad():
        model(tiny.token_ids(2, 11), pondering_exit=PonderingExit(criterion, 0.5))
    assert len(seen) == (2 if chunk == 2**24 else 10)
    for logits, previous in seen:
        assert logits.dtype == torch.float32
        assert previous is None or previous.dtype == torch.float32
    if model_type == "gemma2" and change is CHANGES["plain matrices"]:  # its cap is 2: bfloat16 has few numbers there
        logits = torch.cat([logits for logits, _ in seen])
        assert (logits != logits.bfloat16().float()).float().mean() > 0.5


def test_an_object_of_the_user_that_gives_no_distances_is_told_so():
    model = tiny.pondering_model("llama")
    with pytest.raises(PonderingError, match="must give one distance a token, a tensor of shape"):
        model.generate(
            tiny.token_ids(1, 3),
            max_new_tokens=1,
            pondering_exit_criterion=lambda logits, previous_logits: True,
            pondering_exit_threshold=1.0,
            **GREEDY,
        )


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_needs_all_passes_is_refused(name):
    model = tiny.pondering_model("llama")
    with pytest.raises(PonderingError, match=f"`{name}` needs the same passes for every token"):
        model.generate(
            tiny.token_ids(1, 3),
            pondering_exit_criterion="kl",
            pondering_exit_threshold=1.0,
            **{**GREEDY, name: True},
        )


def late_stop(monkeypatch):
    """As on Apple's MPS: transformers looks at the stop of a token only after the next forward pass has begun."""
    if not hasattr(utils, "DeferredStopCheck"):
        pytest.skip("only newer releases of transformers, from 5.23 at the latest, stop late")
    event = type("Event", (), dict.fromkeys(("__init__", "record", "synchronize"), lambda *_, **__: None))
    monkeypatch.setattr(torch, "Event", event)
    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(lambda *args, **kwargs: True))


def waiting_for_others(monkeypatch):
    """As under `synced_gpus`: this process is done, and runs on for as long as others are not."""
    rounds = []

    def has_unfinished(self, this_peer_finished, synced_gpus, device):
        rounds.append(this_peer_finished)
        return sum(rounds) < 4

    monkeypatch.setattr(PonderingForCausalLM, "_has_unfinished_sequences", has_unfinished, raising=False)
    return {"synced_gpus": True}


@pytest.fixture(scope="module")
def threshold():
    """One that tells the tokens apart of the model that the next test makes."""
    torch.manual_seed(0)
    model = tiny.pondering_model("gpt_neox", pondering_steps=STEPS)
    with torch.no_grad():
        return telling_threshold(model.backbone, tiny.token_ids(30, seed=7), kl)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("more", [late_stop, waiting_for_others], ids=lambda more: more.__name__)
def test_passes_that_run_beyond_the_last_token_are_not_counted(monkeypatch, threshold, more, beams, use_cache):
    torch.manual_seed(0)
    model = tiny.pondering_model("gpt_neox", pondering_steps=STEPS)
    prompt = tiny.token_ids(1, 5)
    exit = {"pondering_exit_criterion": "kl", "pondering_exit_threshold": threshold}
    settings = {**GREEDY, **exit, "num_beams": beams, "max_new_tokens": 12, "use_cache": use_cache}
    whole = model.generate(prompt, **settings)
    settings["eos_token_id"] = whole.sequences[0, 9].item()  # stops in the middle
    expected = model.generate(prompt, **settings)
    assert len(expected.pondering_steps_used.unique()) > 1
    if beams == 1:
        assert expected.sequences.shape[1] < whole.sequences.shape[1]
    settings |= more(monkeypatch) or {}
    output = model.generate(prompt, **settings)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.pondering_steps_used.tolist() == expected.pondering_steps_used.tolist()
