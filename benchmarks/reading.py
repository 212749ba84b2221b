"""From a file to tokens, packs and a first vector: Meristem beside Biopython, `transformers` and a loop over records.

    python benchmarks/run.py reading --threads 1

Ours is what the verbs run: the domain's `read`, the tokenizer's `encode_column`, the chunks of `embed`, the loader of
`fit`, the command itself. Inputs are real proteins, repeated up to 100 MB. Each program uses one core. Names, sequences
and tokens agree before anything is timed.
"""

import gzip
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from Bio import SeqIO
from Bio.SeqIO.FastaIO import SimpleFastaParser
from embedding import SHAPES, save_peer
from harness import Finding, Options, agree, peak_bytes, race
from steps import OPTIMIZER, OurStep
from transformers import EsmTokenizer

from meristem.api import read_embeddings
from meristem.data.loader import PackMaker, TrainLoader
from meristem.data.parts import RunData
from meristem.data.records import PAYLOAD, ReadOptions, Source
from meristem.data.store import RecordStore
from meristem.domain import load_domain
from meristem.inference.chunks import ChunkReader
from meristem.inference.encoding import Reading
from meristem.inference.engine import Embedder
from meristem.inference.job import JobOptions
from meristem.objectives.masked import MaskedTokens
from meristem.train.spec import ModelSpec
from meristem.train.task import Task
from meristem_domains.protein.presets import PRESETS

DOMAIN = load_domain("protein")
TOKENIZER = DOMAIN.tokenizer()
SIZE_MB, PACKED_MB, SLOW_MB, QUICK_MB = 100, 20, 0.3, 1
CROP_TOKENS, SHORT_RESIDUES, CROPS = 1024, 1_000, 50
LINE_RESIDUES = 60
TOLERANCE = 1e-4


