"""Counters of Lightning's loops, as a checkpoint keeps them."""

from typing import Any


def place_loops(loops: dict[str, Any], step: int, accumulate: int) -> None:
    """Set the counters of Lightning's fit loop to "step whole steps done, validation after them done too".

    A checkpoint may be written in a hook, when some counters are ahead of others; Lightning then guesses
    where to go on. All of them follow from the step.
    """
    packs = step * accumulate

    def set_all(progress: dict[str, Any], value: int) -> None:
        for part in ("total", "current"):
            for key in progress[part]:
                progress[part][key] = value

    set_all(loops["epoch_loop.batch_progress"], packs)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    set_all(loops["epoch_loop.scheduler_progress"], step)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    set_all(optimizer["step"], step)
    set_all(optimizer["zero_grad"], step)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    for part in ("total", "current"):
        loops["epoch_progress"][part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        for key in loops["epoch_loop.val_loop.batch_progress"][part]:
            loops["epoch_loop.val_loop.batch_progress"][part][key] = 0
