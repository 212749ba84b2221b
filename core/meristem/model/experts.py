"""Mixture of experts: several feed-forward layers, of which a router chooses some for each token.

Switch routing (Fedus 2021, arXiv 2101.03961, section 2.1) for one choice a token, and the same for several. Nothing
loops over tokens: pairs of token and choice are sorted by expert, and each expert is a product of matrices over
its share of the rows.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from meristem.model import exact
from meristem.model.config import Init, LayerParts
from meristem.model.feedforward import ACTIVATIONS, FeedForwardLayer, activate
from meristem.shapes import Bool, Float, Float32, Int, Tensor
from meristem.types import Layout, Routing

ALIGNED = 8
"""Widths of grouped products in bf16 are multiples of it (16 bytes)."""


class ExpertsLayer(nn.Module):
    """A router, experts, and shared experts that every token passes.

    The router works in fp32 whatever the precision of its input and weights. A token goes to the `top_k` experts of
    highest probability, the lower number first among equals, and what an expert gives is scaled by its probability.
    An expert takes `capacity` tokens of each sequence: first choices before second ones, earlier tokens before later
    ones (Lepikhin 2020, arXiv 2006.16668, algorithm 1). What is over is dropped and adds nothing: the residual
    carries the token. The spare rows of a pack count as a sequence of their own.

    Jitter disturbs the input of the router alone, as in the paper; deviation from `transformers`, which in fp32
    training disturbs what the experts read as well.
    """

    def __init__(self, parts: LayerParts):
        super().__init__()
        assert parts.experts is not None
        self.config, part = parts.experts, parts.feedforward
        self.activation, self.is_gated = ACTIVATIONS[part.activation], part.is_gated
        count, rows = self.config.count, part.width * (2 if part.is_gated else 1)
        self.router = nn.Linear(parts.width, count, bias=False)
        self.up = nn.Parameter(torch.empty(count, rows, parts.width))
        self.down = nn.Parameter(torch.empty(count, parts.width, part.width))
        self.up_bias = nn.Parameter(torch.empty(count, rows)) if part.in_bias else None
        self.down_bias = nn.Parameter(torch.empty(count, parts.width)) if part.out_bias else None
        self.dropout = nn.Dropout(part.dropout)
        self.shared: FeedForwardLayer | None = None
        if self.config.num_shared:
            # the sum of several layers is one layer with the hidden features of all
            self.shared = FeedForwardLayer(parts.width, replace(part, width=part.width * self.config.num_shared))

    def init_own_weights(self, config: Init) -> None:
        """Fill the weights of the experts as those of linear layers."""
        for weight in (self.up, self.down):
            nn.init.trunc_normal_(weight, std=config.std, a=-2 * config.std, b=2 * config.std)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Float[Tensor, "T D"], layout: Layout) -> tuple[Float[Tensor, "T D"], Routing]:
        """Return the weighted sum of the chosen experts, and the decisions of the router."""
        routing, shares_Tk = self._route(x, layout)
        # dropped pairs come behind those of the last expert
        expert_N = routing.chosen.masked_fill(~routing.is_taken, self.config.count).flatten()
        order_N = expert_N.argsort(stable=True)
        counts_X = (expert_N[:, None] == torch.arange(self.config.count, device=x.device)).sum(0)
        out_ND = self._run_grouped(x, order_N, counts_X) if self._can_group(x) else self._run(x, order_N, counts_X)
        out_TkD = out_ND.view(len(x), self.config.top_k, -1)
        shares_Tk = (shares_Tk * routing.is_taken).to(out_TkD.dtype)
        y_TD = out_TkD[:, 0] * shares_Tk[:, :1]
        for choice in range(1, self.config.top_k):
            y_TD = y_TD + out_TkD[:, choice] * shares_Tk[:, choice, None]
        return y_TD if self.shared is None else y_TD + self.shared(x), routing

    def _route(self, x: Float[Tensor, "T D"], layout: Layout) -> tuple[Routing, Float32[Tensor, "T k"]]:
        """What the router decides, and the share with which each choice counts."""
        with torch.autocast(x.device.type, enabled=False):
            seen_TD = x.float()
            if self.training and self.config.jitter:
                low, high = 1 - self.config.jitter, 1 + self.config.jitter
                seen_TD = seen_TD * torch.empty_like(seen_TD).uniform_(low, high)
            logits_TX = F.linear(seen_TD, self.router.weight.float())
            probabilities_TX = logits_TX.softmax(-1)
            # of equals, top-k takes any; a stable sort the first
            chosen_Tk = probabilities_TX.argsort(dim=-1, descending=True, stable=True)[:, : self.config.top_k]
            shares_Tk = probabilities_TX.gather(1, chosen_Tk)
            if self.config.is_normalised:
                shares_Tk = shares_Tk / shares_Tk.sum(-1, keepdim=True)
        return Routing(logits_TX, chosen_Tk, self._has_room(chosen_Tk, layout), layout), shares_Tk

    def _has_room(self, chosen_Tk: Int[Tensor, "T k"], layout: Layout) -> Bool[Tensor, "T k"]:
        """Whether fewer tokens of the same sequence than the capacity were sent to the expert before."""
        if self.config.capacity is None:
            return torch.ones_like(chosen_Tk, dtype=torch.bool)
        group_kT = layout.segment_of_row * self.config.count + chosen_Tk.t()
        sorted_N, order_N = group_kT.flatten().sort(stable=True)
        num_before_N = torch.arange(len(sorted_N), device=sorted_N.device) - torch.searchsorted(sorted_N, sorted_N)
        has_room_N = torch.empty_like(num_before_N, dtype=torch.bool)
        has_room_N[order_N] = num_before_N < self.config.capacity
        return has_room_N.view_as(group_kT).t()

    def _run(
        self, x: Float[Tensor, "T D"], order_N: Int[Tensor, "N"], counts_X: Int[Tensor, "X"]
    ) -> Float[Tensor, "N D"]:
        """One product an expert over its rows; the outputs stand in the order of pairs, zero for what is dropped.

        Args:
            order_N: pairs of token and choice, those of each expert together, in order of experts.
            counts_X: pairs of each expert.
        """
        counts = counts_X.tolist()
        taken_R = order_N[: sum(counts)]
        rows = x.index_select(0, taken_R // self.config.top_k).split(counts)
        # unbound once: the gradient of one expert's slice would be a tensor of all experts, and that for each
        ups, downs = self.up.unbind(), self.down.unbind()
        biases = (self.up_bias, self.down_bias)
        up_biases, down_biases = ([None] * len(counts) if one is None else one.unbind() for one in biases)
        outputs = []
        for expert, rows_nD in enumerate(rows):
            if len(rows_nD):
                hidden_nF = self._activate(exact.linear(rows_nD, ups[expert], up_biases[expert]))
                outputs.append(exact.linear(hidden_nF, downs[expert], down_biases[expert]))
        out_RD = torch.cat(outputs)
        return out_RD.new_zeros(len(order_N), out_RD.shape[1]).index_copy(0, taken_R, out_RD)

    def _can_group(self, x: Float[Tensor, "T D"]) -> bool:
        """Whether the device has a product of groups for this precision and these widths."""
        widths = (*self.up.shape[1:], self.down.shape[2])
        return x.is_cuda and _precision(x) == torch.bfloat16 and all(width % ALIGNED == 0 for width in widths)

    def _run_grouped(
        self, x: Float[Tensor, "T D"], order_N: Int[Tensor, "N"], counts_X: Int[Tensor, "X"]
    ) -> Float[Tensor, "N D"]:
        """As `_run`, as two products over all experts that wait for no count: the last expert reads what is dropped."""
        ends_X = counts_X.cumsum(0).to(torch.int32)
        ends_X[-1] = len(order_N)
        expert_N = torch.searchsorted(ends_X, torch.arange(len(order_N), device=x.device), right=True)
        precision = _precision(x)

        def grouped(rows_NI: Tensor, weight_XOI: Tensor, bias_XO: Tensor | None) -> Tensor:
            out_NO = F.grouped_mm(rows_NI.to(precision), weight_XOI.to(precision).transpose(1, 2), offs=ends_X)
            return out_NO if bias_XO is None else out_NO + bias_XO.to(precision).index_select(0, expert_N)

        rows_ND = x.index_select(0, order_N // self.config.top_k)
        hidden_NF = self._activate(grouped(rows_ND, self.up, self.up_bias))
        out_ND = grouped(hidden_NF, self.down, self.down_bias)
        return torch.empty_like(out_ND).index_copy(0, order_N, out_ND)

    def _activate(self, hidden_nF: Float[Tensor, "n F_up"]) -> Float[Tensor, "n F"]:
        return self.dropout(activate(hidden_nF, self.activation, self.is_gated))


def _precision(x: Tensor) -> torch.dtype:
    """What a product of matrices works in here."""
    is_autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
