"""Vision transformers: Meristem beside timm, on pictures of one size and on mixed sizes at native resolution.

    python benchmarks/run.py vision

Forward passes are those of `meristem predict`, steps those of `meristem fit` (see `steps.py`). Peers have the same
weights and see the same patches: timm's ViT-S/16, and for mixed sizes timm's NaFlexViT of the same shape, which pads
every picture of a batch to the longest and masks the rest. It has no positions here, and neither has ours: timm
resamples its table for every picture, which would be counted against it.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from harness import Finding, Options, agree, race
from steps import OPTIMIZER, TOLERANCES, OurStep, PeerStep, achieved, agreed, packed, precision, redraw
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

from meristem.data.pack import pack_column
from meristem.data.parts import Part, RunData
from meristem.inference.engine import PRECISIONS, TrunkRunner
from meristem.inference.predictor import Predictor, in_units
from meristem.interop.table import KeyTable, Rename, Row, Transform
from meristem.model.config import (
    Attention,
    Embedding,
    FeedForward,
    LayerNorm,
    Mean,
    NoPosition,
    Residual,
    TransformerConfig,
)
from meristem.model.outputs import HeadRequest, Wanted
from meristem.model_directory import load_any
from meristem.objectives.supervised import Supervised, Target
from meristem.train.spec import ModelSpec
from meristem.train.task import Task
from meristem.types import Record, TokenColumn, Tokens
from meristem_domains.vision.patches import PatchTokenizer

LABEL, PATCH_PX, NUM_REGISTERS = "label", 16, 4
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6, "num_classes": 1000}
QUICK = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
IMAGE_PX, QUICK_PX = 224, 64
COUNT = {"cpu": 16, "cuda": 256}
"""Pictures of one size in a batch."""
MIXED_COUNT = {"cpu": 32, "cuda": 256}
SIDES_PX, QUICK_SIDES_PX = (64, 384), (32, 96)
SORTED_BATCH = 8
"""Pictures of a batch of like sizes, as an expert makes them."""

REGISTERS = Transform(lambda found, _: found[0][0], lambda tensor, _: [tensor[None]])

NAFLEX = KeyTable(
    (
        Row("trunk.embedding.symbols.weight", ("embeds.reg_token",), REGISTERS),
        Rename("trunk.embedding.patches", "embeds.proj"),
        Rename("trunk.blocks.{}.attention_norm", "blocks.{}.norm1"),
        Rename("trunk.blocks.{}.attention.qkv", "blocks.{}.attn.qkv"),
        Rename("trunk.blocks.{}.attention.out", "blocks.{}.attn.proj"),
        Rename("trunk.blocks.{}.attention_scale", "blocks.{}.ls1.gamma"),
        Rename("trunk.blocks.{}.feedforward_norm", "blocks.{}.norm2"),
        Rename("trunk.blocks.{}.feedforward.up", "blocks.{}.mlp.fc1"),
        Rename("trunk.blocks.{}.feedforward.down", "blocks.{}.mlp.fc2"),
        Rename("trunk.blocks.{}.feedforward_scale", "blocks.{}.ls2.gamma"),
        Rename("pool.norm", "fc_norm"),
        Rename(f"heads.{LABEL}.out", "head"),
    )
)
"""Where timm's NaFlexViT keeps the tensors of ours."""


Pictures = torch.Tensor | dict[str, torch.Tensor]


@dataclass
class Case:
    """Our model and a peer with its weights, and one batch of pictures as each takes it.

    Attributes:
        what: the pictures.
        peer: its name.
        build: a peer of other weights.
        weights: of the peer.
        pictures: as our tokenizer gives them.
        whole: all pictures as the peer takes them.
        in_batches: rows of `pictures` and batches of them, where an expert would make several; else none.
    """

    what: str
    peer: str
    ours: OurStep
    tokenizer: PatchTokenizer
    build: Callable[[], nn.Module]
    weights: Mapping[str, torch.Tensor]
    pictures: list[Tokens]
    whole: Pictures
    in_batches: list[tuple[np.ndarray, Pictures]] = field(default_factory=list)

    def copy(self) -> nn.Module:
        """The peer."""
        model = self.build()
        model.load_state_dict(self.weights)
        return model


