"""The loss over many classes is torch's, gradient and all, however its rows are cut."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from meristem.model.heads import cross_entropy
from meristem.model.heads.cross_entropy import linear_cross_entropy

M, D, C = 23, 8, 37


def _inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(M, D), torch.randn(C, D), torch.randn(C)
    return [tensor.to(dtype).requires_grad_() for tensor in (rows, weight, bias)]


def _wanted(smoothing: float, has_bias: bool, targets: torch.Tensor) -> list[torch.Tensor]:
    """Torch's loss and gradients, in fp64."""
    rows, weight, bias = _inputs(torch.float64)
    logits = F.linear(rows, weight, bias if has_bias else None)
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (loss * 0.3).backward()
    return [loss.detach(), rows.grad, weight.grad, *([bias.grad] if has_bias else [])]


def _found(smoothing: float, has_bias: bool, targets: torch.Tensor) -> list[torch.Tensor]:
    rows, weight, bias = _inputs()
    total = linear_cross_entropy(rows, weight, bias if has_bias else None, targets, smoothing)[0]
    (total * 0.3).backward()
    return [total.detach(), rows.grad, weight.grad, *([bias.grad] if has_bias else [])]


def _differ(smoothing: float = 0.1, has_bias: bool = True) -> float:
    """The largest difference from torch, relative to the largest value of each tensor."""
    targets = torch.randint(0, C, (M,), generator=torch.Generator().manual_seed(1))
    pairs = zip(_found(smoothing, has_bias, targets), _wanted(smoothing, has_bias, targets), strict=True)
    return max(float((own.double() - other).abs().max() / other.abs().max()) for own, other in pairs)


@pytest.mark.parametrize("cached", [2**19, C * 4], ids=["one part", "parts of 4 rows"])
@pytest.mark.parametrize("held", [2**26, C * 10], ids=["all rows at once", "10 rows at once"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_torch(smoothing, has_bias, held, cached, monkeypatch):
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cpu", held)
    monkeypatch.setattr(cross_entropy, "CACHED_LOGITS", cached)
    assert _differ(smoothing, has_bias) < 1e-6  # rounding of fp32


def test_a_gradient_of_the_last_rows_alone_is_caught(monkeypatch):
    """Mutant: what earlier rows add to the weight's gradient is lost."""
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cpu", C * 10)
    monkeypatch.setattr(cross_entropy, "_added", lambda total, more: more)
    assert _differ() > 1e-2


def test_hits_are_those_of_the_likeliest_class_and_nats_are_not_smoothed():
    rows, weight, bias = (tensor.detach() for tensor in _inputs())
    logits = F.linear(rows, weight, bias)
    targets = torch.where(torch.arange(M) % 2 == 0, logits.argmax(1), logits.argmin(1))
    _, nats, is_hit = linear_cross_entropy(rows, weight, bias, targets, 0.1)
    assert is_hit.tolist() == [row % 2 == 0 for row in range(M)]
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="none"))


def test_a_model_that_says_the_same_of_all_classes_has_no_perfect_score():
    _, _, is_hit = linear_cross_entropy(torch.zeros(M, D), torch.zeros(C, D), None, torch.arange(M))
    assert is_hit.sum() == 1


def test_no_row_gives_no_loss_and_a_gradient_of_zero():
    rows, weight, bias = _inputs()
    total, _, _ = linear_cross_entropy(rows[:0], weight, bias, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_under_autocast_products_are_rounded_and_the_loss_is_not():
    targets = torch.arange(M)
    rows, weight, bias = _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        total, _, _ = linear_cross_entropy(rows, weight, bias, targets)
        logits = F.linear(rows, weight, bias)
    total.backward()
    assert total.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(total, F.cross_entropy(logits.float(), targets, reduction="sum"))


def test_a_second_backward_pass_is_refused():
    """The gradient is scaled where it lies: a second pass would scale it twice."""
    rows, weight, bias = _inputs()
    total, _, _ = linear_cross_entropy(rows, weight, bias, torch.arange(M))
    (total * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total * 2).backward()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["", "spare classes counted"])
def test_the_kernel_gives_what_torch_does(mutant):
    """Run by Triton's interpreter, which must be asked for before Triton is imported."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("kernel_in_interpreter.py")
    run = subprocess.run(
        [sys.executable, script, mutant],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ("AssertionError" in run.stderr) == bool(mutant), run.stderr
    assert (run.returncode == 0) != bool(mutant), run.stderr


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(kind):
    """The interpreter takes more of Python than Triton does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from meristem.model.heads.cross_entropy_kernel import BLOCK, _differentiate_row

    pointers = {"logits": kind, "wanted": "*i64", "losses": "*fp32", "nats": "*fp32", "hits": "*i1"}
    numbers = {"width": "i32", "num_classes": "i32", "smoothing": "fp32", "block": "constexpr"}
    source = ASTSource(fn=_differentiate_row, signature=pointers | numbers, constexprs={"block": BLOCK})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    assert ".entry _differentiate_row" in made.asm["ptx"]


def test_spare_classes_have_no_part_without_the_kernel():
    torch.manual_seed(2)
    logits, wanted = torch.randn(M, C), torch.randint(0, C, (M,))
    spare = torch.cat([logits, torch.full((M, 27), 50.0)], 1)
    own = cross_entropy._differentiate(logits.clone(), wanted, C, 0.1, is_trained=True)
    other = cross_entropy._differentiate(spare, wanted, C, 0.1, is_trained=True)
    assert all(torch.equal(one, two) for one, two in zip(own[:3], other[:3], strict=True))
    assert torch.equal(other[3], F.pad(own[3], (0, 27)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_classes", [37, 50_257])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_on_a_gpu_loss_and_gradients_are_those_of_torch(smoothing, num_classes, monkeypatch):
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cuda", num_classes * 100)
    rows, weight, bias = (
        torch.randn(*shape, device="cuda") for shape in ((250, 64), (num_classes, 64), (num_classes,))
    )
    targets = torch.randint(0, num_classes, (250,), device="cuda")
    own = [tensor.clone().requires_grad_() for tensor in (rows, weight, bias)]
    with torch.autocast("cuda", torch.bfloat16):
        total, _, _ = linear_cross_entropy(*own, targets, smoothing)
    total.backward()
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in (rows, weight, bias)]
    loss = F.cross_entropy(F.linear(*exact), targets, reduction="sum", label_smoothing=smoothing)
    loss.backward()
    torch.testing.assert_close(total.double(), loss, atol=0, rtol=3e-3)
    for one, two in zip(own, exact, strict=True):
        # logits and their gradient keep 8 bits
        assert (one.grad.double() - two.grad).norm() < 2e-2 * two.grad.norm()
