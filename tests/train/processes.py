"""Commands that several processes run together, over gloo on the CPU.

As a script it is one of the processes: it runs the commands one after another and leaves how they ended as JSON.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 400
"""Far more than all commands take, on a machine that does other things too."""

GROUP_TIMEOUT_SECONDS = 100
"""After so long a process that waits for another gives up; it takes that long to draw a picture on a busy machine."""


@dataclass(frozen=True)
class Command:
    """Something that each process does.

    Attributes:
        name: of its result.
        arguments: of `meristem`; none for `check_ranks`.
        mutant: name of a change that is made before it and undone behind it.
        seconds: after which a process that waits for another gives up.
    """

    name: str
    arguments: Sequence[str] = ()
    mutant: str = ""
    seconds: float = GROUP_TIMEOUT_SECONDS


class Together:
    """Processes that have been started.

    Args:
        path: folder that they run in.
        count: of processes.
    """

    def __init__(self, path: Path, commands: Sequence[Command], count: int = 2):
        self.path, self.count = path, count
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "WORLD_SIZE": str(count)}
        env |= {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "MERISTEM_CACHE": str(path / "cache"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        given = json.dumps([asdict(command) for command in commands])
        stores = tempfile.mkdtemp(dir=path)
        self.processes = []
        for rank in range(count):
            with (path / f"stderr-{rank}.txt").open("w") as errors:
                started = subprocess.Popen(
                    [sys.executable, __file__, given, stores],
                    cwd=path,
                    env={**env, "LOCAL_RANK": str(rank), "RANK": str(rank)},
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            self.processes.append(started)

    def results(self, timeout: float = TIMEOUT_SECONDS) -> list[dict[str, Any]]:
        """How the commands ended, by process; nothing of those that were never reached."""
        until = time.monotonic() + timeout
        try:
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        found = [self.path / f"results-{rank}.json" for rank in range(self.count)]
        return [json.loads(out.read_text()) if out.exists() else {} for out in found]

    def said(self) -> str:
        """The last that each process wrote on stderr."""
        return "\n".join((self.path / f"stderr-{rank}.txt").read_text()[-3000:] for rank in range(self.count))


def run_command(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a command of `meristem` here; how it ended, and the confusions that it drew."""
    from meristem.cli.main import main
    from meristem.figures import predictions

    out, confusions, draw = io.StringIO(), [], predictions.draw_confusion
    predictions.draw_confusion = lambda path, counts, names: confusions.extend(one.tolist() for one in counts.values())
    try:
        with contextlib.redirect_stdout(out):
            code = main([*arguments])
    finally:
        predictions.draw_confusion = draw
    return {"code": code, "out": out.getvalue(), "confusions": confusions}


def check_ranks() -> dict[str, Any]:
    """Everything that processes say to each other."""
    import torch
    from torch import distributed

    from meristem.train.ranks import Ranks

    rank, count = distributed.get_rank(), distributed.get_world_size()
    ranks = Ranks(rank, count)
    values = torch.arange(3.0) + rank
    return {
        "first": ranks.is_first,
        "sum": ranks.sum(values).tolist(),
        "own": values.tolist(),
        "gather": [one.tolist() for one in ranks.gather(torch.full((rank, 2), float(rank)))],
        "scalars": [float(one) for one in ranks.gather(torch.tensor(float(rank)))],
        "whole": [int(one) for one in ranks.gather(torch.tensor([rank] * (2 - rank)))[1]],
        "any": ranks.any([rank == 1, False, True]),
        "first_says": [ranks.first_says(rank == 0), ranks.first_says(rank == 1)],
        "sharded": check_sharded(count),
    }