def findings(options: Options) -> Iterator[Finding]:
    """Forward passes and training steps, of one size and of mixed sizes."""
    for case in (one_size(options), mixed_sizes(options)):
        yield forward(case, options)
        yield step(case, options)


def forward(case: Case, options: Options) -> Finding:
    """Class probabilities of all pictures; on a GPU, of pictures that are there already."""
    is_gpu = options.device == "cuda"
    kind = "bf16" if is_gpu else "fp32"
    dtype = PRECISIONS[kind]
    peer = case.copy().to(options.device, dtype).eval()
    programs: dict[str, Callable[[], np.ndarray]] = {"meristem": our_forward(case, dtype, options)}
    if is_gpu:
        programs["meristem, compiled"] = our_forward(case, dtype, options, is_compiled=True)
    whole = [(np.arange(len(case.pictures)), case.whole)]
    programs[case.peer] = partial(their_forward, peer, whole, dtype)
    if case.in_batches:
        programs[f"{case.peer}, sorted, {SORTED_BATCH} a batch"] = partial(their_forward, peer, case.in_batches, dtype)
    if is_gpu:
        programs[f"{case.peer}, compiled"] = partial(their_forward, compiled(peer), whole, dtype)
    found = {name: run() for name, run in programs.items()}
    worst = max(
        agree(name, np.log(found["meristem"]), np.log(values), TOLERANCES[options.device], is_rounded=is_gpu)
        for name, values in found.items()
    )
    return Finding(
        f"{case.what}, forward",
        f"{describe(case)}, {kind}: class probabilities, whose logarithms differ by {worst:.1e} "
        f"{'rms' if is_gpu else 'at most'}.",
        race(programs, options, is_warm=True),
        work=len(case.pictures),
        unit="pictures",
    )


def our_forward(
    case: Case, dtype: torch.dtype, options: Options, is_compiled: bool = False
) -> Callable[[], np.ndarray]:
    """Class probabilities as `meristem predict` makes them; on a GPU, of a pack that is there already."""
    runner = TrunkRunner(case.ours.task.model, dtype=dtype, device=options.device, is_compiled=is_compiled)
    predictor, column = Predictor(runner), column_of(case.pictures)
    if options.device == "cpu":
        return lambda: predictor.predict(column)[LABEL].values
    (readout,) = predictor.readouts
    wanted = Wanted({LABEL: HeadRequest(rounds_alike=True)}, num_first=0)
    batch = pack_column(column, np.arange(len(column)), range(len(column))).to(options.device)

    @torch.inference_mode()
    def run() -> np.ndarray:
        rows = runner.run_batch(batch, wanted)
        values = np.empty((len(column), readout.num_outputs), np.float32)
        values[list(rows.records)] = in_units(readout, rows.outputs.heads[LABEL].float()).cpu().numpy()
        return values

    return run


def step(case: Case, options: Options) -> Finding:
    """Training steps on all pictures at once."""
    ours, model = case.ours, case.ours.task.architecture
    numbers = np.random.default_rng(1).integers(0, shape_of(options)["num_classes"], len(case.pictures))
    names = class_names(options)
    batch = packed(ours.task.objective, case.pictures, options, [{LABEL: names[number]} for number in numbers])
    theirs = (case.whole, torch.from_numpy(numbers).to(options.device))
    peers = {case.peer: PeerStep(case.copy(), class_loss, options)}
    programs = {"meristem": partial(ours, batch)}
    if options.device == "cuda":
        peers[f"{case.peer}, compiled"] = PeerStep(compiled(case.copy()), class_loss, options)
        programs["meristem, compiled"] = partial(ours.compiled(), batch)
    else:
        peers[f"{case.peer}, fused AdamW"] = PeerStep(case.copy(), class_loss, options, is_fused=True)
    ours.task.train()
    said = agreed(ours, (batch,), peers, theirs)
    programs |= {name: partial(one, *theirs) for name, one in peers.items()}
    seconds = race(programs, options)
    fastest = min((seconds[name] for name in programs if name.startswith("meristem")), key=statistics.median)
    tokens = batch.layout.num_tokens
    return Finding(
        f"{case.what}, training step",
        f"{describe(case)}, {precision(options)}: forward, backward, clipping, AdamW. {said}",
        seconds,
        work=len(case.pictures),
        unit="pictures",
        notes=(
            "Operations are those of a whole pass. Where a head reads the class rows alone, the last block of ours "
            "makes no others.",
        ),
        values=achieved(model, tokens, round(tokens / len(case.pictures)), fastest, options),
    )


