"""Training steps of decoders: Meristem beside a plain GPT and `transformers`, on full contexts and on documents.

    python benchmarks/run.py training

Our step is the one of `meristem fit`: its task, objective, clipping, optimiser and schedule; what Lightning's loop adds
is a finding of its own. Peers have the same weights and the same tokens. The plain GPT is trained as nanoGPT trains its
own: AdamW, fused on a GPU alone and beside that fused on a CPU as well. Losses agree before a step and after one.
On a GPU all run under bf16 autocast, ours and the plain GPT compiled as well; what of the peak is reached is then the
faster of ours.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from decoders import gpt2
from harness import Finding, Options, agree, race, timed
from plain_gpt import PlainGPT
from steps import CLIP, OPTIMIZER, TOLERANCES, OurStep, PeerStep, achieved, agreed, packed, precision, redraw
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from meristem.data.order import plan_epoch
from meristem.data.records import PAYLOAD, ReadOptions, Source
from meristem.domain import load_domain
from meristem.interop.families.gpt2 import TABLE
from meristem.model.config import Init, TransformerConfig
from meristem.objectives.next_token import NextToken
from meristem.train.run import build_trainer
from meristem.train.spec import ModelSpec, TrainerSpec, Watch
from meristem.train.task import Task
from meristem.types import IGNORE, Tokens


@dataclass(frozen=True)
class Shape:
    """A decoder, and the sequences of a step.

    Attributes:
        context: tokens of a sequence.
        count: sequences of a step.
    """

    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int
    count: int

    @property
    def architecture(self) -> TransformerConfig:
        """As GPT-2 has it, without dropout."""
        return gpt2(self.width, self.layers, self.heads, self.vocab_size, self.context, Init(is_depth_scaled=True))


SHAPES = {"10M": Shape(6, 384, 6, 4096, 256, 8), "124M": Shape(12, 768, 12, 50257, 512, 1)}
GPU_SHAPES = {
    "124M": Shape(12, 768, 12, 50257, 1024, 32),
    "350M": Shape(24, 1024, 16, 50257, 1024, 16),
}
QUICK = {"tiny": Shape(2, 32, 2, 64, 16, 2)}
BATCH = 8
"""Documents of a padded batch."""
REPEATS = {"cpu": 1, "cuda": 5}
"""Steps on full contexts that are timed together."""
NUM_STEPS = {"cpu": 4, "cuda": 16}
"""Padded batches of documents that are timed together."""


def findings(options: Options) -> Iterator[Finding]:
    """Full contexts of each shape, documents of natural lengths for the first, and the cost of the loop."""
    shapes = QUICK if options.is_quick else GPU_SHAPES if options.device == "cuda" else SHAPES
    for name, shape in shapes.items():
        yield full_context(name, shape, options)
    name, shape = next(iter(shapes.items()))
    for what, lengths, context in natural_lengths(options, shape.context):
        yield documents(name, replace(shape, context=context), what, lengths, options)
    yield loop_overhead(options)


def our_step(shape: Shape, options: Options) -> OurStep:
    """Our decoder of a shape."""
    task = Task(ModelSpec(architecture=shape.architecture, objective=NextToken(), optimizer=OPTIMIZER))
    task.objective.bind_model(task.architecture)
    step = OurStep(task, options)
    redraw(task.model)
    return step


def peer_steps(shape: Shape, ours: OurStep, options: Options, of_one_size: bool = True) -> dict[str, PeerStep]:
    """Peers with the weights of ours.

    Args:
        of_one_size: batches are, so that compiling a peer for them is worth it.
    """
    tensors = {name: tensor.cpu().clone() for name, tensor in ours.task.model.state_dict().items()}

    def plain() -> PlainGPT:
        return PlainGPT(shape.vocab_size, shape.context, shape.width, shape.layers, shape.heads).take(tensors)

    config = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config)
    foreign = TABLE.write(tensors, shape.architecture)
    theirs.load_state_dict({**foreign, "lm_head.weight": foreign["transformer.wte.weight"]})
    steps = {"plain PyTorch": PeerStep(plain(), plain_loss, options)}
    if options.device == "cuda" and of_one_size:
        compiled = torch.compile(plain())
        steps["plain PyTorch, compiled"] = PeerStep(compiled, plain_loss, options)  # type: ignore[arg-type]
    if options.device == "cpu":
        steps["plain PyTorch, fused AdamW"] = PeerStep(plain(), plain_loss, options, is_fused=True)
    steps["transformers"] = PeerStep(theirs, transformers_loss, options)
    return steps


def plain_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(ids, labels)
    return loss


def transformers_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """With a mask where there is padding."""
    is_known = labels != IGNORE
    mask = None if bool(is_known.all()) else is_known.long()
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def symbols(ids: np.ndarray) -> Tokens:
    """A sequence of symbols."""
    return Tokens(positions=np.arange(len(ids))[:, None], ids=ids)


def padded(sequences: Sequence[np.ndarray], options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a batch, padded on the right to its longest sequence."""
    longest = max(map(len, sequences))
    ids, labels = np.zeros((len(sequences), longest), np.int64), np.full((len(sequences), longest), IGNORE)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = labels[row, : len(sequence)] = sequence
    return torch.from_numpy(ids).to(options.device), torch.from_numpy(labels).to(options.device)