def check_sharded(count: int) -> dict[str, bool]:
    """A model under FSDP2, each block for itself: 33 symbols, 5 classes and 7 values do not come out even."""
    import copy
    import warnings
    from dataclasses import replace

    import numpy as np
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from meristem.data.pack import pack
    from meristem.model.config import Attention, Embedding, Experts, FeedForward, TokenHead, TransformerConfig
    from meristem.model.heads import Readout, Symbols
    from meristem.model.model import SYMBOLS, Model
    from meristem.model.outputs import Wanted
    from meristem.train.ranks import full_state
    from meristem.types import Tokens

    torch.manual_seed(7)
    parts = {"embedding": Embedding(vocab_size=33), "attention": Attention(num_heads=3)}
    config = TransformerConfig(width=24, num_layers=2, feedforward=FeedForward(width=17), head=TokenHead(), **parts)
    classes = Readout(name="place", classes=tuple("abcde"), is_standardised=True)
    values = Readout(name="score", task="regression", mean=(0.0,) * 7, std=(1.0,) * 7)
    whole = Model(config, {SYMBOLS: Symbols(), "place": classes, "score": values}).eval()
    model = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (count,))
    for part in (*model.trunk.blocks, model):
        fully_shard(part, mesh=mesh)
    own_numbers = sum(one.to_local().numel() for one in model.parameters())
    tokens = [Tokens(positions=np.arange(n)[:, None], ids=np.arange(n) % 33) for n in (5, 11, 40)]
    batch, wanted = pack(tokens, range(3)), Wanted(tuple(whole.specs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of views, which nobody changes here
        outputs = model(batch, wanted).heads
        half = Model(replace(config, experts=Experts(count=3))).eval()
        for part in (*half.trunk.blocks, half):
            fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        left = half(batch, Wanted(attentions=(1,))).hidden
    state, wanted_state = full_state(model), whole.state_dict()
    return {
        "holds a share": own_numbers < 0.6 * sum(one.numel() for one in whole.parameters()),
        "same outputs": all(torch.equal(outputs[name], one) for name, one in whole(batch, wanted).heads.items()),
        "same state": list(state) == list(wanted_state)
        and all(torch.equal(one, wanted_state[name]) for name, one in state.items()),
        "what layers leave": list(left.routing) == [0, 1] and [len(maps) for maps in left.attentions.values()] == [3],
        "plain tensors": all(type(one) is torch.Tensor and one.is_cpu for one in state.values()),
    }


def _count_repeats(patch: Any) -> None:
    from meristem.data import loader

    patch.setattr(loader, "replace", lambda batch, **changes: batch)


def _limit_each(patch: Any) -> None:
    """As Lightning has it: twice as many packs for two processes."""
    from meristem.data import loader

    first_packs = loader._first_packs
    patch.setattr(loader, "_first_packs", lambda plan, limit: first_packs(plan, limit * 2))


def _own_statistics(patch: Any) -> None:
    """Running figures of a standardised head move by the packs of the process alone."""
    from meristem.model.heads.labels import Standardise

    take_in = Standardise.take_in
    patch.setattr(Standardise, "take_in", lambda self, gather: take_in(self, lambda rows: [rows]))


def _own_metrics(patch: Any) -> None:
    """Metrics are computed by those that have figures."""
    from meristem.train.ranks import Ranks

    patch.setattr(Ranks, "any", lambda self, facts: list(facts))


def _no_repeats(patch: Any) -> None:
    """Packs as they come out, so that some processes run fewer."""
    from meristem.data.loader import EvalLoader

    patch.setattr(EvalLoader, "__len__", lambda self: len(range(self.rank, len(self.plan), self.world_size)))


def _seed_by_rank(patch: Any) -> None:
    import torch

    from meristem.train.task import Task, fold

    def reseed(self: Task, micro: int) -> None:
        torch.manual_seed(fold(self.seed, "step", self.trainer.global_step, micro, self.ranks.number))

    patch.setattr(Task, "_reseed", reseed)


MUTANTS: dict[str, Callable[[Any], None]] = {
    "repeats are counted": _count_repeats,
    "a limit for each process": _limit_each,
    "figures of its own packs": _own_statistics,
    "seed by rank": _seed_by_rank,
    "metrics of its own": _own_metrics,
    "packs that do not come out even": _no_repeats,
}


def main(commands: str, stores: str) -> None:
    import pytest
    from torch import distributed

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results: dict[str, Any] = {}
    for number, values in enumerate(json.loads(commands)):
        command = Command(**values)
        # a group for each: one that timed out is of no use any more
        store = distributed.FileStore(f"{stores}/{number}", count)
        limit = timedelta(seconds=command.seconds)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
        with pytest.MonkeyPatch.context() as patch:
            if command.mutant:
                MUTANTS[command.mutant](patch)
            results[command.name] = run_command(command.arguments) if command.arguments else check_ranks()
        Path(f"results-{rank}.json").write_text(json.dumps(results))  # what hangs later on does not take it away
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
