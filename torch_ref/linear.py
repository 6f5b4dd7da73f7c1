"""The router's linear layer as serving engines have it, and the float64 oracle of what it should return."""

from __future__ import annotations

import math

import torch


class ReplicatedLinear(torch.nn.Module):
    """A linear layer that every device holds whole: `output = x @ weight.T + bias`.

    Args:
      hidden: columns of x and of the weight.
      experts: rows of the weight, columns of the output.
      bias: whether there is a bias [experts].
      skip_bias_add: leave the bias out of the output and return it, for whoever adds it later.
      params_dtype: of weight and bias; None means `torch.get_default_dtype()`. x is cast to it, so float32 parameters
        give float32 logits from 16-bit activations.
      device: of the parameters.
    """

    def __init__(
        self,
        hidden: int,
        experts: int,
        *,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hidden < 1 or experts < 1:
            raise ValueError(f"ReplicatedLinear has hidden={hidden}, experts={experts}. Expected at least 1; fix them.")
        dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.skip_bias_add = skip_bias_add
        self.weight = torch.nn.Parameter(torch.empty(experts, hidden, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.empty(experts, dtype=dtype, device=device)) if bias else None
        bound = 1 / math.sqrt(hidden)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_tensors(
        cls, weight: torch.Tensor, bias: torch.Tensor | None = None, *, skip_bias_add: bool = False
    ) -> ReplicatedLinear:
        """A layer with these parameters; the bias is cast to the dtype of the weight."""
        experts, hidden = weight.shape
        layer = cls(
            hidden,
            experts,
            bias=bias is not None,
            skip_bias_add=skip_bias_add,
            params_dtype=weight.dtype,
            device=weight.device,
        )
        layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.nn.Parameter | None]:
        """`(output [..., experts], the bias if it was skipped, else None)` of x `[..., hidden]`."""
        added, skipped = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, added), skipped


def router_gemm_float64(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The oracle: `x [..., hidden] @ weight [experts, hidden].T + bias [experts]` in float64, on x's device.

    Products of inputs of at most 24 bits are exact in float64; their sum errs by at most `hidden * 2^-53` of the sum
    of their magnitudes: 2^29 times less than in float32.

    >>> router_gemm_float64(torch.ones(1, 8), torch.ones(2, 8), torch.tensor([0.0, 1.0]))
    tensor([[8., 9.]], dtype=torch.float64)
    """
    logits = x.double() @ weight.double().mT
    return logits if bias is None else logits + bias.double()