def full_context(name: str, shape: Shape, options: Options) -> Finding:
    """Steps on sequences that fill the context: nothing to gain by packing."""
    ours = our_step(shape, options)
    peers = peer_steps(shape, ours, options)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, shape.vocab_size, shape.context) for _ in range(shape.count)]
    batch, theirs = packed(ours.task.objective, [*map(symbols, sequences)], options), padded(sequences, options)
    said = agreed(ours, (batch,), peers, theirs)
    repeats = REPEATS[options.device]
    programs = {"meristem": partial(_run_all, ours, [(batch,)] * repeats)}
    if options.device == "cuda":
        programs["meristem, compiled"] = partial(_run_all, ours.compiled(), [(batch,)] * repeats)
    peer_programs = {name: partial(_run_all, step, [theirs] * repeats) for name, step in peers.items()}
    seconds = race({**programs, **peer_programs}, options)
    fastest = min((seconds[name] for name in programs), key=statistics.median)
    tokens = shape.context * shape.count * repeats
    return Finding(
        f"GPT {name}, {shape.count} x {shape.context} tokens a step",
        f"{shape.layers} layers of {shape.width}, {shape.heads} heads, {shape.vocab_size:,} symbols, random tokens, "
        f"{precision(options)}: forward, backward, clipping, AdamW; {repeats} at a time. {said}",
        seconds,
        work=tokens,
        values=achieved(shape.architecture, tokens // repeats, shape.context, [s / repeats for s in fastest], options),
    )


def natural_lengths(options: Options, context: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """Lengths of real documents, in the order of their file, and the context that they are cut to."""
    text = options.data("text/wikitext2_valid.txt")
    if text is not None:
        words = [len(line.split()) for line in text.read_text().splitlines() if not line.strip().startswith("=")]
        yield "paragraphs of wikitext2_valid.txt, a token a word", _drawn(words, context), context
    proteins, limit = options.data("protein/uniref90_sample.fasta"), max(4 * context, 512)
    domain = load_domain("protein")
    residues = [
        len(payload)
        for batch in domain.reader.read(Source(str(proteins or domain.sample)), ReadOptions())
        for payload in batch.column(PAYLOAD).to_pylist()
        if len(payload) <= limit
    ]
    yield f"proteins of {proteins.name if proteins else 'the bundled sample'}", _drawn(residues, limit), limit


def _drawn(lengths: Sequence[int], limit: int) -> np.ndarray:
    """Some of them at random, with a seed; empty documents and those of one token have nothing to predict."""
    known = np.minimum([length for length in lengths if length > 1], limit)
    return np.random.default_rng(0).permutation(known)


def documents(name: str, shape: Shape, what: str, lengths: np.ndarray, options: Options) -> Finding:
    """Steps on documents: packs of like lengths, as `fit` plans them, beside padded batches in file order."""
    num_steps = 2 if options.is_quick else NUM_STEPS[options.device]
    lengths = lengths[: num_steps * BATCH]
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, shape.vocab_size, length) for length in lengths]
    ours = our_step(shape, options)
    peers = peer_steps(shape, ours, options, of_one_size=False)
    tokens = int(lengths.sum())
    plan = plan_epoch(lengths, tokens_per_batch=-(-tokens // num_steps) * 11 // 10, seed=0, epoch=0)
    packs = [packed(ours.task.objective, [symbols(sequences[i]) for i in rows], options) for rows in plan]
    batches = [padded(sequences[at : at + BATCH], options) for at in range(0, len(sequences), BATCH)]
    scored = tokens - len(lengths)  # the last of each has none behind it
    with torch.no_grad():
        own = sum(ours.loss(batch).item() * sum(batch.step_counts.values()) for batch in packs) / scored
        within = TOLERANCES[options.device]
        worst = max(agree(n, own, _mean_loss(step, batches) / scored, within) for n, step in peers.items())
    share = tokens / sum(ids.numel() for ids, _ in batches)
    return Finding(
        f"GPT {name}, documents: {what}",
        f"{len(lengths)} documents of {lengths.min()} to {lengths.max()} tokens, {tokens:,} in all, "
        f"{precision(options)}. Meristem: {len(packs)} steps of packs; peers: {len(batches)} steps of {BATCH} "
        f"documents in file order, padded to the longest; {share:.0%} of the padded rows hold a token. Mean losses "
        f"differ by {worst:.1e} at most.",
        race(
            {
                "meristem": partial(_run_all, ours, [(batch,) for batch in packs]),
                **{name: partial(_run_all, step, batches) for name, step in peers.items()},
            },
            options,
        ),
        work=tokens,
    )


def _mean_loss(step: PeerStep, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The sum of all tokens' losses."""
    return sum(step.loss(ids, labels).item() * int((labels[:, 1:] != IGNORE).sum()) for ids, labels in batches)


def _run_all(step: Callable[..., None], batches: Sequence[tuple[Any, ...]]) -> None:
    for batch in batches:
        step(*batch)


class Clock(L.Callback):
    """Seconds a step in Lightning's loop, the first one left out."""

    def __init__(self, options: Options):
        self.options, self.began, self.seconds = options, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.options.device == "cuda" and trainer.global_step in (1, trainer.max_steps):
            torch.cuda.synchronize()
        if trainer.global_step == 1:
            self.began = time.perf_counter()
        self.seconds = (time.perf_counter() - self.began) / max(1, trainer.global_step - 1)


def loop_overhead(options: Options) -> Finding:
    """A model so small that what Lightning's loop does in a step shows."""
    shape, steps = QUICK["tiny"], 10 if options.is_quick else 100
    rng = np.random.default_rng(0)
    ours = our_step(shape, options)
    sequence = symbols(rng.integers(0, shape.vocab_size, shape.context))
    batch = packed(ours.task.objective, [sequence] * shape.count, options)

    def alone() -> float:
        return timed(partial(_run_all, ours, [(batch,)] * steps), options.device) / steps

    def in_loop() -> float:
        clock = Clock(options)
        settings = TrainerSpec(max_steps=steps + 1, accelerator=options.device, devices=1, gradient_clip_val=CLIP)
        trainer = build_trainer(settings, [clock], None, Watch())
        task = Task(ModelSpec(architecture=shape.architecture, objective=NextToken(), optimizer=OPTIMIZER))
        task.objective.bind_model(task.architecture)
        trainer.fit(task, DataLoader([batch] * (steps + 1), batch_size=None))  # type: ignore[arg-type]
        return clock.seconds

    seconds: dict[str, list[float]] = {"meristem, the step alone": [], "meristem in Lightning's loop": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on loaders that are not ours
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        alone(), in_loop()
        for _ in range(options.rounds):
            for name, run in zip(seconds, (alone, in_loop)):
                seconds[name].append(run())
    added = statistics.median(b - a for a, b in zip(*seconds.values()))
    return Finding(
        "What Lightning's loop adds to a step",
        f"{shape.layers} layers of {shape.width}, {shape.count} x {shape.context} tokens: as good as no arithmetic. "
        "Seconds are those of one step.",
        seconds,
        reference="meristem, the step alone",
        values={"added to each step": f"{added * 1e3:.2f} ms"},
    )