def describe(case: Case) -> str:
    """Pictures and padding in words."""
    tokens = sum(map(len, case.pictures))
    text = f"{len(case.pictures)} pictures, {tokens:,} rows"
    if isinstance(case.whole, dict):
        text += (
            f", {tokens / (case.whole['patch_valid'].numel() + len(case.pictures) * NUM_REGISTERS):.0%} of the padded"
        )
    return text


def shape_of(options: Options) -> Mapping[str, Any]:
    return QUICK if options.is_quick else SMALL


def class_names(options: Options) -> list[str]:
    """Names whose order is that of their numbers."""
    return [f"{number:04}" for number in range(shape_of(options)["num_classes"])]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def class_loss(model: nn.Module, pictures: Pictures, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(pictures).float(), labels)


@torch.inference_mode()
def their_forward(model: nn.Module, batches: list[tuple[np.ndarray, Pictures]], dtype: torch.dtype) -> np.ndarray:
    """Class probabilities of all batches, in the order of the pictures."""
    found = [model(cast(pictures, dtype)).float().softmax(-1).cpu().numpy() for _, pictures in batches]
    values = np.empty((sum(map(len, found)), found[0].shape[1]), np.float32)
    for (rows, _), part in zip(batches, found):
        values[rows] = part
    return values


def cast(pictures: Pictures, dtype: torch.dtype) -> Pictures:
    """Values in the precision of the model."""
    if isinstance(pictures, dict):
        return {**pictures, "patches": pictures["patches"].to(dtype)}
    return pictures.to(dtype)


def our_step(architecture: TransformerConfig, tokenizer: PatchTokenizer, pool: str, options: Options) -> OurStep:
    """Our step of a classifier of pictures, with its first weights."""
    objective = Supervised([Target(name=LABEL, pool=pool)])  # type: ignore[arg-type]
    records = [Record.of("", b"", {LABEL: name}) for name in class_names(options)]
    objective.bind(RunData(tokenizer, {"train": Part.of(records)}))
    objective.bind_model(architecture)
    return OurStep(Task(ModelSpec(architecture=architecture, objective=objective, optimizer=OPTIMIZER)), options)


def column_of(pictures: list[Tokens]) -> TokenColumn:
    """Pictures end to end."""
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in pictures])])
    ids, features, positions = (
        np.concatenate([getattr(tokens, name) for tokens in pictures]) for name in ("ids", "features", "positions")
    )
    return TokenColumn(ids=ids, offsets=offsets, features=features, positions=positions, is_special=ids >= 0)