def findings(options: Options) -> Iterator[Finding]:
    """Parsing, tokenizing, loading, starting."""
    pa.set_cpu_count(1)
    path = options.data("protein/uniref90_sample.fasta") or DOMAIN.sample
    proteins = read_plainly(path)
    full, packed, slow = (
        [min(size, QUICK_MB) for size in (SIZE_MB, PACKED_MB, SLOW_MB)]
        if options.is_quick
        else [SIZE_MB, PACKED_MB, SLOW_MB]
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wrapped = write(folder / "wrapped.fasta", proteins, full, LINE_RESIDUES)
        single = write(folder / "single.fasta", proteins, full, 0)
        squeezed = folder / "wrapped.fasta.gz"
        text = write(folder / "part.fasta", proteins, packed, LINE_RESIDUES).read_bytes()
        squeezed.write_bytes(gzip.compress(text, 6))
        yield parsing(f"lines of {LINE_RESIDUES}", wrapped, options)
        yield parsing("a line a sequence", single, options)
        yield parsing("gzip", squeezed, options, len(text))
        yield tokenizing(wrapped, options)
        yield slow_tokenizing(proteins, slow, folder, options)
        yield loading(path, folder, options)
        yield cropping(folder, options)
        yield starting(folder, proteins[0], options)


def parsing(how: str, path: Path, options: Options, num_bytes: int = 0) -> Finding:
    """Files to names and sequences."""
    is_same = all(ours == theirs for ours, theirs in zip(rows_of(path), read_plainly(path), strict=True))
    assert is_same, "names or sequences differ; nothing was timed"
    programs: dict[str, Callable[[], Any]] = {
        "meristem": partial(read_columns, path),
        "Biopython, SimpleFastaParser": partial(parse_alone, path),
        "Biopython, SeqIO": partial(read_objects, path),
        "the bytes alone": partial(read_bytes, path),
    }
    return Finding(
        f"Reading FASTA, {how}",
        f"{count_of(path)}. Names and sequences are equal.",
        race(programs, options),
        work=(num_bytes or path.stat().st_size) / 1e6,
        unit="MB",
        values=of_a_core(programs, (num_bytes or path.stat().st_size) / 1e6, options),
    )


def tokenizing(path: Path, options: Options) -> Finding:
    """Files to tokens."""
    ways = {
        "meristem": read_tokens,
        "meristem, chunks of embed": read_chunks,
        "SimpleFastaParser, a look-up a record": look_up,
    }
    ours, *others = (np.concatenate(list(way(path))) for way in ways.values())
    for theirs in others:
        agree("tokens", ours, theirs, 0)
    programs: dict[str, Callable[[], Any]] = {name: partial(count_tokens, way, path) for name, way in ways.items()}
    return Finding(
        f"Reading and tokenizing FASTA, lines of {LINE_RESIDUES}",
        f"{count_of(path)}. Tokens are equal. Chunks are hashed too, so that a run that was killed finds them again.",
        race(programs, options),
        work=path.stat().st_size / 1e6,
        unit="MB",
        values=of_a_core(programs, path.stat().st_size / 1e6, options),
    )


def slow_tokenizing(proteins: list[tuple[str, str]], size_mb: float, folder: Path, options: Options) -> Finding:
    """Sequences in memory to tokens."""
    (folder / "vocab.txt").write_text("\n".join(TOKENIZER.vocab) + "\n")
    peer = EsmTokenizer(str(folder / "vocab.txt"))
    ends = np.cumsum([len(sequence) for _, sequence in proteins])
    sequences = [sequence for _, sequence in proteins[: int(np.searchsorted(ends, size_mb * 1e6)) + 1]]
    column = pa.array(sequences, pa.large_string())
    theirs = [i for ids in peer(sequences)["input_ids"] for i in ids]
    agree("tokens", TOKENIZER.encode_column(column).ids, np.array(theirs), 0)
    programs = {
        "meristem": partial(TOKENIZER.encode_column, column),
        "transformers, EsmTokenizer": partial(peer, sequences),
    }
    return Finding(
        "Tokenizing sequences in memory",
        f"{len(sequences):,} sequences. Tokens are equal.",
        race(programs, options),
        work=sum(map(len, sequences)) / 1e6,
        unit="MB",
    )


def loading(path: Path, folder: Path, options: Options) -> Finding:
    """Stored records to masked packs, and what the smallest model makes of the same packs."""
    num_packs = 2 if options.is_quick else 4
    store = RecordStore.build(DOMAIN.reader, [Source(str(path))], ReadOptions(), name=DOMAIN.name, cache_dir=folder)
    objective = MaskedTokens()
    objective.bind(RunData(TOKENIZER))
    maker = PackMaker(store, np.arange(len(store)), TOKENIZER, objective, 0, 1024)
    loader = TrainLoader(maker, tokens_per_batch=4096, packs_per_step=1)
    packs = list(islice(iter(loader), num_packs))
    moved = [pack.to(options.device) for pack in packs]
    step = OurStep(Task(ModelSpec(architecture=PRESETS["esm2_8m"], objective=objective, optimizer=OPTIMIZER)), options)
    model = step.task.model
    # what is embedded are the same records, whole
    column = TOKENIZER.encode_column(store.payloads(np.array([record for pack in packs for record in pack.records])))
    share = int(column.offsets[-1]) / sum(pack.layout.num_tokens for pack in packs)

    def train() -> None:
        model.train()
        for pack in moved:
            step(pack)

    def embed() -> None:
        model.eval()
        Embedder(JobOptions(precision="fp32").trunk(model, options.device), "mean").embed(column)

    programs = {
        "meristem loader": lambda: list(islice(iter(loader), num_packs)),
        "training step of ESM-2 8M": train,
        "embedding by ESM-2 8M": embed,
    }
    return Finding(
        "Loading beside what the model takes",
        f"{num_packs} packs of 4,096 tokens at most, cropped and masked; loading in one process. fp32 on a CPU.",
        race(programs, options),
        reference="meristem loader",
        work=sum(pack.layout.num_tokens for pack in packs),
        notes=[f"Embedding takes whole records: {share:.2f} times the tokens of the cropped ones."],
    )


def cropping(folder: Path, options: Options) -> Finding:
    """One window of a short record and of a very long one: the cost must not depend on the length."""
    rng = np.random.default_rng(0)
    sizes = {"a record of 1 thousand": SHORT_RESIDUES, "a record of 100 million": SIZE_MB * 10**6}
    if options.is_quick:
        sizes = {"a record of 1 thousand": SHORT_RESIDUES, "a record of 1 million": QUICK_MB * 10**6}
    makers = {}
    for name, size in sizes.items():
        path = folder / f"{size}.fasta"
        residues = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)[rng.integers(0, 20, size)]
        path.write_bytes(b">one\n" + residues.tobytes() + b"\n")
        store = RecordStore.build(DOMAIN.reader, [Source(str(path))], ReadOptions(), name=DOMAIN.name, cache_dir=folder)
        objective = MaskedTokens()
        objective.bind(RunData(TOKENIZER))
        makers[name] = PackMaker(store, np.arange(1), TOKENIZER, objective, 0, CROP_TOKENS)

    def crop(maker: PackMaker) -> None:
        for epoch in range(CROPS):
            maker.make(epoch, np.zeros(1, np.int64))

    programs = {name: partial(crop, maker) for name, maker in makers.items()}
    return Finding(
        f"{CROPS} windows of {CROP_TOKENS:,} tokens, masked and packed, of records of residues",
        "From stores whose lengths are known.",
        race(programs, options),
        reference=next(iter(sizes)),
        work=CROPS,
        unit="windows",
        values={f"memory of a window, {name}": f"{peak_bytes(run) / 1e3:,.0f} kB" for name, run in programs.items()},
    )


