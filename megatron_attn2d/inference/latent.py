"""Multi-latent attention: what is kept of a token is its latent vector and its rotated key, for all heads together.

Keys and values of a head are linear in the latent vector c: k = [U c, p] with the rotated part p, and v = W c. A new
token's query is multiplied by U once, q' = [U^T q, q_p], and attends to [c, p] as to one key head; W is applied to what
it finds. Where many queries of a prompt attend, the keys of all heads are made from the latent vectors again.

Legend: h heads of this tensor-parallel rank, r width of c, e of the part of a key without position, p of the rotated
part, dv of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Latent:
    """The latent vectors of one layer.

    Attributes:
        width: r + p, numbers kept of a token.
        rank: r.
    """

    def __init__(self, attention: Any) -> None:
        """Watches Megatron's `MLASelfAttention` for the latent vectors of each pass."""
        config, self._up = attention.config, attention.linear_kv_up_proj
        self.rank = config.kv_lora_rank
        self.width = self.rank + config.qk_pos_emb_head_dim
        self._key_width, self._value_width = config.qk_head_dim, config.v_head_dim
        self._latest: Tensor | None = None
        self._up.register_forward_pre_hook(self._watch)

    def _watch(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._latest = _normalised(module, inputs[0]).flatten(0, -2)

    def kept(self, key: Tensor) -> Tensor:
        """What is kept of the pass whose keys are `key` [t, h, e + p]: [t, 1, r + p]."""
        assert self._latest is not None
        rotated = key[:, 0, self._key_width :]  # the same for all heads
        return torch.cat((self._latest.to(key.dtype), rotated), -1).unsqueeze(1)

    def expanded(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, h, e + p] and values [n, h, dv] of [n, 1, r + p]."""
        latent, rotated = kept[:, 0].split([self.rank, self.width - self.rank], -1)
        up_key, up_value = self._weights()
        keys = torch.einsum("nr,her->nhe", latent, up_key)
        values = torch.einsum("nr,hdr->nhd", latent, up_value)
        return torch.cat((keys, rotated.unsqueeze(1).expand(-1, keys.size(1), -1)), -1), values

    def absorbed(self, query: Tensor) -> Tensor:
        """Queries [b, h, e + p] as they attend to what is kept: [b, h, r + p]."""
        plain, rotated = query.split([self._key_width, self.width - self.rank], -1)
        return torch.cat((torch.einsum("bhe,her->bhr", plain, self._weights()[0]), rotated), -1)

    def output(self, found: Tensor) -> Tensor:
        """Values [b, h, dv] of latent vectors [b, h, r] that attention has summed."""
        weight = self._weights()[1]
        return torch.einsum("bhr,hdr->bhd", found.to(weight.dtype), weight)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """[h, e, r] and [h, dv, r]."""
        widths = self._key_width, self._value_width
        by_head: Tensor = self._up.weight.unflatten(0, (-1, sum(widths)))
        up_key, up_value = by_head.split(widths, 1)
        return up_key, up_value


def _normalised(module: Any, x: Tensor) -> Tensor:
    """The input of `module` as its linear layer gets it: Transformer Engine's may have the norm in the same module."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    wide = x.float()
    scale = weight.float() + (1.0 if getattr(module, "zero_centered_gamma", False) else 0.0)
    if module.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(wide, weight.shape, scale, module.eps).to(x.dtype)
    bias = module.layer_norm_bias.float()
    return torch.nn.functional.layer_norm(wide, weight.shape, scale, bias, module.eps).to(x.dtype)
