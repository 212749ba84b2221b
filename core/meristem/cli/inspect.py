"""`meristem inspect MODEL|CONFIG`: what a model is, or what a config would make."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem.cli.jobs import describe_engine
from meristem.progress import duration

if TYPE_CHECKING:
    from meristem.model.config import TransformerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL|CONFIG",
        help="a run directory, a model directory, one of another library, or a config of `meristem fit`",
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, for FLOPs a token (512)")
    parser.add_argument(
        "--throughput",
        action="store_true",
        help="measure how fast this machine embeds with the model (some seconds to a minute)",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="with --throughput: files, to say how long embedding them will take and what the output will weigh",
    )
    parser.add_argument("--pool", help="with --input: as in `meristem embed`")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="as in `meristem embed`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from meristem.errors import ConfigError

    if args.length < 1:
        raise ConfigError(f"--length must be 1 or more; got {args.length}")
    is_model = Path(args.model).is_dir()
    if args.input and not args.throughput:
        raise ConfigError("--input needs --throughput: how long it takes is measured")
    if args.throughput and not is_model:
        raise ConfigError(f"--throughput needs the directory of a model; got {args.model}")
    facts = _facts_of_model(args.model, args.length) if is_model else _facts_of_config(args)
    if args.throughput:
        facts["throughput"] = _throughput(args)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(facts)
    return 0


def _facts_of_model(path: str, length: int) -> dict[str, Any]:
    from meristem.model.plain import to_json
    from meristem.model_directory import hash_weights, load_any

    card, model = load_any(path)
    tokenizer = card.tokenizer
    return {
        "model": path,
        "domain": card.domain or None,
        **_facts_of_architecture(card.architecture, model, length),
        "heads": {name: to_json(spec) for name, spec in card.heads.items()},
        "vocabulary": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "size": len(tokenizer.vocab),
            "special_before": tokenizer.num_special[0],
            "special_behind": tokenizer.num_special[1],
            "symbols": list(tokenizer.vocab),
        },
        "hash": hash_weights(path),
        "facts": dict(card.facts),
    }


def _throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second on this machine, and what that makes of an input."""
    import torch

    from meristem.inference.embed import default_pool
    from meristem.inference.engine import Embedder, best_device, best_precision
    from meristem.inference.job import JobOptions
    from meristem.inference.throughput import measure_throughput, weigh
    from meristem.model_directory import load_any

    card, model = load_any(args.model)
    device = best_device()
    trunk = JobOptions(precision=args.precision).trunk(model, device)
    embedder = Embedder(trunk, args.pool or default_pool(card))
    measured = measure_throughput(embedder)
    facts: dict[str, Any] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "precision": best_precision(args.precision, device),
        "tokens_per_batch": embedder.trunk.tokens_per_batch,
        "tokens_per_second": {str(length): round(rate) for length, rate in measured.tokens_per_second.items()},
    }
    if args.input:
        facts["input"] = weigh(embedder, card, args.input, measured)
    return facts


def _facts_of_config(args: argparse.Namespace) -> dict[str, Any]:
    """What `meristem fit` would make of a config."""
    from meristem.cli.configs import find_config
    from meristem.cli.run_config import parse
    from meristem.model.config import TransformerConfig
    from meristem.model.heads import Symbols
    from meristem.model.init import without_weights
    from meristem.model.model import SYMBOLS, Model
    from meristem.model.plain import from_json
    from meristem.train.spec import values_of

    file = str(find_config(args.model))
    spec = parse(["--config", file])
    assert spec is not None, "no help is asked for"
    if spec.model.init_from:
        return {**_facts_of_model(spec.model.init_from, args.length), "config": file}
    architecture = from_json(TransformerConfig, values_of(spec)["model"]["architecture"])
    with without_weights():  # heads of labels are as large as the data says, and not counted
        built = Model(architecture, {SYMBOLS: Symbols()} if spec.model.objective.predicts_symbols else {})
    facts = _facts_of_architecture(architecture, built, args.length)
    return {"config": file, "domain": spec.data.domain, **facts}


