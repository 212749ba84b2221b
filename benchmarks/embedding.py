"""Mean vectors of proteins: Meristem beside `transformers`, as people run it and as an expert does.

    python benchmarks/run.py embedding

The engine is the one of `meristem embed`. Peers have the same weights and the same tokens: batches of 8 and of 32 in
the order of the file, or of neighbours in length with a padded size of 2,048 or 4,096 tokens at most. Vectors
agree before anything is timed. The products and attention kernels of our packs, run alone on tensors of their shapes,
are what an engine without any other work would take.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from harness import Finding, Options, agree, race
from steps import matrix_peak
from torch.nn import functional as F
from transformers import EsmConfig, EsmModel

from meristem.data.order import plan_in_order
from meristem.data.records import PAYLOAD, ReadOptions, Source
from meristem.domain import load_domain
from meristem.inference.engine import PRECISIONS, Embedder
from meristem.inference.job import JobOptions
from meristem.inference.memory import MOST_TOKENS
from meristem.model.flops import flops_per_token
from meristem.model.model import Model
from meristem.model_directory import load_any
from meristem.types import TokenColumn

SHAPES = {  # layers, width, heads, records
    "8M": (6, 320, 20, 80),
    "35M": (12, 480, 20, 28),
    "150M": (30, 640, 20, 6),
}
GPU_SHAPES = {"8M": (6, 320, 20, 4000), "650M": (33, 1280, 20, 500)}
GPU_RECORDS_CHECKED = 48
BUDGETS = (2048, 4096)
GPU_BUDGETS = (16384, 65536)
MAX_RESIDUES = 1022
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A shape of a model, ours and the peer of the same weights, and what both embed.

    Attributes:
        where: the records come from.
    """

    name: str
    peer: EsmModel
    model: Model
    column: TokenColumn
    where: str
    options: Options

    @property
    def num_tokens(self) -> int:
        return int(self.column.offsets[-1])

    @property
    def setting(self) -> str:
        """The records in words."""
        return f"{len(self.column)} records of {self.where}, {self.num_tokens:,} tokens; mean over residues."

    def engine(self, precision: str, is_compiled: bool = False) -> Embedder:
        """The one of `meristem embed`."""
        how = JobOptions(precision=precision, is_compiled=is_compiled)
        return Embedder(how.trunk(self.model, self.options.device), "mean")

    def batches(self) -> dict[str, list[np.ndarray]]:
        """Rows of each batch, by how people and experts choose them."""
        by_length = np.argsort(self.column.lengths, kind="stable")
        budgets = GPU_BUDGETS if self.options.device == "cuda" else BUDGETS
        found = {f"sorted, {budget:,} tokens": by_budget(self.column, by_length, budget) for budget in budgets}
        return found | {f"{size} a batch, file order": in_order(len(self.column), size) for size in (8, 32)}


def findings(options: Options) -> Iterator[Finding]:
    """On a CPU each shape in fp32 and in lower precision; on a GPU in bf16."""
    is_gpu = options.device == "cuda"
    for name, (layers, width, heads, records) in (GPU_SHAPES if is_gpu else SHAPES).items():
        column, where = proteins(options, 24 if options.is_quick else records)
        with tempfile.TemporaryDirectory() as folder:
            peer = save_peer(Path(folder), layers, width, heads).to(options.device)
            _, model = load_any(Path(folder))
        case = Case(name, peer, model, column, where, options)
        yield from [on_gpu(case)] if is_gpu else on_cpu(case)
        if options.is_quick:
            return


