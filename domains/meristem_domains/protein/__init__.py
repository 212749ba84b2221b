"""The protein domain: readers of sequences, the residue alphabet of ESM, and the architectures of ESM models."""

from pathlib import Path

from meristem.data.similarity import Similarity
from meristem.domain import Domain
from meristem_domains.protein.alphabet import tokenizer
from meristem_domains.protein.contacts import CONTACTS_SCORER
from meristem_domains.protein.fasta import ProteinReader
from meristem_domains.protein.presets import PRESETS

domain = Domain(
    name="protein",
    reader=ProteinReader(),
    tokenizer=tokenizer,
    presets=PRESETS,
    similarity=Similarity(k=5, threshold=0.25),
    sample=Path(__file__).parent / "sample.fasta",
    scorers={"contacts": CONTACTS_SCORER},
)

__all__ = ["domain"]
