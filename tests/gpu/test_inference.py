"""Generation on GPUs, in CUDA graphs and without, against the whole sequence recomputed; the decode kernel compiled.

pytest -m gpu tests/gpu/test_inference.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_attn2d.inference import configuration
from tests.inference import test_triton_decode as decode
from tests.inference.conftest import described
from tests.inference.test_generator import FAMILIES, generated, prompts_of, recomputed
from tests.pool import RankPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = (
    *("environment.device=cuda", "environment.variables={}", "model.hidden_size=256", "training.precision=bf16"),
    "megatron_args.attention_backend=auto",
)
LATENT = ("kv_lora_rank=64", "qk_head_dim=64", "qk_pos_emb_head_dim=64", "v_head_dim=64")
MODELS = {
    "grouped heads": (),
    "windows on a layer, sinks": FAMILIES["windows on a layer, sinks"],
    "GPT-3": FAMILIES["GPT-3"],
    "MLA": (*FAMILIES["MLA"], *(f"megatron_args.{one}" for one in LATENT)),
}
WIDE = {  # query heads, key heads, head dim, value head dim, keys, window
    "8 B": (32, 8, 128, 128, 5000, None),
    "latent": (16, 1, 576, 512, 3000, None),
    "window": (32, 8, 64, 64, 5000, 1000),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*decode.CASES, *WIDE])
def test_the_decode_kernel(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CASES", decode.CASES | WIDE)
    assert decode.compare(case, "cuda", dtype) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("graph", ["always", "never"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_the_whole_sequence(
    model: str, ranks: int, graph: str, pool: RankPool, tmp_path: Path
) -> None:
    run_dir = described(tmp_path / "run", *MODELS[model], *SIZES)
    prompts = prompts_of(1, 50, 17)
    run = configuration.configuration(run_dir, [f"context_parallel.size={ranks}"])
    arguments = configuration.arguments(run, None)
    found, *others = pool.run(generated, ranks, run, arguments, prompts, 16, 4, graph, init_group=False)
    assert all(other.tokens == found.tokens for other in others)
    texts = [prompt + tokens for prompt, tokens in zip(prompts, found.tokens, strict=True)]
    one = configuration.configuration(run_dir, ["context_parallel.size=1"])
    (expected,) = pool.run(recomputed, 1, configuration.arguments(one, None), texts, init_group=False)
    for logits, wanted in zip(found.logits, expected, strict=True):
        difference = float((logits - wanted).abs().max() / wanted.abs().max())
        print(f"{model}, {ranks} ranks, graph {graph}: {difference:.1e} of the largest logit")
        assert difference < 3e-2
