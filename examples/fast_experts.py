"""A fast forward and backward pass for the experts of a stock transformers MoE model on a CPU.

Tokens are sorted by expert, so that each expert's matrix products run once on one contiguous slice;
no token is dropped and nothing is padded. `use_fast_experts` plugs this in through transformers'
own registry of experts implementations; the model's weights and their names stay as they are.

Letters in shapes: T tokens, K experts per token, N = T * K token-expert pairs sorted by expert,
E experts, H hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "sorted"


def swiglu(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, times the gate weight of the pair: [N, 2I], [N, 1] -> [N, I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate) * up * weights).to(gate_up.dtype)


def swiglu_backward(
    gate_up: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu`: [N, 2I], [N, 1], [N, I] -> [N, 2I], [N, 1]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    grad = grad.float()
    grad_weights = (grad * activated * up).sum(-1, keepdim=True)
    grad = grad * weights
    grad_gate = grad * up * (sigmoid + activated * (1 - sigmoid))
    return torch.cat((grad_gate, grad * activated), dim=-1).to(gate_up.dtype), grad_weights


class SortedExperts(torch.autograd.Function):
    """The sum of each token's experts' outputs, weighted by their gate weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H], [T, K] expert ids, [T, K], [E, 2I, H], [E, H, I] -> [T, H]."""
        num_tokens, k = index.shape
        order = torch.argsort(index.reshape(-1), stable=True)
        counts = torch.bincount(index.reshape(-1), minlength=len(gate_up_proj)).tolist()
        token = order // k
        sorted_weights = weights.reshape(-1, 1).index_select(0, order).float()
        x = hidden.index_select(0, token)
        gate_up = x.new_empty(len(token), gate_up_proj.shape[1])
        for e, (rows, out) in enumerate(zip(x.split(counts), gate_up.split(counts), strict=True)):
            torch.mm(rows, gate_up_proj[e].t(), out=out)
        activated = swiglu(gate_up, sorted_weights)
        pair_out = torch.empty_like(x)
        for e, (rows, out) in enumerate(
            zip(activated.split(counts), pair_out.split(counts), strict=True)
        ):
            torch.mm(rows, down_proj[e].t(), out=out)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        ctx.save_for_backward(
            x, gate_up, activated, sorted_weights, token, inverse, gate_up_proj, down_proj
        )
        ctx.counts = counts
        ctx.weights_dtype = weights.dtype
        return pair_out.index_select(0, inverse).view(num_tokens, k, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Gradients of everything that went in, but the expert ids."""
        x, gate_up, activated, sorted_weights, token, inverse, gate_up_proj, down_proj = (
            ctx.saved_tensors
        )
        counts, num_tokens = ctx.counts, len(grad)
        pair_grad = grad.to(x.dtype).index_select(0, token)
        grad_activated = torch.empty_like(activated)
        grad_down = torch.empty_like(down_proj)
        slices = zip(pair_grad.split(counts), activated.split(counts), strict=True)
        for e, (g, a) in enumerate(slices):
            torch.mm(g.t(), a, out=grad_down[e])
        for e, (g, out) in enumerate(
            zip(pair_grad.split(counts), grad_activated.split(counts), strict=True)
        ):
            torch.mm(g, down_proj[e], out=out)
        # `activated` already holds the gate weights, so this is the gradient before them.
        grad_gate_up, grad_weights = swiglu_backward(gate_up, sorted_weights, grad_activated)
        grad_x = torch.empty_like(x)
        grad_gate_up_proj = torch.empty_like(gate_up_proj)
        for e, (g, rows, out) in enumerate(
            zip(grad_gate_up.split(counts), x.split(counts), grad_x.split(counts), strict=True)
        ):
            torch.mm(g.t(), rows, out=grad_gate_up_proj[e])
            torch.mm(g, gate_up_proj[e], out=out)
        grad_hidden = grad_x.index_select(0, inverse).view(num_tokens, -1, x.shape[1]).sum(1)
        grad_weights = grad_weights.index_select(0, inverse).view(num_tokens, -1)
        return (
            grad_hidden,
            None,
            grad_weights.to(ctx.weights_dtype),
            grad_gate_up_proj,
            grad_down,
        )


def sorted_experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What replaces the forward of a stock experts module; same arguments, same result."""
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return SortedExperts.apply(
        hidden_states.to(dtype),
        top_k_index,
        top_k_weights,
        self.gate_up_proj.to(dtype),
        self.down_proj.to(dtype),
    )


def use_fast_experts(model: PreTrainedModel) -> None:
    """Make the model run its experts through this module."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sorted_experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)


def use_stock_experts(model: PreTrainedModel) -> None:
    """Make the model run its experts through transformers' own code again."""
    model.set_experts_implementation("eager")