def starting(folder: Path, protein: tuple[str, str], options: Options) -> Finding:
    """From the command to the first vector, each in a process of its own."""
    layers, width, heads, _ = SHAPES["8M"]
    foreign, own, source = folder / "foreign", folder / "own", folder / "one.fasta"
    save_peer(foreign, layers, width, heads)
    run_python(OURS, "import", foreign, own)
    source.write_text(">{}\n{}\n".format(*protein))
    runs = iter(range(10_000))

    def ours(model: Path) -> Path:
        output = folder / f"out{next(runs)}"
        run_python(OURS, "embed", model, source, "--output", output)
        return output

    theirs = partial(run_python, THEIRS, foreign, source, folder / "theirs.npy")
    theirs()
    expected = np.load(folder / "theirs.npy")
    worst = max(agree("vectors", read_embeddings(ours(model)).values, expected, TOLERANCE) for model in (own, foreign))
    programs: dict[str, Callable[[], Any]] = {
        "meristem embed": partial(ours, own),
        "meristem embed, directory of transformers": partial(ours, foreign),
        "transformers, model and tokenizer": theirs,
        "import torch": partial(run_python, "import torch"),
        "meristem --help": partial(run_python, OURS, "--help"),
        "import meristem": partial(run_python, "import meristem"),
        "python": partial(run_python, "pass"),
    }
    return Finding(
        "Starting: one protein to its vector, ESM-2 8M shape",
        f"A process each, files in the cache. Vectors differ by {worst:.1e} at most.",
        race(programs, options, is_warm=True),
        reference="meristem embed",
    )


OURS = "import sys; from meristem.cli.main import main; sys.exit(main(sys.argv[1:]))"
THEIRS = """
import sys
import numpy as np
import torch
from transformers import EsmModel, EsmTokenizer
folder, source, output = sys.argv[1:]
model = EsmModel.from_pretrained(folder, add_pooling_layer=False).eval()
tokenizer = EsmTokenizer(folder + "/vocab.txt")
sequence = open(source).read().split("\\n", 1)[1].replace("\\n", "")
with torch.inference_mode():
    hidden = model(**tokenizer(sequence, return_tensors="pt")).last_hidden_state
np.save(output, hidden[:, 1:-1].mean(1).numpy())
"""


