"""A fast forward and backward pass for the experts of a stock transformers MoE model on a CPU.

The token-expert pairs are sorted by expert and laid out in blocks of `BLOCK` rows, each block
belonging to one expert; an expert's last block is filled up with zeros. No token is dropped, and
every matrix product has the same shape in every step, as fast CPU kernels want it.
`use_fast_experts` plugs this in through transformers' own registry of experts implementations; the
model's weights and their names stay as they are.

Letters in shapes: T tokens, K experts per token, E experts, B blocks, M = BLOCK rows of a block,
H hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BLOCK = 128
IMPLEMENTATION = "blocked"


def assign_rows(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token-expert pair goes in the blocks, and which expert each block belongs to.

    `index` [T, K] holds expert ids; returns row numbers in [0, B * M) [T * K], and experts [B],
    where B depends on T, K and E only.
    """
    pairs = index.reshape(-1)
    counts = (
        torch.zeros_like(pairs[:1])
        .repeat(num_experts)
        .scatter_add_(0, pairs, torch.ones_like(pairs))
    )
    blocks = (counts + BLOCK - 1) // BLOCK
    last_block = blocks.cumsum(0)
    first_row = (last_block - blocks) * BLOCK
    order = torch.argsort(pairs, stable=True)
    rank = torch.arange(len(pairs)) - (counts.cumsum(0) - counts)[pairs[order]]
    row = torch.empty_like(pairs)
    row[order] = first_row[pairs[order]] + rank
    num_blocks = len(pairs) // BLOCK + num_experts
    expert = torch.searchsorted(last_block, torch.arange(num_blocks), right=True)
    return row, expert.clamp_(max=num_experts - 1)  # blocks beyond the last are all zeros


def swiglu(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, times the gate weight of the row: [B, M, 2I], [B, M, 1] -> [B, M, I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate) * up * weights).to(gate_up.dtype)


def swiglu_backward(
    gate_up: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu`: [B, M, 2I], [B, M, 1], [B, M, I] -> [B, M, 2I], [B, M, 1]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    grad = grad.float()
    grad_weights = (grad * activated * up).sum(-1, keepdim=True)
    grad = grad * weights
    grad_gate = grad * up * (sigmoid + activated * (1 - sigmoid))
    return torch.cat((grad_gate, grad * activated), dim=-1).to(gate_up.dtype), grad_weights


class BlockedExperts(torch.autograd.Function):
    """The sum of each token's experts' outputs, weighted by their gate weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H], [T, K] expert ids, [T, K], [E, 2I, H], [E, H, I] -> [T, H]."""
        (num_tokens, k), hidden_size = index.shape, hidden.shape[1]
        row, expert = assign_rows(index, len(gate_up_proj))
        num_rows = len(expert) * BLOCK
        token = torch.full((num_rows,), num_tokens)  # rows without a pair read a row of zeros
        token[row] = torch.arange(num_tokens).repeat_interleave(k)
        row_weights = torch.zeros(num_rows)
        row_weights[row] = weights.reshape(-1).float()
        row_weights = row_weights.view(-1, BLOCK, 1)

        x = append_zeros(hidden).index_select(0, token).view(-1, BLOCK, hidden_size)
        gate_up = torch.bmm(x, gate_up_proj[expert].transpose(1, 2))
        activated = swiglu(gate_up, row_weights)
        out = torch.bmm(activated, down_proj[expert].transpose(1, 2)).view(-1, hidden_size)
        ctx.save_for_backward(
            x, gate_up, activated, row_weights, token, row, expert, gate_up_proj, down_proj
        )
        ctx.weights_dtype = weights.dtype
        return out.index_select(0, row).view(num_tokens, k, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of everything that went in, but the expert ids."""
        x, gate_up, activated, row_weights, token, row, expert, gate_up_proj, down_proj = (
            ctx.saved_tensors
        )
        num_tokens, hidden_size = grad.shape
        pair_grad = append_zeros(grad.to(x.dtype)).index_select(0, token).view(x.shape)
        grad_down = sum_blocks(torch.bmm(pair_grad.transpose(1, 2), activated), expert, down_proj)
        # `activated` holds the gate weights already, so this gradient comes before them.
        grad_activated = torch.bmm(pair_grad, down_proj[expert])
        grad_gate_up, grad_weights = swiglu_backward(gate_up, row_weights, grad_activated)
        grad_gate_up_proj = sum_blocks(
            torch.bmm(grad_gate_up.transpose(1, 2), x), expert, gate_up_proj
        )
        grad_x = torch.bmm(grad_gate_up, gate_up_proj[expert]).view(-1, hidden_size)
        grad_hidden = grad_x.index_select(0, row).view(num_tokens, -1, hidden_size).sum(1)
        grad_weights = grad_weights.view(-1)[row].view(num_tokens, -1).to(ctx.weights_dtype)
        return grad_hidden, None, grad_weights, grad_gate_up_proj, grad_down


def append_zeros(rows: torch.Tensor) -> torch.Tensor:
    """[T, H] -> [T + 1, H], the last row zeros."""
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


def sum_blocks(blocks: torch.Tensor, expert: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum the blocks [B, ...] of each expert: [E, ...], in float32."""
    return torch.zeros_like(like, dtype=torch.float32).index_add_(0, expert, blocks.float())


def blocked_experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What replaces the forward of a stock experts module: same arguments, same result."""
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return BlockedExperts.apply(
            hidden_states.to(dtype),
            top_k_index,
            top_k_weights,
            self.gate_up_proj.to(dtype),
            self.down_proj.to(dtype),
        )


def use_fast_experts(model: PreTrainedModel) -> None:
    """Make the model run its experts through this module."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, blocked_experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)


def use_stock_experts(model: PreTrainedModel) -> None:
    """Make the model run its experts through transformers' own code again."""
    model.set_experts_implementation("eager")
