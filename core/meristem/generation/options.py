"""What may be asked of generation."""

from dataclasses import dataclass
from typing import Literal

from meristem.errors import ConfigError
from meristem.scoring.scorer import option

Reason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How sequences are made.

    Attributes:
        max_new_tokens: tokens made for each prompt at most.
        temperature: of the softmax that tokens are drawn from; 0 takes the likeliest token (greedy).
        top_k: tokens are drawn from the k likeliest; None for all.
        top_p: ... from the smallest set whose probability reaches p (Holtzman 2020, arXiv 1904.09751); None for all.
        min_p: ... from those at least p times as likely as the likeliest (Nguyen 2024, arXiv 2407.01082).
        repetition_penalty: logits of tokens that are there already are divided by it where positive, else multiplied
            (Keskar 2019, arXiv 1909.05858).
        num_samples: sequences for each prompt.
        num_beams: beams of a beam search; 1 for none.
        length_penalty: scores of beams are divided by their length to this power.
        stop: texts that end a sequence; they are kept in it.
        seed: what is drawn for a prompt depends on it, the prompt and the number of the sample alone.
        batch_size: sequences that are run at once.
    """

    max_new_tokens: int = option(128, "tokens made for each prompt at most (128)")
    temperature: float = 1.0
    top_k: int | None = option(None, "draw from the k likeliest tokens")
    top_p: float | None = option(None, "draw from the smallest set of tokens whose probability reaches p")
    min_p: float | None = option(None, "draw from tokens at least p times as likely as the likeliest")
    repetition_penalty: float = option(1.0, "above 1, tokens that the text already holds become less likely")
    num_samples: int = 1
    num_beams: int = 1
    length_penalty: float = option(1.0, "scores of beams are divided by their length to this power")
    stop: tuple[str, ...] = ()
    seed: int = option(0, "the same seed and prompt give the same text")
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples", "num_beams", "batch_size", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more; got {value}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more; got {self.temperature}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1; got {value}")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be positive; got {self.repetition_penalty}")
        if "" in self.stop:
            raise ConfigError("stop must be texts with something in them; got an empty one")
        # options that would have no effect together
        narrowing = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.num_beams > 1:
            if self.temperature not in (0.0, 1.0) or narrowing or self.repetition_penalty != 1.0 or self.stop:
                raise ConfigError(
                    "num_beams searches and draws nothing: temperature, top_k, top_p, min_p, repetition_penalty and "
                    "stop have no effect with it; leave them out"
                )
            if self.num_samples > self.num_beams:
                raise ConfigError(
                    f"num_samples must be at most num_beams; got {self.num_samples} of {self.num_beams} beams"
                )
            return
        if self.length_penalty != 1.0:
            raise ConfigError("length_penalty has no effect without num_beams of 2 or more")
        if self.temperature == 0 and (narrowing or self.num_samples > 1):
            what = narrowing[0] if narrowing else "num_samples"
            raise ConfigError(f"{what} has no effect at temperature 0, which always takes the likeliest token")

    @property
    def num_sequences(self) -> int:
        """Sequences that are run at once for a prompt."""
        return max(self.num_samples, self.num_beams)


@dataclass(frozen=True)
class Generated:
    """One sequence made from a prompt.

    Attributes:
        ids: new tokens, a closing special one included.
        log_probabilities: of each, in nats, under the model as it is (before temperature and all that narrows).
        score: their sum; of a beam: divided by its length to the power of the penalty.
        reason: why it ended: a closing token or text, or its length.
    """

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    score: float
    reason: Reason