def one_size(options: Options) -> Case:
    """Squares of 224 pixels; our model is the one that `meristem import` makes of timm's."""
    side = QUICK_PX if options.is_quick else IMAGE_PX

    def build() -> nn.Module:
        model: nn.Module = timm.create_model("vit_small_patch16_224", img_size=side, **shape_of(options))
        return model

    peer = build()
    redraw(peer)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(peer, folder, safe_serialization=True)
        card, model = load_any(Path(folder))
    assert isinstance(card.tokenizer, PatchTokenizer)
    ours = our_step(card.architecture, card.tokenizer, "cls", options)
    ours.task.model.load_state_dict(model.state_dict())
    count = 2 if options.is_quick else COUNT[options.device]
    values = np.random.default_rng(0).random((count, side, side, 3), np.float32)
    standard = (values - np.array(card.tokenizer.mean, np.float32)) / np.array(card.tokenizer.std, np.float32)
    return Case(
        what=f"ViT-S/16, {side} px",
        peer="timm",
        ours=ours,
        tokenizer=card.tokenizer,
        build=build,
        weights=peer.state_dict(),
        pictures=[replace(card.tokenizer, crop_frac=1.0).encode(picture) for picture in values],
        whole=torch.from_numpy(standard.transpose(0, 3, 1, 2).copy()).to(options.device),
    )


def mixed_sizes(options: Options) -> Case:
    """Pictures of any height and width, each at its own."""
    shape = shape_of(options)
    least, most = QUICK_SIDES_PX if options.is_quick else SIDES_PX
    registers = tuple(f"<register_{number}>" for number in range(1, NUM_REGISTERS + 1))
    tokenizer = PatchTokenizer(
        image_px=None, patch_px=PATCH_PX, crop="squash", prefix=registers, max_patches=(most // PATCH_PX) ** 2
    )
    architecture = TransformerConfig(
        width=shape["embed_dim"],
        num_layers=shape["depth"],
        embedding=Embedding(vocab_size=NUM_REGISTERS, patch_features=tokenizer.num_features),
        position=NoPosition(),
        attention=Attention(num_heads=shape["num_heads"]),
        feedforward=FeedForward(width=4 * shape["embed_dim"]),
        norm=LayerNorm(eps=1e-6),
        residual=Residual(layer_scale=0.5),
        final_norm=False,
        pool=Mean(is_normed=True),
    )
    ours = our_step(architecture, tokenizer, "own", options)
    redraw(ours.task.model)
    tensors = {name: tensor.cpu().clone() for name, tensor in ours.task.model.state_dict().items()}

    def build() -> nn.Module:
        model: nn.Module = timm.create_model("naflexvit_base_patch16_gap", pos_embed="none", **shape)
        return model

    rng = np.random.default_rng(0)
    sizes = rng.integers(least, most + 1, (4 if options.is_quick else MIXED_COUNT[options.device], 2))
    pictures = [tokenizer.encode(rng.random((height, width, 3), np.float32)) for height, width in sizes]
    by_length = np.argsort([len(tokens) for tokens in pictures], kind="stable")
    parts = [by_length[at : at + SORTED_BATCH] for at in range(0, len(by_length), SORTED_BATCH)]
    return Case(
        what=f"ViT-S/16, sides of {least} to {most} px",
        peer="timm NaFlexViT, padded",
        ours=ours,
        tokenizer=tokenizer,
        build=build,
        weights=NAFLEX.write(tensors, architecture),
        pictures=pictures,
        whole=padded(pictures, options),
        in_batches=[(rows, padded([pictures[row] for row in rows], options)) for rows in parts],
    )


def padded(pictures: list[Tokens], options: Options) -> dict[str, torch.Tensor]:
    """Patches as NaFlexViT takes them: every picture has as many as the longest, and a mask says which are its own."""
    counts = [len(tokens) - NUM_REGISTERS for tokens in pictures]
    first = pictures[0].features
    assert first is not None
    patches = np.zeros((len(pictures), max(counts), first.shape[1]), np.float32)
    places = np.zeros((*patches.shape[:2], 2), np.int64)
    for row, (tokens, count) in enumerate(zip(pictures, counts)):
        assert tokens.features is not None
        patches[row, :count], places[row, :count] = tokens.features[NUM_REGISTERS:], tokens.positions[NUM_REGISTERS:]
    batch = {
        "patches": torch.from_numpy(patches),
        "patch_coord": torch.from_numpy(places),
        "patch_valid": torch.arange(max(counts)) < torch.tensor(counts)[:, None],
    }
    return {name: tensor.to(options.device) for name, tensor in batch.items()}
