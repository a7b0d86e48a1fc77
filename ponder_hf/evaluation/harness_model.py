"""lm-evaluation-harness's class for transformers' models, without padding. Importing this imports the harness."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ponder_hf.modeling import PonderingError
from ponder_hf.progress import progress_bar


logger = logging.getLogger(__name__)


class UnpaddedModel(HFLM):
    """HFLM, whose batches have rows of one length only.

    HFLM itself pads a batch behind its tokens. Those see nothing of it, but kernels of attention add up what they see
    in another order where a row is longer. So padding would change the last digits of an answer, and with them a
    choice between two that are nearly equal.

    On a CPU rows go through the model one at a time. Nothing is lost (docs/evaluation.md), and then no answer depends
    on what stands beside it in a batch. Kernels of other devices may choose another order for another number of rows.

    Args:
        model, tokenizer: loaded.
        batch_size: rows that go through the model at once, at most.
        progress: whether a bar over the answers is shown.
        name: of the model, for messages.

    Raises:
        PonderingError: where it answers, the model predicts NaN, or an answer is longer than what it reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 1,
        progress: bool = False,
        name: str = "the model",
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=rows_at_once(model, batch_size))
        self.name = name
        self._progress = progress
        self._bar: Any = None

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's: the log-probability of each continuation, and whether it is what greedy decoding gives."""
        by_length: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            by_length.setdefault(len(self.tok_encode("".join(request.args))), []).append(place)
        self._check_lengths(requests, by_length)
        answers: dict[int, tuple[float, bool]] = {}
        with progress_bar("evaluating", " answers", len(requests), shown=self._progress) as self._bar:
            for length in sorted(by_length, reverse=True):  # as HFLM: what needs most memory comes first
                places = by_length[length]
                found = super().loglikelihood([requests[place] for place in places], disable_tqdm=True)
                answers.update(zip(places, found, strict=True))
        self._bar = None
        return [answers[place] for place in range(len(requests))]

    def _check_lengths(self, requests: Sequence[Any], by_length: dict[int, list[int]]) -> None:
        """Warn of questions that the model is too short for, and refuse answers; HFLM asserts that there are none."""
        # The last token is predicted only, and never read.
        too_long = [place for length, places in by_length.items() if length > self.max_length + 1 for place in places]
        for place in too_long:
            request = requests[place]
            length = len(self.tok_encode(request.args[1]))
            if length > self.max_length:
                raise PonderingError(
                    f"an answer of the task {request.task_name} has {length} tokens, more than the {self.max_length} "
                    "that the model reads: leave this task out"
                )
        if too_long:
            logger.warning(
                f"{len(too_long)} of {len(requests)} questions with their answers are longer than the "
                f"{self.max_length} tokens that the model reads: their beginning is cut off"
            )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """As LM's, and every answer that is kept moves the bar on."""
        super().set_cache_hook(_Counting(cache_hook, self))

    def count(self) -> None:
        """One more answer is there."""
        if self._bar is not None:
            self._bar.update()


class _Counting:
    def __init__(self, hook: Any, model: UnpaddedModel) -> None:
        self.hook, self.model = hook, model

    def add_partial(self, kind: str, key: Any, answer: Any) -> None:
        # Before it is kept: a choice between answers of NaN would count as right or wrong.
        score = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(score, float) and math.isnan(score):
            raise PonderingError(f"{self.model.name} predicts NaN: get its weights again, or use `dtype` float32")
        self.hook.add_partial(kind, key, answer)
        self.model.count()


def rows_at_once(model: PreTrainedModel, batch_size: int) -> int:
    """How many rows of `batch_size` really go through the model together: on a CPU one."""
    return 1 if model.device.type == "cpu" else batch_size
