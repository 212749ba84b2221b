"""The kernel of the cross-entropy beside torch's own; `test_cross_entropy` runs this in a process of its own."""

import itertools
import sys

import torch
from torch.nn import functional as F

from meristem.model.heads import cross_entropy_kernel as kernel

M, C = 23, 37


def main(mutant: str) -> None:
    for block, num_spare, smoothing in itertools.product((8192, 16), (0, 27), (0.0, 0.1)):
        kernel.BLOCK = block
        torch.manual_seed(2)
        logits, wanted = torch.randn(M, C), torch.randint(0, C, (M,))
        wanted[0] = logits[0].argmax()
        made = torch.cat([logits, torch.full((M, num_spare), 50.0)], 1)
        num_classes = made.shape[1] if mutant == "spare classes counted" else C
        losses, nats, is_hit = kernel.differentiate_rows(made, wanted, num_classes, smoothing)
        logits.requires_grad_()
        exact = F.cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing)
        exact.sum().backward()
        plain = F.cross_entropy(logits, wanted, reduction="none")
        torch.testing.assert_close(losses, exact.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(nats, plain.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(made[:, :C], logits.grad, atol=1e-6, rtol=1e-5)
        assert torch.equal(is_hit, logits.argmax(1) == wanted)
        assert not made[:, C:].any()


if __name__ == "__main__":
    main(sys.argv[1])