def _facts_of_architecture(architecture: "TransformerConfig", model: Any, length: int) -> dict[str, Any]:
    from meristem.model.flops import flops_per_token, num_idle_parameters
    from meristem.model.plain import to_json

    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts[_part(name)] = parts.get(_part(name), 0) + parameter.numel()
    total = sum(parts.values())
    # of a model with experts, a token passes some of them alone
    active = {"active": total - num_idle_parameters(architecture)} if num_idle_parameters(architecture) else {}
    return {
        "architecture": to_json(architecture),
        "parameters": {"total": total, **active, **parts},
        "flops_per_token": {"length": length, "forward": flops_per_token(architecture, length)},
        "weights_bytes": {"fp32": 4 * total, "bf16": 2 * total},
        "max_tokens": architecture.max_length,
    }


def _part(name: str) -> str:
    """`trunk.blocks.3.attention.qkv.weight` is a part of all blocks' attention."""
    words = name.split(".")
    if words[0] == "heads":
        return f"head {words[1]}"
    if words[0] == "pool":
        return "pool"
    side = f"{words.pop(1)} " if words[1] in ("encoder", "decoder") else ""
    if words[1] != "blocks":
        return side + words[1]
    kind = "norms" if words[3].endswith("_norm") else "scales" if words[3].endswith("_scale") else words[3]
    return f"{side}blocks {kind}"


def _print_tables(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)

    def table(title: str, rows: dict[str, Any]) -> None:
        grid = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        grid.add_column()
        grid.add_column(justify="left", overflow="fold")
        for name, value in rows.items():
            grid.add_row(name, escape("none" if value is None else str(value)))
        console.print(grid)
        console.print()

    top = {name: facts[name] for name in ("model", "config", "domain", "hash") if facts.get(name)}
    table("model", {**top, "max tokens": facts["max_tokens"] or "no limit of positions"})
    table("architecture", _flat(facts["architecture"]))
    table("parameters", {name: f"{count:>14,}" for name, count in facts["parameters"].items()})
    flops, memory = facts["flops_per_token"], facts["weights_bytes"]
    table(
        "cost",
        {
            "FLOPs a token, forward": f"{flops['forward'] / 1e6:,.1f} million at {flops['length']} tokens a sequence",
            "memory of weights": f"{memory['fp32'] / 2**20:,.1f} MiB in fp32, {memory['bf16'] / 2**20:,.1f} in bf16",
        },
    )
    if "throughput" in facts:
        _print_throughput(table, facts["throughput"])
    if "vocabulary" not in facts:
        return
    vocabulary = facts["vocabulary"]
    table(
        "vocabulary",
        {
            "kind": f"{vocabulary['kind']} {vocabulary['fingerprint']}",
            "size": vocabulary["size"],
            "special rows": f"{vocabulary['special_before']} before, {vocabulary['special_behind']} behind",
            "symbols": " ".join(vocabulary["symbols"][:100]) + (" ..." if vocabulary["size"] > 100 else ""),
        },
    )
    heads = {name: str(head["kind"]) for name, head in facts["heads"].items()}
    for name, head in facts["heads"].items():
        if "task" in head:
            heads[name] += f": {head['task']}, one for each {head['level']}"
            heads[name] += f": {', '.join(head['classes'])}" if head["classes"] else ""
    table("heads", heads)
    if facts["facts"]:
        table("facts", facts["facts"])


def _print_throughput(table: Callable[[str, dict[str, Any]], None], measured: dict[str, Any]) -> None:
    chosen = (measured[name] for name in ("device", "threads", "precision", "tokens_per_batch"))
    rows = {"measured": describe_engine(*chosen)}
    for length, rate in measured["tokens_per_second"].items():
        rows[f"at {length} tokens a sequence"] = f"{rate:,} tokens/s, {rate / int(length):,.1f} sequences/s"
    table("throughput", rows)
    if found := measured.get("input"):
        table(
            "embedding the input",
            {
                "records": f"{found['records']:,}, {found['tokens']:,} tokens",
                "time": f"about {duration(found['seconds'])}",
                "output": f"about {found['bytes'] / 1e6:,.1f} MB, {found['vectors']:,} vectors of {found['width']}",
            },
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name, a part's kind beside its name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if "kind" in value:
                found[prefix + name] = value["kind"]
            found.update(_flat({k: v for k, v in value.items() if k != "kind"}, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