def on_gpu(case: Case) -> Finding:
    """One shape in bf16; what of the peak is reached is that of the fastest of ours."""
    column, peer = case.column, case.peer
    checked = column.take(np.arange(min(GPU_RECORDS_CHECKED, len(column))))
    exact = case.engine("fp32").embed(checked)
    theirs_exact = embed_with(peer, checked, in_order(len(checked), 8))
    said = f"In fp32 vectors of {len(checked)} differ by {agree('transformers', exact, theirs_exact, TOLERANCE):.1e}."
    peer = peer.to(torch.bfloat16)
    engines = {"meristem": case.engine("bf16"), "meristem, compiled": case.engine("bf16", is_compiled=True)}
    errors = {title: relative_error(exact, engine.embed(checked)) for title, engine in engines.items()}
    errors["transformers"] = relative_error(exact, embed_with(peer, checked, in_order(len(checked), 8)))
    seconds = race(
        {
            **{title: partial(engine.embed, column) for title, engine in engines.items()},
            **{f"transformers, {how}": partial(embed_with, peer, column, rows) for how, rows in case.batches().items()},
        },
        case.options,
    )
    architecture = replace(case.model.config, head=None)
    flops = sum(int(length) * flops_per_token(architecture, int(length)) for length in column.lengths)
    took = min(statistics.median(seconds[title]) for title in engines)
    rows = min(case.num_tokens, MOST_TOKENS["cuda"])
    peak = matrix_peak(rows, architecture.width, case.options)
    return Finding(
        f"ESM-2 {case.name} shape, bf16",
        f"{case.setting} {said}",
        seconds,
        work=case.num_tokens,
        values={
            "operations": f"{flops / 1e12:,.1f} TFLOP",
            "rate": f"{flops / took / 1e12:,.0f} TFLOP/s",
            f"product of [{rows}, {architecture.width}] and "
            f"[{architecture.width}, {4 * architecture.width}] alone": f"{peak / 1e12:,.0f} TFLOP/s",
            "share of it reached": f"{flops / took / peak:.0%}",
            **{f"error of {title} in bf16, rms of rms": f"{error:.1e}" for title, error in errors.items()},
        },
    )


def on_cpu(case: Case) -> Iterator[Finding]:
    """One shape in fp32, in bf16, and each of our precisions beside the expert's fp32."""
    column, options = case.column, case.options
    ours = {precision: case.engine(precision) for precision in PRECISIONS}
    theirs: dict[str, dict[str, Callable[[], np.ndarray]]] = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        cast = EsmModel(case.peer.config, add_pooling_layer=False).eval().to(options.device, dtype)
        cast.load_state_dict(case.peer.state_dict())
        theirs[precision] = {
            f"transformers, {how}": partial(embed_with, cast, column, rows) for how, rows in case.batches().items()
        }
    exact = ours["fp32"].embed(column)
    worst = max(agree(how, exact, run(), TOLERANCE) for how, run in theirs["fp32"].items())
    floor = {
        "products and attention alone": partial(
            run_floor, case.model, plans(column, options), PRECISIONS["fp32"], options.device
        )
    }
    fp32 = {"meristem": partial(ours["fp32"].embed, column), **floor, **theirs["fp32"]}
    seconds = race(fp32, options, is_warm=True)
    alone = [ours / alone for ours, alone in zip(seconds["meristem"], seconds["products and attention alone"])]
    yield Finding(
        f"ESM-2 {case.name} shape, fp32",
        f"{case.setting} Vectors differ by {worst:.1e} at most.",
        seconds,
        work=case.num_tokens,
        values={"meristem over its products and attention alone": f"{statistics.median(alone):.2f}"},
    )
    errors = {
        precision: relative_error(exact, engine.embed(column))
        for precision, engine in ours.items()
        if precision != "fp32"
    }
    experts = [how for how in theirs["fp32"] if "sorted" in how]
    cast_peers = {f"{how}, bf16": theirs["bf16"][how] for how in experts}
    their_error = relative_error(exact, theirs["bf16"][experts[-1]]())
    lower = {f"meristem {precision}": partial(ours[precision].embed, column) for precision in errors}
    yield Finding(
        f"ESM-2 {case.name} shape, lower precision",
        case.setting,
        race({**lower, **cast_peers, **{how: theirs["fp32"][how] for how in experts}}, options),
        reference="meristem bf16",
        work=case.num_tokens,
        values={
            **{f"error of meristem {precision}, rms of rms": f"{error:.1e}" for precision, error in errors.items()},
            "error of transformers bf16": f"{their_error:.1e}",
        },
    )


