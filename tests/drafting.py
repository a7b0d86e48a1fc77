"""What the tests of drafts share: sources that guess right or wrong on purpose, prompts, plain and drafted calls."""

import random

import tiny
import torch


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Guesses:
    """A source that drafts the true token with a given probability, and anything at all otherwise."""

    def __init__(self, truth, probability, seed=0):
        self.truth, self.probability, self.random = truth, probability, random.Random(seed)

    def __call__(self, hidden_states, first_pass):
        return None

    def token(self, prompt, pass_index, token_ids, predicted):
        truth = self.truth[prompt]
        if len(token_ids) < len(truth) and self.random.random() < self.probability:
            return truth[len(token_ids)]
        return self.random.randrange(tiny.VOCAB_SIZE)


class NoDrafts:
    """Guesses that are never right, so that each token goes through all passes alone."""

    def __call__(self, hidden_states, first_pass):
        return None

    def token(self, prompt, pass_index, token_ids, predicted):
        return 0


class HalfWrong:
    """The passes' own predictions, half of them spoilt."""

    def __init__(self, seed=0):
        self.random = random.Random(seed)

    def __call__(self, hidden_states, first_pass):
        return None

    def token(self, prompt, pass_index, token_ids, predicted):
        return predicted if self.random.random() < 0.5 else self.random.randrange(tiny.VOCAB_SIZE)


def ragged(*lengths):
    """Left-padded prompts of these lengths: (input_ids, attention_mask)."""
    return tiny.left_padded([tiny.token_ids(length, seed=length) for length in lengths])


def check_same(plain, drafted, prompt_length, eos=None):
    """Drafted output must have the tokens of the plain one and, up to where each row ended, its logits.

    Both are made with `return_dict_in_generate=True, output_logits=True`. Logits are kept in float32.
    """
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert len(drafted.logits) == len(plain.logits)
    stops = set(eos if isinstance(eos, list) else [eos])
    for row, tokens in enumerate(plain.sequences[:, prompt_length:].tolist()):
        end = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
        for index in range(end):
            torch.testing.assert_close(drafted.logits[index][row], plain.logits[index][row], rtol=1e-4, atol=1e-4)
