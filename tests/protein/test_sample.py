"""The bundled sample states facts: real proteins, whole and unchanged, as UniProt has them.

Entries are the whole UniProt sequence: precursors with their signal peptides, initiator methionine included where
the entry includes it.
"""

import csv
import re
from pathlib import Path

import pytest
from Bio.Align import PairwiseAligner, substitution_matrices

from meristem.data.records import PAYLOAD, ReadOptions, Source
from meristem_domains.protein import domain

# residues of each UniProt entry, by accession
LENGTHS = {
    "globin": (
        "P69905:142 P01942:142 P01946:142 P01958:142 P01966:142 P01994:142 P68871:147 P02042:147 "
        "P69891:147 P02100:147 P02088:147 P02091:147 P02062:146 P02070:145 P02112:147 P02144:154 "
        "P02185:154 P68082:154 P04247:154 P02192:154 P02189:154 P02240:154"
    ),
    "cytochrome_c": "P99999:105 P00002:105 P00004:105 P62894:105 P62897:105 P67881:105 P84029:108 P00044:109",
    "insulin": (
        "P01308:110 P30410:110 P01317:105 P01315:108 P01321:110 P01311:110 P01325:108 P01326:110 "
        "P01322:110 P01323:110 P67970:107"
    ),
    "ubiquitin": "P0CG47:229 P0CG48:685 P62979:156 P62987:128 P0CG63:381 P05759:152 P0CH08:128 Q15843:81",
    "lysozyme_c": "P00698:147 P00703:147 P61626:148 P00697:148 P00709:142 P00711:142",
    "histone_H4": "P62805:103 P84040:103 P59259:103 P02309:103",
    "histone_H3": "P68431:136 P84243:136 P02299:136 P59226:136 P61830:136",
    "histone_H2A": "P04908:130 P16104:143 P0C0S5:128 P84051:124 P04911:132",
    "histone_H2B": "P62807:126 P02283:123 P02293:131",
    "calmodulin": "P0DP23:149 P62152:149 P06787:147 P27482:149 P63316:161 P02585:160",
    "thioredoxin": "P10599:105 P10639:105 P11232:105 P22217:103 P22803:104 P0AA25:109 P14949:104",
    "superoxide_dismutase": "P00441:154 P08228:154 P00442:152 P00445:154",
    "ribonuclease_A": "P61823:150 P07998:156 P03950:147 P12724:160 P10153:161",
    "small_GTPase": "P01112:189 P01116:189 P01111:189 P61586:193 P63000:192 P60953:191 P62826:216",
}
HEADER = re.compile(r">sp\|(\w+)\|(\w+_\w+) .+ OS=(.+) family=(\w+)")

# the same proteins in the real data: mature chains, fragments of crystals, or entries of identical sequence
SAME = {
    "P62805": ("localization_deeploc_train.csv", "P62804", slice(None)),  # rat and human H4 are one sequence
    "P0DP23": ("localization_deeploc_train.csv", "P62158", slice(None)),  # the accession before it was split
    "P62807": ("antimicrobial_amp_train.csv", "trAMP0600", slice(None)),
    "P61626": ("antimicrobial_amp_train.csv", "trAMP2557", slice(18, None)),
    "P12724": ("antimicrobial_amp_train.csv", "trAMP2421", slice(27, None)),
    "P10153": ("antimicrobial_amp_train.csv", "trAMP1364", slice(27, None)),
    "P02185": ("secondary_structure_ss8_train.csv", "1203", slice(1, None)),
    "P00004": ("secondary_structure_ss8_train.csv", "1300", slice(1, None)),
    "P00698": ("secondary_structure_ss8_train.csv", "1146", slice(18, None)),
    "P01112": ("secondary_structure_ss8_train.csv", "1242", slice(0, 166)),
}


@pytest.fixture(scope="module")
def sample() -> dict[str, tuple[str, str]]:
    """Family and sequence by accession."""
    headers = [line for line in domain.sample.read_text().splitlines() if line.startswith(">")]
    found = [HEADER.fullmatch(header) for header in headers]
    assert all(found), headers[found.index(None)]
    sequences = [
        payload
        for batch in domain.reader.read(Source(str(domain.sample)), ReadOptions())
        for payload in batch.column(PAYLOAD).to_pylist()
    ]
    records = {match[1]: (match[4], sequence) for match, sequence in zip(found, sequences, strict=True) if match}
    assert len(records) == len(sequences), "an accession stands twice"
    return records


def test_it_holds_many_proteins_of_many_families(sample: dict[str, tuple[str, str]]) -> None:
    assert len(sample) >= 40
    families = [family for family, _ in sample.values()]
    assert len(set(families)) >= 6
    assert min(families.count(family) for family in families) >= 3
    assert len({sequence for _, sequence in sample.values()}) == len(sample)


def test_every_sequence_has_the_length_of_its_entry(sample: dict[str, tuple[str, str]]) -> None:
    expected = {
        accession: (family, int(length))
        for family, entries in LENGTHS.items()
        for accession, length in (entry.split(":") for entry in entries.split())
    }
    assert {accession: (family, len(sequence)) for accession, (family, sequence) in sample.items()} == expected


def test_every_sequence_is_whole_and_of_standard_residues(sample: dict[str, tuple[str, str]]) -> None:
    tokenizer = domain.tokenizer(nonstandard="refuse")
    for accession, (_, sequence) in sample.items():
        assert len(tokenizer.encode(sequence)) == len(sequence) + 2
        # horse haemoglobin beta was sequenced as a protein: its entry begins with the mature chain
        assert sequence.startswith("M") != (accession == "P02062")


def test_the_closest_relative_of_each_is_of_its_own_family(sample: dict[str, tuple[str, str]]) -> None:
    aligner = PairwiseAligner(
        mode="global",
        substitution_matrix=substitution_matrices.load("BLOSUM62"),
        open_gap_score=-11,
        extend_gap_score=-1,
        end_gap_score=0,
    )
    accessions = list(sample)
    best = dict.fromkeys(accessions, (-1e9, ""))
    for i, one in enumerate(accessions):
        for other in accessions[:i]:
            score = aligner.score(sample[one][1], sample[other][1])
            best[one], best[other] = max(best[one], (score, other)), max(best[other], (score, one))
    for accession, (_, relative) in best.items():
        assert sample[relative][0] == sample[accession][0], (accession, relative)


@pytest.mark.shared
def test_real_data_has_the_same_sequences(sample: dict[str, tuple[str, str]], shared_data: Path) -> None:
    by_name: dict[tuple[str, str], str] = {}
    for path in sorted((shared_data / "protein").glob("*.csv")):
        with path.open(newline="") as handle:
            for number, row in enumerate(csv.DictReader(handle)):
                by_name[path.name, row.get("accession") or row.get("id") or str(number)] = row["sequence"]
    for path in sorted((shared_data / "protein").glob("*.fasta")):
        for batch in domain.reader.read(Source(str(path)), ReadOptions()):
            for name, sequence in zip(batch.column("id").to_pylist(), batch.column(PAYLOAD).to_pylist()):
                by_name[path.name, name.partition("_")[2]] = sequence
    for (_, name), sequence in by_name.items():
        if name in sample:
            assert sequence == sample[name][1], name
    for accession, (file, name, part) in SAME.items():
        assert by_name[file, name] == sample[accession][1][part], accession
