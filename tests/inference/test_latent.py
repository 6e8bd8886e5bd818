"""Latent attention: what is kept of a token, against keys and values of all heads."""

from types import SimpleNamespace

import pytest
import torch

from megatron_attn2d.inference.latent import Latent

HEADS, RANK, PLAIN, ROTATED, VALUE = 3, 8, 6, 4, 5


def layer(up: torch.nn.Module) -> SimpleNamespace:
    """As far as it is looked at, Megatron's MLASelfAttention."""
    config = SimpleNamespace(kv_lora_rank=RANK, qk_pos_emb_head_dim=ROTATED, qk_head_dim=PLAIN, v_head_dim=VALUE)
    return SimpleNamespace(config=config, linear_kv_up_proj=up)


class Normalising(torch.nn.Linear):
    """A linear layer that normalises its input, as Transformer Engine's do."""

    eps = 1e-5

    def __init__(self, normalization: str, zero_centered: bool) -> None:
        super().__init__(RANK, HEADS * (PLAIN + VALUE), bias=False, dtype=torch.double)
        self.normalization, self.zero_centered_gamma = normalization, zero_centered
        self.layer_norm_weight = torch.nn.Parameter(torch.randn(RANK, dtype=torch.double))
        self.layer_norm_bias = torch.nn.Parameter(torch.randn(RANK, dtype=torch.double))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.layer_norm_weight + self.zero_centered_gamma
        if self.normalization == "RMSNorm":
            return super().forward(x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * scale)
        centred = x - x.mean(-1, keepdim=True)
        return super().forward(
            centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * scale + self.layer_norm_bias
        )


@pytest.mark.parametrize(
    "up",
    [
        torch.nn.Linear(RANK, HEADS * (PLAIN + VALUE), bias=False, dtype=torch.double),
        Normalising("RMSNorm", False),
        Normalising("RMSNorm", True),
        Normalising("LayerNorm", False),
    ],
    ids=["norm before", "RMSNorm within", "RMSNorm around zero", "LayerNorm within"],
)
@torch.no_grad()
def test_attention_to_latent_vectors_is_that_to_all_heads(up: torch.nn.Module) -> None:
    torch.manual_seed(0)
    latent = Latent(layer(up))
    plain, values = up(torch.randn(7, 1, RANK, dtype=torch.double)).view(7, HEADS, -1).split([PLAIN, VALUE], -1)
    rotated = torch.randn(7, 1, ROTATED, dtype=torch.double).expand(-1, HEADS, -1)
    keys = torch.cat((plain, rotated), -1)
    kept = latent.kept(keys)
    assert kept.shape == (7, 1, RANK + ROTATED)
    # norms are computed in fp32
    torch.testing.assert_close(latent.expanded(kept), (keys, values), rtol=1e-5, atol=1e-5)

    query = torch.randn(2, HEADS, PLAIN + ROTATED, dtype=torch.double)
    weights = torch.einsum("bhd,nhd->bhn", query, keys).softmax(-1)
    found = torch.einsum("bhd,nd->bhn", latent.absorbed(query), kept[:, 0]).softmax(-1)
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5)
    out = latent.output(torch.einsum("bhn,nr->bhr", found, kept[:, 0, :RANK]))
    torch.testing.assert_close(out, torch.einsum("bhn,nhd->bhd", weights, values), rtol=1e-5, atol=1e-5)
