"""`meristem generate MODEL --prompt TEXT | --prompts FILE`: go on from prompts."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from meristem.generation.text import Sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """With what, from what, and how."""
    parser.add_argument("model", metavar="MODEL", help="a run directory, a model directory or one of another library")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="to go on from; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="a file with one prompt a line; - for standard input")
    parser.add_argument("--output", metavar="FILE", help="a .jsonl file of all samples; the terminal by default")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens made for each prompt at most (128)")
    parser.add_argument(
        "--temperature", type=float, help="1 draws as the model says, 0 takes the likeliest token (1; 0 with --beams)"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the smallest set of tokens whose probability reaches p")
    parser.add_argument("--min-p", type=float, help="draw from tokens at least p times as likely as the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: tokens that are there already get less likely"
    )
    parser.add_argument("--beams", type=int, default=1, help="beams of a beam search; 1 for none")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="scores of beams are divided by their length to this power"
    )
    parser.add_argument("--num-samples", "-n", type=int, default=1, help="texts for each prompt")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and prompt give the same text")
    parser.add_argument("--batch-size", type=int, default=32, help="texts made at once; changes nothing but the speed")


def run(args: argparse.Namespace) -> int:
    """Make the texts and show or write them."""
    from meristem.errors import ConfigError
    from meristem.generation.text import Generator, check_options
    from meristem.inference.engine import best_device
    from meristem.model_directory import load_any

    if bool(args.prompt) == bool(args.prompts):
        raise ConfigError("one of --prompt TEXT and --prompts FILE must be given")
    if args.output and not args.output.endswith(".jsonl"):
        raise ConfigError(f"--output must be a .jsonl file; got {args.output}")
    options = check_options(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature if args.temperature is not None else (1.0 if args.beams == 1 else 0.0),
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        num_beams=args.beams,
        length_penalty=args.length_penalty,
        num_samples=args.num_samples,
        stop=tuple(args.stop),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    prompts = args.prompt or list(_read_prompts(args.prompts))
    card, model = load_any(args.model, args.tokenizer)
    generator = Generator(model.to(best_device()).eval(), card.tokenizer)
    if args.output:
        _write(args.output, generator, prompts, options)
        return 0
    is_streaming = len(prompts) == options.num_samples == options.num_beams == 1 and sys.stdout.isatty()
    if is_streaming:
        print(prompts[0], end="", flush=True)
    for samples in generator.generate(prompts, options, _say if is_streaming else None):
        for sample in samples:
            print("" if is_streaming else f"{sample.prompt}{sample.text}", flush=True)
    return 0


def _say(prompt: int, number: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _read_prompts(name: str) -> Iterator[str]:
    """One prompt a line.

    Raises:
        DataError: no such file, no UTF-8, an empty line, or no line.
    """
    from meristem.errors import DataError

    def lines(stream: TextIO) -> Iterator[str]:
        number = 0
        for number, line in enumerate(stream, 1):
            prompt = line.rstrip("\r\n")
            if not prompt.strip():
                raise DataError(f"{name}:{number}: a prompt must not be empty")
            yield prompt
        if not number:
            raise DataError(f"{name}: must hold one prompt a line; it is empty")

    try:
        if name == "-":
            yield from lines(sys.stdin)
        else:
            with open(name, encoding="utf-8") as stream:
                yield from lines(stream)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "must be UTF-8 text"
        raise DataError(f"{name}: {reason}") from error


def _write(output: str, generator: Any, prompts: list[str], options: Any) -> None:
    """One JSON object a sample, in a file that is there when all are."""
    import json
    from pathlib import Path

    from meristem.files import replacing
    from meristem.progress import Progress

    tokens = count = 0
    with (
        replacing(Path(output)) as temporary,
        Progress(len(prompts), "prompts", title="generate") as bar,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for number, samples in enumerate(generator.generate(prompts, options)):
            for index, sample in enumerate(samples):
                file.write(json.dumps(_plain(number, index, sample), ensure_ascii=False) + "\n")
                tokens, count = tokens + len(sample.generated.ids), count + 1
            bar.advance(note=f"{tokens:,} tokens")
    print(f"{count:,} texts of {tokens:,} tokens for {len(prompts):,} prompts in {output}")


def _plain(number: int, index: int, sample: "Sample") -> dict[str, Any]:
    generated = sample.generated
    return {
        "prompt": sample.prompt,
        "prompt_number": number,
        "sample": index,
        "text": sample.text,
        "score": generated.score,
        "reason": generated.reason,
        "ids": list(generated.ids),
        "log_probabilities": list(generated.log_probabilities),
    }
