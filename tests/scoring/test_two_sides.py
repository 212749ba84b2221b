"""`meristem score` of an encoder-decoder: targets given sources, two columns of a table."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from small_scored import LETTERS, by_brute_force, redrawn, small_config

import meristem
from meristem.cli.main import main
from meristem.model.config import Attention, Causal, Embedding, LayerRule, Learned
from meristem.model.model import Model
from meristem.model_directory import ModelCard, save_model
from meristem_domains.protein.alphabet import tokenizer as protein_tokenizer
from model_runs import specs

TOKENIZER = protein_tokenizer()


@pytest.mark.parametrize("names", [("source", "target"), ("german", "english")])
def test_the_command_scores_targets_given_sources(
    names: tuple[str, str], tmp_path: Path, rng: np.random.Generator
) -> None:
    config = small_config(
        num_layers=2,
        num_decoder_layers=2,
        position=Learned(max_positions=60),
        layers=(LayerRule(start=2, attention=Attention(num_heads=4, pattern=Causal())),),
        embedding=Embedding(vocab_size=33),
        attention=Attention(num_heads=4),
    )
    model = redrawn(Model(config, specs(("tokens",))))
    save_model(tmp_path / "model", ModelCard(model.config, TOKENIZER, model.specs, domain="protein"), model)
    pairs = [tuple("".join(rng.choice(list(LETTERS), n)) for n in rng.integers(1, 40, 2)) for _ in range(20)]
    pairs += [pairs[0], pairs[1][::-1], (pairs[2][0], pairs[3][1])]
    rows = "".join(f"r{row},{source},{target}\n" for row, (source, target) in enumerate(pairs))
    (tmp_path / "in.csv").write_text(f"id,{','.join(names)}\n{rows}")
    columns = [f"--column={side}={name}" for side, name in zip(("source", "target"), names) if side != name]
    command = ["score", str(tmp_path / "model"), str(tmp_path / "in.csv"), *columns]
    for closing in (False, True):
        output = tmp_path / f"{closing}.csv"
        assert main([*command, "--output", str(output), *(["--closing"] * closing)]) == 0
        table = pa.csv.read_csv(output)
        for (source, target), length, scored, got in zip(
            pairs, *(table[name].to_pylist() for name in ("length", "num_scored", "log_likelihood")), strict=True
        ):
            source_ids, target_ids = (TOKENIZER.encode(one).ids.tolist() for one in (source, target))
            start_id = TOKENIZER.pad_id or 0
            wanted = by_brute_force(
                "encoder-decoder", model, TOKENIZER, target_ids, source_ids, closing=closing, start_id=start_id
            )
            assert (length, scored) == (len(target), len(wanted))
            assert got == pytest.approx(sum(wanted), rel=1e-5)  # fp32
    given = [{"source": source, "target": target} for source, target in pairs]
    again = meristem.load(tmp_path / "model", device="cpu").score(given)
    closed = pa.csv.read_csv(tmp_path / "False.csv")["log_likelihood"].to_pylist()
    assert [row["log_likelihood"] for row in again] == closed, "from Python as well"
    (tmp_path / "one.fa").write_text(">a\nMKT\n")
    assert main(["score", str(tmp_path / "model"), str(tmp_path / "one.fa"), "--output", str(tmp_path / "o.csv")]) == 2
    assert main([*command[:3], "--column", "german", "--output", str(tmp_path / "o.csv")]) == 2
    long = f"id,source,target\na,MKT,{'M' * 59}\n"
    (tmp_path / "in.csv").write_text(long)
    assert main([*command[:3], "--output", str(tmp_path / "o.csv")]) == 2
    assert not (tmp_path / "o.csv").exists()
