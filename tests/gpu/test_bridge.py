"""Megatron-Bridge itself with our layer spec: on two ranks, in bf16, with Transformer Engine's layers.

    pip install megatron-bridge
    pytest -m gpu tests/gpu/test_bridge.py

A tiny Llama with random weights is written by Hugging Face's own classes and read by Bridge. Logits and gradients are
compared with those of Bridge's default layers on one rank and of its ring on two, logits with Hugging Face's model too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu import bridge
from tests.gpu.bridge import LENGTH, LLAMA, STEPS, Result, tokens
from tests.megatron.runs import arguments, context_parallel
from tests.pool import RankPool


def missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # not even what it lies in
        return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(missing("megatron.bridge"), reason="needs megatron-bridge"),
]

BOUND, GRADIENT_BOUND = 3e-2, 6e-2
"""On a difference over the reference, in the Euclidean norm: two runs in bf16 round differently."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Hugging Face's model lies."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)  # a folder of Hugging Face's has one
    return path


@pytest.fixture(scope="module")
def default(pool: RankPool, llama: Path) -> dict[int, list[Result]]:
    """Bridge's default layers on one rank and, as a ring, on two."""
    modes = {2: "p2p", 1: None}
    return {size: pool.run(bridge.run, size, llama, mode, init_group=False) for size, mode in modes.items()}


def difference(found: Tensor, reference: Tensor) -> float:
    return ((found.float() - reference.float()).norm() / reference.float().norm()).item()


def assembled(parts: list[Result]) -> Tensor:
    """The logits of all positions, [LENGTH, vocabulary]."""
    logits = {position: row for part in parts for position, row in part["logits"].items()}
    return torch.stack([logits[position] for position in range(LENGTH)])


def check(parts: list[Result], path: Path, references: dict[str, Tensor]) -> None:
    """Logits against Hugging Face's own, in fp32, and others; the weights Bridge exports against those in `path`."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    stored = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        references = {"Hugging Face": model.float()(tokens()[:, :-1]).logits[0], **references}
    found = {name: difference(assembled(parts), logits) for name, logits in references.items()}
    print("logits", found)
    assert max(found.values()) < BOUND
    for part in parts:
        assert part["exported"].keys() == stored.keys()
        assert all(torch.equal(part["exported"][name], weight) for name, weight in stored.items())


@pytest.mark.parametrize("grid", [[2, 1], [1, 2]], ids=str)
def test_a_model_of_hugging_face(
    grid: list[int], pool: RankPool, llama: Path, default: dict[int, list[Result]]
) -> None:
    parts = pool.run(bridge.run, 2, llama, "attention2d", grid, init_group=False)
    assert [part["kinds"] for part in parts] == [["ContextParallelAttention"]] * 2
    assert not any("ContextParallelAttention" in part["kinds"] for results in default.values() for part in results)
    check(parts, llama, {f"Bridge on {size}": assembled(results) for size, results in default.items()})
    [reference] = default[1]
    for part in (*parts, *default[2]):
        assert part["saved"] == reference["saved"]
        assert part["gradients"].keys() == reference["gradients"].keys()
        found = {name: difference(part["gradients"][name], g) for name, g in reference["gradients"].items()}
        print("gradients", part["kinds"], {name: f"{value:.1e}" for name, value in found.items()})
        assert max(found.values()) < GRADIENT_BOUND


@pytest.mark.skipif(missing("nvidia_resiliency_ext"), reason="Bridge's training needs nvidia-resiliency-ext")
@pytest.mark.parametrize("changes", [{}, {"mtp_num_layers": 1}], ids=["Llama", "MTP"])
def test_training(changes: dict[str, Any], pool: RankPool, llama: Path) -> None:
    """Bridge's own `pretrain`: losses and gradient norms of the steps, as on one rank."""
    [expected] = pool.run(bridge.pretrain, 1, llama, changes, init_group=False)
    assert len(expected) == STEPS
    assert expected[0][0] - expected[-1][0] > 0.1, "it should learn, or parity says little"
    for steps in pool.run(bridge.pretrain, 2, llama, changes, "attention2d", [2, 1], init_group=False):
        print("losses and norms", steps, "on one", expected)
        for (loss, norm), (expected_loss, expected_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(expected_loss, abs=2e-2)
            assert norm == pytest.approx(expected_norm, rel=GRADIENT_BOUND)


@pytest.mark.skipif(missing("nvidia_resiliency_ext"), reason="Bridge's training needs nvidia-resiliency-ext")
def test_the_example_of_a_long_context(pool: RankPool, llama: Path, tmp_path: Path) -> None:
    """What it writes is a model of Hugging Face's: every weight trained, for the new length and base."""
    from transformers import LlamaForCausalLM

    pool.run(bridge.example, 2, llama, tmp_path / "long", init_group=False)
    before, after = (LlamaForCausalLM.from_pretrained(path) for path in (llama, tmp_path / "long"))
    assert after.config.max_position_embeddings == LENGTH
    assert after.config.rope_parameters["rope_theta"] == 50000
    weights = before.state_dict()
    moved = {name: (weight - weights[name]).abs().max().item() for name, weight in after.state_dict().items()}
    assert moved.keys() == weights.keys()
    assert 0 < min(moved.values()) <= max(moved.values()) < 10 * STEPS * 1e-3


def test_a_checkpoint_of_ours(pool: RankPool, tmp_path: Path) -> None:
    """Trained on two ranks, converted to Hugging Face as any of Megatron-LM, and back for a training of ours."""
    options: dict[str, Any] = {
        "num_layers": LLAMA["num_hidden_layers"],
        "hidden_size": LLAMA["hidden_size"],
        "ffn_hidden_size": LLAMA["intermediate_size"],
        "seq_length": LENGTH,
        "max_position_embeddings": LENGTH,
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
        "init_method_std": LLAMA["initializer_range"],
        "bf16": True,
        "mock_data": True,
        "num_workers": 0,
    }
    saved = {
        "save": tmp_path / "ours",
        "no_save_optim": True,
        "train_iters": 2,
        **context_parallel("attention2d", 2, 1),
    }
    args = arguments(run_dir=tmp_path / "run", **options, **saved)
    trained, _ = pool.run(bridge.train, 2, args, init_group=False)
    checkpoint, path, back = tmp_path / "ours" / "iter_0000002", tmp_path / "hf", tmp_path / "back"
    [read] = pool.run(bridge.to_hugging_face, 1, checkpoint, path, init_group=False)
    parts = pool.run(bridge.run, 2, path, "attention2d", [1, 2], init_group=False)
    check(parts, path, {})
    pool.run(bridge.from_hugging_face, 1, path, back, init_group=False)
    loaded = {"load": back, "finetune": True, "no_load_optim": True, "no_load_rng": True, "train_iters": 1, "lr": 0.0}
    args = arguments(run_dir=tmp_path / "again", **options, **loaded, **context_parallel("attention2d", 1, 2))
    for found in (read, *(part["parameters"] for part in parts), *pool.run(bridge.train, 2, args, init_group=False)):
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], weight) for name, weight in trained.items())


def test_decentralised_groups(pool: RankPool, llama: Path) -> None:
    """The grid comes from the context group itself; hierarchical sizes are refused there by Bridge."""
    assert pool.run(bridge.decentralised, 2, llama, None, init_group=False) == ["2x1"] * 2
    for said in pool.run(bridge.decentralised, 2, llama, [2, 1], init_group=False):
        assert "do not support hierarchical_context_parallel_sizes" in said
