"""Beam search: the likeliest sequences, looked for along several at once.

A candidate that ends is kept only if it is among the `num_beams` likeliest of its step; its score is its
log-probability divided by its length to the power of the penalty. A search ends when no running beam could still
do better at its present length than the worst of `num_beams` that ended. (The rules of `transformers`, so that
scores are equal; its `early_stopping=False`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from meristem.generation.options import Generated, GenerateOptions
from meristem.generation.steps import Steps
from meristem.model.model import Model
from meristem.shapes import Float, Tensor


@dataclass(frozen=True)
class _Beam:
    """A sequence so far, its log-probability, and where it stood in the step before."""

    ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    total: float = 0.0
    parent: int = 0

    def then(self, token: int, total: float, parent: int) -> "_Beam":
        return _Beam((*self.ids, token), (*self.log_probabilities, total - self.total), total, parent)


@dataclass
class _Search:
    """The search from one prompt."""

    options: GenerateOptions
    stop_ids: frozenset[int]
    running: list[_Beam] = field(default_factory=lambda: [_Beam()])
    ended: list[Generated] = field(default_factory=list)
    is_over: bool = False

    def step(self, log_probabilities_BV: Float[Tensor, "B V"]) -> None:
        """Take the likeliest continuations of the running beams."""
        num_beams, vocab_size = self.options.num_beams, log_probabilities_BV.shape[1]
        totals_B1 = torch.tensor([beam.total for beam in self.running], device=log_probabilities_BV.device)[:, None]
        flat = (log_probabilities_BV + totals_B1).flatten()
        # enough that num_beams of them go on even if every beam ends in each way that it can
        wanted = max(2, 1 + len(self.stop_ids)) * num_beams
        best = flat.topk(min(wanted, len(flat)))
        length = len(self.running[0].ids) + 1
        going: list[_Beam] = []
        for rank, (total, index) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(index, vocab_size)
            beam = self.running[parent].then(token, total, parent)
            is_stopped = token in self.stop_ids
            if not is_stopped and length < self.options.max_new_tokens:
                going.append(beam)
            elif rank < num_beams:
                score = total / length**self.options.length_penalty
                reason = "stop" if is_stopped else "length"
                self.ended.append(Generated(beam.ids, beam.log_probabilities, score, reason))  # type: ignore[arg-type]
        self.running = going[:num_beams]
        self.ended = sorted(self.ended, key=lambda one: -one.score)[:num_beams]  # stable: the earlier one stays first
        self.is_over = not self.running or (
            len(self.ended) == num_beams
            and self.running[0].total / length**self.options.length_penalty <= self.ended[-1].score
        )


@torch.inference_mode()
def search(
    model: Model,
    prompts: Sequence[np.ndarray],
    options: GenerateOptions,
    stop_ids: Sequence[int] = (),
    start_id: int | None = None,
) -> list[list[Generated]]:
    """The `num_samples` best sequences for each prompt, best first; arguments as those of `sample`."""
    steps = Steps(model, prompts, start_id, options.max_new_tokens)
    searches = [_Search(options, frozenset(stop_ids)) for _ in prompts]
    owners = [(search, 1) for search in searches]  # and how many rows of the logits are its
    while owners:
        log_probabilities = steps.logits.log_softmax(-1)
        tokens: list[int] = []
        sequences: list[int] = []
        going: list[tuple[_Search, int]] = []
        first = 0
        for one, count in owners:
            one.step(log_probabilities[first : first + count])
            if not one.is_over:
                tokens += [beam.ids[-1] for beam in one.running]
                sequences += [first + beam.parent for beam in one.running]
                going.append((one, len(one.running)))
            first += count
        owners = going
        if owners:
            steps.advance(tokens, sequences)
    return [one.ended[: options.num_samples] for one in searches]