def run_python(code: str, *arguments: Any) -> None:
    """Run a line of Python in a process of its own."""
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)


def of_a_core(programs: dict[str, Callable[[], Any]], size_mb: float, options: Options) -> dict[str, str]:
    """MB a second of processor time, the best round of each program: what a core does that nobody else wants."""
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(options.rounds):
        for name, run in programs.items():
            began = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - began)
    return {f"{name}, MB/s of processor time, best": f"{size_mb / took:,.0f}" for name, took in best.items()}


def write(path: Path, proteins: list[tuple[str, str]], size_mb: float, line_residues: int) -> Path:
    """A FASTA of about this size, of proteins that come again and again."""
    parts = [
        f">{header}\n" + "\n".join(sequence[at : at + width] for at in range(0, len(sequence), width)) + "\n"
        for header, sequence in proteins
        for width in [line_residues or len(sequence)]
    ]
    text = "".join(parts).encode()
    if len(text) > size_mb * 1e6:
        text = text[: text.rindex(b"\n>", 0, int(size_mb * 1e6)) + 1]
    path.write_bytes(text * max(1, round(size_mb * 1e6 / len(text))))
    return path


def count_of(path: Path) -> str:
    batches = DOMAIN.reader.read(Source(str(path)), ReadOptions())
    return f"{sum(batch.num_rows for batch in batches):,} records, {path.stat().st_size / 1e6:,.0f} MB on disk"


def rows_of(path: Path) -> Iterator[tuple[str, str]]:
    for batch in DOMAIN.reader.read(Source(str(path)), ReadOptions()):
        yield from zip(batch.column("id").to_pylist(), batch.column(PAYLOAD).to_pylist())


def read_columns(path: Path) -> int:
    return sum(batch.num_rows for batch in DOMAIN.reader.read(Source(str(path)), ReadOptions()))


def count_tokens(way: Callable[[Path], Iterator[np.ndarray]], path: Path) -> int:
    """All tokens, none of them kept."""
    return sum(map(len, way(path)))


def read_tokens(path: Path) -> Iterator[np.ndarray]:
    for batch in DOMAIN.reader.read(Source(str(path)), ReadOptions()):
        yield TOKENIZER.encode_column(batch.column(PAYLOAD)).ids


def read_chunks(path: Path) -> Iterator[np.ndarray]:
    for chunk in ChunkReader(DOMAIN, Reading({INPUT: TOKENIZER}), [str(path)], ReadOptions()):
        yield chunk.column.ids


def opened(path: Path) -> Any:
    return gzip.open(path, "rt") if path.suffix == ".gz" else open(path)


def read_plainly(path: Path) -> list[tuple[str, str]]:
    """First words of headers, and sequences."""
    with opened(path) as file:
        return [(title.split(None, 1)[0], sequence) for title, sequence in SimpleFastaParser(file)]


def parse_alone(path: Path) -> int:
    with opened(path) as file:
        return sum(1 for _ in SimpleFastaParser(file))


def read_objects(path: Path) -> int:
    with opened(path) as file:
        return sum(len(record.seq) for record in SeqIO.parse(file, "fasta"))


def read_bytes(path: Path) -> int:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb", buffering=0) as file:
        return sum(len(block) for block in iter(partial(file.read, 1 << 20), b""))


def look_up(path: Path) -> Iterator[np.ndarray]:
    """The fastest way with an object a record: a look-up of its bytes in a table."""
    table = bytes(TOKENIZER.encode(chr(byte)).ids[1] if chr(byte).isalpha() else 0 for byte in range(128)) + bytes(128)
    first, last = TOKENIZER.encode("").ids.astype(np.int16)
    with opened(path) as file:
        for _, sequence in SimpleFastaParser(file):
            ids = np.empty(len(sequence) + 2, np.int16)
            ids[0], ids[-1] = first, last
            ids[1:-1] = np.frombuffer(bytearray(sequence, "ascii").translate(table), np.uint8)
            yield ids
