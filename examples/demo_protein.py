"""From a FASTA file to a trained model, its embeddings and a map of families, in a few minutes on two cores.

It types the commands that you would type, then reads the embeddings back. Results go to `demo/`.
Run it by `make demo`.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA

import meristem
from meristem.domain import load_domain

OUT = Path("demo")
RUN, VECTORS, MAP = OUT / "run", OUT / "vectors", OUT / "map.png"
SHOWN_NEIGHBOURS = 3


def main() -> None:
    started = time.perf_counter()
    domain = load_domain("protein")
    sample = domain.sample
    meristem_says("fit", "--config", "protein/sample", "--run_dir", RUN)
    meristem_says("embed", RUN, sample, "--output", VECTORS)

    families = read_families(sample)
    embeddings = meristem.read_embeddings(VECTORS)
    ids, values = list(embeddings.ids), np.asarray(embeddings.values)
    similarity = cosine_similarity(values)
    print_neighbours(ids, [families[id] for id in ids], similarity)
    draw_map(values, [families[id] for id in ids])

    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look at")
    for path, what in (
        (RUN / "curves.png", "losses and learning rate"),
        (MAP, "every protein of the sample, coloured by family"),
        (RUN / "model", "the model directory: use it wherever MODEL is asked for"),
        (VECTORS, "one vector a protein, as Parquet"),
    ):
        print(f"  {path!s:<22} {what}")
    print("and try")
    for command in (
        f"meristem inspect {RUN}",
        f"meristem embed {RUN} your_proteins.fasta --output your_vectors",
        f"meristem score {RUN} your_proteins.fasta --output likelihoods.csv",
        "meristem fit --config protein/esm2_8m --data.sources your_proteins.fasta",
    ):
        print(f"  {command}")


def meristem_says(*arguments: object) -> None:
    """Run a command as a user types it, and stop where it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ meristem {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "meristem.cli.main", *words]).returncode
    if code:
        sys.exit(code)


def read_families(sample: Path) -> dict[str, str]:
    """Family by id, from `family=` in the headers of the sample."""
    headers = [line for line in sample.read_text(encoding="utf-8").splitlines() if line.startswith(">")]
    found = {}
    for header in headers:
        family = re.search(r"family=(\S+)", header)
        assert family, f"a header of the sample names no family: {header}"
        found[header[1:].split()[0]] = family.group(1)
    return found


def cosine_similarity(values: np.ndarray) -> np.ndarray:
    """`[N, N]` cosines of the vectors, taken from their common mean: raw ones all point one way."""
    centred = values - values.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit @ unit.T


def print_neighbours(ids: list[str], families: list[str], similarity: np.ndarray) -> None:
    """The nearest neighbours of one protein of each of the largest families."""
    np.fill_diagonal(similarity, -np.inf)
    nearest = similarity.argsort(axis=1)[:, ::-1]
    by_size = sorted(set(families), key=lambda family: (-families.count(family), family))
    for family in by_size[:3]:
        query = families.index(family)
        print(f"\nnearest to {ids[query]} ({family})")
        for found in nearest[query, :SHOWN_NEIGHBOURS]:
            print(f"  {similarity[query, found]:5.2f}  {ids[found]} ({families[found]})")
    hits = np.mean([families[nearest[i, 0]] == families[i] for i in range(len(ids))])
    print(f"\n{hits:.0%} of {len(ids)} proteins have one of their own family as nearest neighbour")


def draw_map(values: np.ndarray, families: list[str]) -> None:
    """The two main directions of the vectors, coloured by family."""
    points = PCA(n_components=2).fit_transform(values / np.linalg.norm(values, axis=1, keepdims=True))
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    colours = plt.get_cmap("tab20")
    for index, family in enumerate(sorted(set(families))):
        rows = [i for i, name in enumerate(families) if name == family]
        axes.scatter(points[rows, 0], points[rows, 1], s=45, color=colours(index % 20), label=family, edgecolor="white")
    axes.set(xlabel="first principal component", ylabel="second principal component", title="Proteins of the sample")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(MAP, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
