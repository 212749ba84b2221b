"""The step of the optimiser: clipped as torch clips, and in one kernel only where nothing scales the gradient."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from meristem.train.optim import OptimizerConfig, build_optimizer
from meristem.train.task import Task

LIMITS = [None, 0.5, 1e6]


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model(torch.randn(4, 6)).square().sum().backward()
    model[2].bias.grad = None  # what took no part has no gradient
    return model


@pytest.mark.parametrize("limit", LIMITS)
def test_gradients_are_clipped_as_torch_clips_them(limit):
    own, other = _model(), _model()
    task = SimpleNamespace(grad_norm=None, step_lr=0.0)
    optimizer, _ = build_optimizer(own, OptimizerConfig(), 5)
    Task.configure_gradient_clipping(task, optimizer, limit)
    norm = nn.utils.clip_grad_norm_(other.parameters(), float("inf") if limit is None else limit)
    torch.testing.assert_close(task.grad_norm, norm)
    for a, b in zip(own.parameters(), other.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_one_kernel_takes_the_step_that_many_take():
    models = [_model(), _model()]
    for is_fused, model in zip((True, False), models):
        optimizer, _ = build_optimizer(model, OptimizerConfig(lr=0.1), 5, is_fused)
        for _ in range(3):
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "is_fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)])
def test_a_scaled_gradient_is_clipped_before_it_is_stepped_with(precision, is_fused):
    """A fused step divides by the scale within itself, so the norm before it would be that of scaled gradients."""
    trainer = SimpleNamespace(precision=precision, max_steps=5)
    task = SimpleNamespace(
        model=_model(), extra=nn.ModuleDict(), trainer=trainer, spec=SimpleNamespace(optimizer=OptimizerConfig())
    )
    assert Task.configure_optimizers(task)["optimizer"].defaults["fused"] is is_fused
