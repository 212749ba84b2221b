"""Embed proteins with Meristem and with `transformers`, on the same weights, the same input, in one process.

    python benchmarks/embedding.py [--source proteins.fasta] [--records 200] [--rounds 5]

The peer is used in the two ways people use it: a batch of 8 in the order of the file, and batches of up to 4,096
tokens sorted by length. Vectors are checked to agree before anything is timed; then the programs run in turn, and
the ratio of their times is taken round by round. Writes `benchmarks/results/embedding_<hardware>_<date>.md`.
"""

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import EsmConfig, EsmModel

from meristem.data.records import ReadOptions, Source
from meristem.domain import load_domain
from meristem.embedding.engine import Embedder, TrunkRunner
from meristem.model_directory import load_any
from meristem.types import TokenColumn

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4
SORTED_BUDGET_TOKENS = 4096
MAX_RESIDUES = 1022


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="FASTA; the bundled sample by default")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)

    domain = load_domain("protein")
    source = args.source or str(domain.sample)
    payloads = [
        row for batch in domain.read(Source(source), ReadOptions()) for row in batch.column("payload").to_pylist()
    ]
    payloads = [payload for payload in payloads if len(payload) <= MAX_RESIDUES][: args.records]

    peer = EsmModel(esm2_8m(), add_pooling_layer=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        write_vocabulary(Path(folder), domain.tokenizer().vocab)
        card, model = load_any(Path(folder))
    column = card.tokenizer.encode_column(pa.array(payloads, pa.large_string()))
    ours = Embedder(TrunkRunner(model, card.tokenizer.num_special), "mean")

    by_length = np.argsort(column.lengths, kind="stable")
    ways: dict[str, Callable[[], np.ndarray]] = {
        "meristem": lambda: ours.embed(column),
        "transformers, 8 a batch, file order": lambda: embed_with(peer, column, in_eights(len(column))),
        "transformers, sorted, 4,096 tokens a batch": lambda: embed_with(peer, column, by_budget(column, by_length)),
    }
    vectors = {name: way() for name, way in ways.items()}  # the warm-up, too
    worst = max(float(np.abs(value - vectors["meristem"]).max()) for value in vectors.values())
    assert worst <= TOLERANCE, f"vectors differ by {worst}; nothing was timed"

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    write_report(seconds, len(payloads), int(column.offsets[-1]), worst, Path(source).name)


def esm2_8m() -> EsmConfig:
    return EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=320, num_hidden_layers=6, num_attention_heads=20,
        intermediate_size=1280, position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False,
        layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=1026,
    )  # fmt: skip


def write_vocabulary(folder: Path, vocab: tuple[str, ...]) -> None:
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")


def in_eights(count: int) -> list[np.ndarray]:
    return np.array_split(np.arange(count), range(8, count, 8))


def by_budget(column: TokenColumn, order: np.ndarray) -> list[np.ndarray]:
    """Batches of neighbours in `order` whose padded size stays within the budget."""
    batches: list[list[int]] = [[]]
    for row in order:
        if batches[-1] and (len(batches[-1]) + 1) * column.lengths[row] > SORTED_BUDGET_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches]


@torch.inference_mode()
def embed_with(peer: EsmModel, column: TokenColumn, batches: list[np.ndarray]) -> np.ndarray:
    """Padded batches through the peer, and the mean over residues."""
    vectors = np.empty((len(column), peer.config.hidden_size), np.float32)
    for rows in batches:
        width = int(column.lengths[rows].max())
        ids = torch.full((len(rows), width), 1)
        for place, row in enumerate(rows):
            ids[place, : column.lengths[row]] = torch.from_numpy(
                column.ids[column.offsets[row] : column.offsets[row + 1]].astype(np.int64)
            )
        mask = (ids != 1).long()
        hidden = peer(ids, attention_mask=mask).last_hidden_state
        inner = mask.clone()
        inner[:, 0] = 0
        inner[torch.arange(len(rows)), mask.sum(1) - 1] = 0
        vectors[rows] = ((hidden * inner[..., None]).sum(1) / inner.sum(1, keepdim=True)).numpy()
    return vectors


def write_report(seconds: dict[str, list[float]], records: int, tokens: int, worst: float, source: str) -> None:
    ours = seconds["meristem"]
    rows = [
        "| program | seconds, median | tokens/s | times as long as meristem: median (least to most) |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(values, ours)]
        middle = statistics.median(values)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(f"| {name} | {middle:.2f} | {tokens / middle:,.0f} | {spread} |")
    hardware = f"cpu{torch.get_num_threads()}"
    text = "\n".join(
        [
            "# Embedding, ESM-2 8M shape, fp32, mean over residues",
            "",
            f"{records} records of {source} ({tokens:,} tokens), {torch.get_num_threads()} threads, "
            f"{platform.machine()}, torch {torch.__version__}. Vectors differ by at most {worst:.1e}. "
            f"{len(ours)} rounds, the programs in turn, in one process.",
            "",
            *rows,
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"embedding_{hardware}_{datetime.date.today():%Y-%m-%d}.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
