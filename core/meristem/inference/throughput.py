"""How fast this machine embeds with a model, and so how long an input will take and what it will weigh.

The time of a token is a line in the length of its sequence: products cost the same for each token, attention grows with
the tokens it is paid to. The line is fitted to packs of a few lengths that are run and timed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meristem.data.records import ReadOptions
from meristem.domain import domain_of_model
from meristem.inference.chunks import ChunkReader
from meristem.inference.encoding import Reading
from meristem.inference.engine import Embedder
from meristem.model_directory import ModelCard
from meristem.types import TokenColumn

LENGTHS = (64, 256, 1024)
ROUNDS = 3
VALUE_BYTES, LENGTH_BYTES = 4, 8
"""Of a number of a vector, and of the length of a record, in a file."""


@dataclass(frozen=True)
class Throughput:
    """Seconds of a token, as a line in the length of its sequence.

    Attributes:
        tokens_per_second: measured, by length.
        seconds_per_token: at length 0.
        seconds_per_token_and_length: more for each token of the sequence.
    """

    tokens_per_second: dict[int, float]
    seconds_per_token: float
    seconds_per_token_and_length: float

    def seconds(self, lengths: np.ndarray) -> float:
        """For sequences of these lengths, special tokens included."""
        lengths = lengths.astype(np.float64)
        return float((lengths * (self.seconds_per_token + self.seconds_per_token_and_length * lengths)).sum())


def measure_throughput(embedder: Embedder, rounds: int = ROUNDS) -> Throughput:
    """Run packs as full as the budget allows, of equal sequences, and time them; a pack of each is not counted.

    Args:
        embedder: of a model of symbols or patches.
        rounds: packs of each length; the fastest counts, since what disturbs a machine only makes it slower.
    """
    limit = embedder.trunk.model.config.max_length
    allowed = sorted({min(length, limit or length) for length in LENGTHS})
    rates = {length: _tokens_per_second(embedder, length, rounds) for length in allowed}
    times = np.array([1 / rate for rate in rates.values()])
    if len(allowed) == 1:
        return Throughput(rates, float(times[0]), 0.0)
    # relative errors count: the line must hold at short lengths as well
    slope, base = np.polyfit(allowed, times, 1, w=1 / times)
    if slope < 0:  # overheads of short sequences hide what attention costs
        slope, base = 0.0, float(times.mean())
    return Throughput(rates, max(float(base), 0.0), float(slope))


def _tokens_per_second(embedder: Embedder, length: int, rounds: int) -> float:
    count = max(embedder.trunk.tokens_per_batch // length, 1)
    column = _column(embedder, length, count)
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        embedder.embed(column)
        seconds.append(time.perf_counter() - began)
    return count * length / min(seconds[1:])


def _column(embedder: Embedder, length: int, count: int) -> TokenColumn:
    """Sequences of a special row and any symbols, or patches of zeros at the first place of their grid."""
    config = embedder.trunk.model.config
    ids = np.resize(np.arange(config.embedding.vocab_size), count * length)
    offsets = np.arange(count + 1) * length
    is_special = np.arange(count * length) % length == 0
    num_features = config.embedding.patch_features
    if not num_features:
        return TokenColumn(ids=ids, offsets=offsets, is_special=is_special)
    return TokenColumn(
        ids=np.full(count * length, -1),
        offsets=offsets,
        features=np.zeros((count * length, num_features), np.float32),
        positions=np.zeros((count * length, 2), np.int64),
        is_special=is_special,
    )


def weigh(embedder: Embedder, card: ModelCard, inputs: Sequence[str], measured: Throughput) -> dict[str, int | float]:
    """What embedding files will take: they are read and tokenized, and nothing is run.

    Returns:
        Records, tokens, vectors and their width; seconds; bytes of the output, about: numbers hardly get smaller by
        compression.

    Raises:
        DataError: an input that cannot be used.
    """
    reader = ChunkReader(domain_of_model("", card.domain), Reading.of(card), inputs, ReadOptions())
    seconds, num_vectors, id_bytes = 0.0, 0, 0
    for chunk in reader:
        seconds += measured.seconds(chunk.column.lengths)
        num_vectors += int(embedder.num_vectors(chunk.column).sum())
        id_bytes += chunk.ids.nbytes
    return {
        "records": reader.num_records,
        "tokens": reader.num_symbols,
        "vectors": num_vectors,
        "width": embedder.width,
        "seconds": round(seconds, 1),
        "bytes": num_vectors * embedder.width * VALUE_BYTES + id_bytes + LENGTH_BYTES * reader.num_records,
    }
