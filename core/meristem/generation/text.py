"""Prompts in, texts out: what stands between a tokenizer and the loops over ids."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix

import numpy as np

from meristem.data.tokenizer import Tokenizer
from meristem.errors import DataError, UserError
from meristem.generation.beams import search
from meristem.generation.few_rows import for_few_rows
from meristem.generation.options import Generated, GenerateOptions
from meristem.generation.sample import IsStop, OnToken, sample
from meristem.generation.steps import check_generates
from meristem.model.model import Model
from meristem.types import Tokens

OnText = Callable[[int, int, str], None]
"""Told of each piece of text as it is made: number of the prompt, number of the sample, the piece."""

STOP_WINDOW_TOKENS = 64
"""Tokens looked back for a text that stops a sequence: as many as a stop text has characters, and these."""


@dataclass(frozen=True)
class Sample:
    """A text made from a prompt.

    Attributes:
        text: what was made, without the prompt and without special symbols.
        generated: its tokens, their log-probabilities, and why it ended.
    """

    text: str
    generated: Generated


class Generator:
    """Makes texts with a model.

    Args:
        model: in evaluation mode, on its device, with the parameters that it will have.

    Raises:
        ConfigError: the model cannot generate.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer):
        check_generates(model)
        self.model, self.tokenizer = for_few_rows(model), tokenizer
        self.is_two_sided = bool(model.config.num_decoder_layers)
        self.start_id = tokenizer.bos_id if tokenizer.pad_id is None else tokenizer.pad_id
        self.stop_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def generate(
        self, prompts: Iterable[str], options: GenerateOptions, on_text: OnText | None = None
    ) -> Iterator[list[Sample]]:
        """The samples of each prompt, in the order of the prompts.

        Args:
            on_text: told of the text as it is made; not with beams, which decide at the end.

        Raises:
            DataError: a prompt that the tokenizer refuses, or one that is too long; counts prompts from 1.
        """
        left = iter(enumerate(prompts))
        per_batch = max(1, options.batch_size // options.num_sequences)
        while batch := list(islice(left, per_batch)):
            ids = [self._encode(number, prompt, options) for number, prompt in batch]
            streams = _Streams(self, ids, batch[0][0], on_text) if on_text is not None else None
            for prompt, samples in zip(ids, self.go_on(ids, options, streams), strict=True):
                yield [Sample(self.text_behind(prompt, one.ids), one) for one in samples]

    def go_on(
        self, prompts: Sequence[np.ndarray], options: GenerateOptions, on_token: OnToken | None = None
    ) -> list[list[Generated]]:
        """The samples of some prompts, the ids of `open_ids`, that are run at once."""
        if options.num_beams > 1:
            return search(self.model, prompts, options, self.stop_ids, self.start_id)
        is_stop = self._is_stop(prompts, options.stop)
        return sample(self.model, prompts, options, self.stop_ids, self.start_id, is_stop, on_token)

    def open_ids(self, tokens: Tokens) -> np.ndarray:
        """Ids that the model goes on from: a decoder's prompt is left open at its end."""
        ids = tokens.ids
        if not self.is_two_sided:
            ids = ids[: len(ids) - tokens.frame[1]]
            if not len(tokens.payload_rows):
                ids = np.array([] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id])
        return np.asarray(ids, np.int64)

    def text_behind(self, prompt: np.ndarray, made: Sequence[int]) -> str:
        """The text that new tokens add to a prompt: that of all tokens together, without that of the prompt.

        Decoded alone, the new tokens would lose a space before them, or the word that their first one goes on with. The
        prompt of an encoder-decoder is no part of its output.
        """
        if self.is_two_sided:
            return self.tokenizer.text_of(made)
        before, whole = self.tokenizer.text_of(prompt.tolist()), self.tokenizer.text_of([*prompt.tolist(), *made])
        return whole[len(commonprefix([before, whole])) :]  # noqa: RUF071 (characters, not paths)

    def refusal(self, ids: np.ndarray, options: GenerateOptions) -> str:
        """Why the model cannot go on from a prompt; empty where it can."""
        if not len(ids):
            return "empty, and the tokenizer has no symbol to begin with"
        limit = self.model.config.max_length
        needed = len(ids) if self.is_two_sided else len(ids) + options.max_new_tokens - 1
        if limit is None or needed <= limit:
            return ""
        return (
            f"prompt and new tokens must be {limit} tokens or fewer, as the model's positions allow; got {needed}; "
            "shorten the prompt or take fewer new tokens"
        )

    def _encode(self, number: int, prompt: str, options: GenerateOptions) -> np.ndarray:
        try:
            ids = self.open_ids(self.tokenizer.encode(prompt))
        except UserError as error:
            raise DataError(f"prompt {number + 1}: {error}") from error
        if reason := self.refusal(ids, options):
            raise DataError(f"prompt {number + 1}: {reason}")
        return ids

    def _is_stop(self, prompts: Sequence[np.ndarray], stop: Sequence[str]) -> IsStop | None:
        if not stop:
            return None
        window = STOP_WINDOW_TOKENS + max(map(len, stop))

        def is_stop(prompt: int, ids: Sequence[int]) -> bool:
            # the last token must have part in it, or it would have stopped before
            tail = self.text_behind(prompts[prompt][: 0 if len(ids) > window else None], ids[-window:])
            return any(text in tail for text in stop)

        return is_stop


class _Streams:
    """Turns tokens into pieces of text as they come: a character of several tokens waits for its last."""

    def __init__(self, generator: Generator, prompts: Sequence[np.ndarray], first: int, on_text: OnText):
        self.generator, self.prompts, self.first, self.on_text = generator, prompts, first, on_text
        self._ids: dict[tuple[int, int], list[int]] = {}
        self._said: dict[tuple[int, int], str] = {}

    def __call__(self, prompt: int, number: int, token: int) -> None:
        key = (prompt, number)
        ids = self._ids.setdefault(key, [])
        ids.append(token)
        text = self.generator.text_behind(self.prompts[prompt], ids)
        said = self._said.get(key, "")
        if text.endswith("\ufffd") or not text.startswith(said):
            return
        self._said[key] = text
        if len(text) > len(said):
            self.on_text(self.first + prompt, number, text[len(said) :])