def proteins(options: Options, count: int) -> tuple[TokenColumn, str]:
    """Records of a real length mix, drawn with a seed, and what they are."""
    domain = load_domain("protein")
    path = options.data("protein/uniref90_sample.fasta")
    payloads = [
        payload
        for batch in domain.reader.read(Source(str(path or domain.sample)), ReadOptions())
        for payload in batch.column(PAYLOAD).to_pylist()
        if len(payload) <= MAX_RESIDUES
    ]
    drawn = np.random.default_rng(0).permutation(len(payloads))[:count]
    column = domain.tokenizer().encode_column(pa.array([payloads[i] for i in drawn], pa.large_string()))
    return column, path.name if path else "the bundled sample"


def save_peer(folder: Path, layers: int, width: int, heads: int) -> EsmModel:
    """The peer at random weights, saved as it saves itself, with the vocabulary."""
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * width, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        max_position_embeddings=1026,
    )  # fmt: skip
    peer = EsmModel(config, add_pooling_layer=False).eval()
    peer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(load_domain("protein").tokenizer().vocab) + "\n")
    return peer


def in_order(count: int, size: int) -> list[np.ndarray]:
    return np.array_split(np.arange(count), range(size, count, size))


def by_budget(column: TokenColumn, order: np.ndarray, budget: int) -> list[np.ndarray]:
    """Batches of neighbours in `order` whose padded size stays within the budget."""
    batches: list[list[int]] = [[]]
    for row in order:
        if batches[-1] and (len(batches[-1]) + 1) * column.lengths[row] > budget:
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
            taken = column.ids[column.offsets[row] : column.offsets[row + 1]]
            ids[place, : len(taken)] = torch.from_numpy(taken.astype(np.int64))
        ids = ids.to(peer.device)
        mask = (ids != 1).long()
        hidden = peer(ids, attention_mask=mask).last_hidden_state.float()
        inner = mask.clone()
        inner[:, 0] = 0
        inner[torch.arange(len(rows)), mask.sum(1) - 1] = 0
        vectors[rows] = ((hidden * inner[..., None]).sum(1) / inner.sum(1, keepdim=True)).cpu().numpy()
    return vectors


def plans(column: TokenColumn, options: Options) -> list[np.ndarray]:
    """Lengths of the sequences of each of our packs."""
    packs = plan_in_order(column.lengths, MOST_TOKENS[options.device])
    return [np.sort(column.lengths[rows]) for rows in packs]


@torch.inference_mode()
def run_floor(model: Model, packs: list[np.ndarray], dtype: torch.dtype, device: str) -> None:
    """The products of each layer at our packs' shapes and attention by groups of equal lengths, and nothing else."""
    block = model.trunk.blocks[0]
    linears = [block.attention.qkv, block.attention.out, block.feedforward.up, block.feedforward.down]
    weights = [(linear.weight.to(device, dtype), linear.bias.to(device, dtype)) for linear in linears]
    heads, head_width = block.attention.num_heads, block.attention.head_width
    for lengths in packs:
        rows = int(lengths.sum())
        x_by_width = {
            weight.shape[1]: torch.zeros(rows, weight.shape[1], dtype=dtype, device=device) for weight, _ in weights
        }
        groups = [
            torch.zeros(count, heads, int(length), head_width, dtype=dtype, device=device)
            for length, count in zip(*np.unique(lengths, return_counts=True))
        ]
        for _ in range(model.config.num_layers):
            for weight, bias in weights:
                F.linear(x_by_width[weight.shape[1]], weight, bias)
            for q in groups:
                F.scaled_dot_product_attention(q, q, q)


def relative_error(exact: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference over that of the vectors."""
    return float(np.sqrt(np.square(exact - other).mean() / np.square(exact).mean()))
