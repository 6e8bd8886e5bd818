"""Three ways in: our YAML, a stock launch of Megatron-LM with `--spec`, and Megatron-Bridge's layer spec."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_attn2d import cli
from megatron_attn2d.config import load_run, megatron_arguments
from tests.megatron.runs import OPTIONS, arguments, context_parallel, metrics, train_rank
from tests.megatron.test_layer_spec import MIXTURE, SPEC
from tests.pool import RankPool

Layers = list[tuple[int, str, tuple[int, int] | None, int]]

YAML = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}
context_parallel: {size: 2}
data: {mock: true, vocab_size: 512, null_tokenizer_eod_id: 256}
optimizer: {lr: 1e-3}
training: {train_iters: 1, seq_length: 64, global_batch_size: 2, precision: fp32}
checkpoint: {save: false}
environment: {device: cpu}
"""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("context_parallel.grid=[2, 1]", [(1, "attention2d", (2, 1), 1), (2, "attention2d", (2, 1), 1)]),
        (
            "context_parallel={size: 2, grid: [1, 2], head_groups: 2}",
            [(1, "attention2d", (1, 2), 2), (2, "attention2d", (1, 2), 2)],
        ),
        ("context_parallel.mode=ring", [(1, "p2p", None, 1), (2, "p2p", None, 1)]),
        (
            "context_parallel={size: 2, grid: [1, 2], layer_modes: [ring, attention2d]}",
            [(1, "p2p", None, 1), (2, "attention2d", (1, 2), 1)],
        ),
        (
            "model={num_layers: 2, hidden_size: 64, num_attention_heads: 4, kind: hybrid}",
            [(1, "attention2d", (1, 2), 1), (3, "attention2d", (1, 2), 1)],
        ),
    ],
)
def test_our_yaml(override: str, expected: Layers, pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    run = load_run(tmp_path / "run.yaml", [override, f"run.dir={tmp_path}"])
    assert pool.run(_layers, 2, megatron_arguments(run)) == [expected] * 2


def _layers(rank: int, args: list[str]) -> Layers:
    """Number, mode, grid and head groups of the attention in each layer of the model that is trained."""
    from megatron.training import training

    from megatron_attn2d.training.guards.self_check import attentions

    found: Layers = []
    original = training.train

    def train(step: Any, model: Any, *rest: Any, **kwargs: Any) -> Any:
        for one in attentions(model):
            shape = None if one.ring is not None else (one.grid.rows, one.grid.cols)
            found.append((one.layer_number, one.mode, shape, one.head_groups))
        return original(step, model, *rest, **kwargs)

    with mock.patch.object(training, "train", train):
        train_rank(rank, args)
    return found


CPU = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "no_gradient_accumulation_fusion": True,
    "no_masked_softmax_fusion": True,
    "no_rope_fusion": True,
    "distributed_backend": "gloo",
    "num_workers": 0,
}
STOCK = {**CPU, "num_layers": 2, "train_iters": 4, "mock_data": True, "calculate_per_token_loss": True}
UNCALLED = ["megatron_attn2d.megatron.layer_spec", "attention2d_layer"]
ANY_GRID = {"context_parallel_size": 2, "cp_comm_type": "attention2d"}
RING = "ring (p2p): --cp-comm-type attention2d was not given"
BEST = "attention2d on a grid of 2x1 (the one with the fewest bytes; attention2d:RxC says another) in all layers"
PER_LAYER = "layer 1: attention2d on a grid of 2x1 (cp_comm_type); layer 2: attention2d on a grid of 1x2 (cp_comm_type)"


@dataclasses.dataclass
class Launch:
    """What a launch adds to `STOCK`, how it spreads the model, and what rank 0 says of its layers."""

    spread: dict[str, Any]
    said: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    spec: list[str] = dataclasses.field(default_factory=lambda: SPEC)
    attentions: int = 2
    tolerance: float = 1e-5


LAUNCHES = {
    "hierarchical sizes": Launch(
        context_parallel("attention2d", 1, 2),
        "attention2d on a grid of 1x2 (hierarchical_context_parallel_sizes) in all layers",
    ),
    "a grid per layer": Launch({**ANY_GRID, "cp_comm_type": ["attention2d:2x1", "attention2d:1x2"]}, PER_LAYER),
    "a ring": Launch({"context_parallel_size": 2}, RING),
    "a spec that nobody calls": Launch(ANY_GRID, BEST, spec=UNCALLED),
    "a spec that nobody calls, MoE and MTP": Launch(
        ANY_GRID, BEST, {**MIXTURE, "moe_layer_freq": "[0,1]", "mtp_num_layers": 1}, UNCALLED, 3, 1e-4
    ),
}


@pytest.fixture(scope="module")
def upstreams(pool: RankPool) -> tuple[list[float], list[str], list[str]]:
    """What a launch on one rank without a spec gives."""
    [found] = pool.run(_stock, 1, arguments(**STOCK))
    return found


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_a_stock_launch_of_megatron_lm(
    launch: Launch, upstreams: tuple[list[float], list[str], list[str]], pool: RankPool
) -> None:
    options = {**STOCK, **launch.options}
    expected, kinds, _ = pool.run(_stock, 1, arguments(**options))[0] if launch.options else upstreams
    assert kinds == ["DotProductAttention"] * launch.attentions
    ranks = pool.run(_stock, 2, arguments(**options, spec=launch.spec, **launch.spread))
    for losses, kinds, _ in ranks:
        assert kinds == ["ContextParallelAttention"] * launch.attentions
        assert losses == pytest.approx(expected, abs=launch.tolerance)
    assert len(expected) == 4
    derived = "derived: no_create_attention_mask_in_dataloader, as no layer reads that mask of 0.00391 MiB per sequence"
    assert ranks[0][2] == [f"context parallelism over 2 ranks: {launch.said}; kernel reference; {derived}"]
    assert ranks[1][2] == []


def test_the_stock_launch_that_a_dry_run_prints(
    pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied whole it trains as the YAML does; its launcher and a GPU's arguments aside."""
    (tmp_path / "run.yaml").write_text(YAML)
    yaml, given = str(tmp_path / "run.yaml"), [f"run.dir={tmp_path}", "training.train_iters=2"]
    given.append("context_parallel.grid=[1, 2]")
    assert cli.main(["train", yaml, *given, "environment.device=cuda", "--dry-run"]) == 0
    command = capsys.readouterr().out.partition("# The same in Megatron-LM\n")[2]
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    launcher, args = words[: (script := words.index("pretrain_gpt.py"))], words[script + 1 :]
    assert launcher == ["env", "CUDA_DEVICE_MAX_CONNECTIONS=1", "torchrun", "--nproc-per-node", "2"]
    [(losses, kinds, said), _] = pool.run(_stock, 2, [*args, *arguments(**dict.fromkeys(OPTIONS), **CPU)])
    assert kinds == ["ContextParallelAttention"] * 2
    assert said == [
        "context parallelism over 2 ranks: attention2d on a grid of 1x2 (cp_comm_type) in all layers; kernel reference"
    ]
    pool.run(train_rank, 2, megatron_arguments(load_run(yaml, given)))
    assert [line["loss"] for line in metrics(tmp_path)] == pytest.approx(losses, abs=1e-5)


def _stock(rank: int, args: list[str]) -> tuple[list[float], list[str], list[str]]:
    """The losses of a stock launch, the kinds of core attention in its model, and what is said of them."""
    from megatron.training import training

    from megatron_attn2d.megatron import announcement
    from megatron_attn2d.megatron.upstream import compat, cpu
    from megatron_attn2d.training import session
    from tests.megatron import stock_pretrain_gpt

    losses: list[float] = []
    kinds: list[str] = []
    log, train = training.training_log, training.train

    def keep_loss(loss_dict: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
        losses.append(loss_dict["lm loss"].item())
        return log(loss_dict, *rest, **kwargs)

    def look(step: Any, model: Any, *rest: Any, **kwargs: Any) -> Any:
        names = [type(module).__name__ for chunk in model for module in chunk.modules()]
        kinds.extend(name for name in names if name.endswith("Attention") and name != "SelfAttention")
        return train(step, model, *rest, **kwargs)

    announcement.announce.cache_clear()
    printed = io.StringIO()
    try:
        with (
            compat.applied_fixes(),
            cpu.seam(),
            mock.patch.dict(training._STARTUP_TIMESTAMPS),
            mock.patch.object(sys, "argv", ["pretrain_gpt.py", *args]),
            mock.patch.object(training, "training_log", keep_loss),
            mock.patch.object(training, "train", look),
            contextlib.redirect_stdout(printed),
        ):
            stock_pretrain_gpt.main()
    finally:
        session.reset_megatron(owns_process_group=False)
    said = [line for line in printed.getvalue().splitlines() if line.startswith("context parallelism")]
    return losses, kinds, said


def test_the_layer_spec_of_megatron_bridge(pool: RankPool) -> None:
    """Read in Megatron-Bridge 0.6.2: its provider is the configuration, and calls the spec with itself."""
    [whole] = pool.run(_bridged, 1, None)
    for grid in ([2, 1], [1, 2]):
        parts = pool.run(_bridged, 2, grid)
        assert {position for part in parts for position in part} == set(whole)
        for position, logits in ((position, logits) for part in parts for position, logits in part.items()):
            torch.testing.assert_close(logits, whole[position], atol=1e-5, rtol=1e-5)


def _bridged(rank: int, grid: list[int] | None) -> dict[int, torch.Tensor]:
    """Logits at this rank's positions, of a model that a provider builds: with upstream's layers where no grid is."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec
    from megatron_attn2d.megatron.upstream import cpu

    @dataclasses.dataclass
    class Provider(TransformerConfig):
        transformer_layer_spec: ModuleSpec | Callable[[Any], ModuleSpec] | None = None
        vocab_size: int = 64
        seq_length: int = 32

        def provide(self, vp_stage: int | None = None) -> GPTModel:
            spec: Any = self.transformer_layer_spec
            if not isinstance(spec, ModuleSpec):
                takes_stage = "vp_stage" in inspect.signature(spec).parameters
                spec = spec(self, vp_stage=vp_stage) if takes_stage else spec(self)
            return GPTModel(
                self,
                transformer_layer_spec=spec,
                vocab_size=self.vocab_size,
                max_sequence_length=self.seq_length,
                position_embedding_type="rope",
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )

    size = 1 if grid is None else 2
    with cpu.seam():
        parallel_state.initialize_model_parallel(context_parallel_size=size, hierarchical_context_parallel_sizes=grid)
        try:
            model_parallel_cuda_manual_seed(1)
            torch.manual_seed(1)
            provider = Provider(
                num_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                attention_dropout=0.0,
                hidden_dropout=0.0,
                transformer_impl="local",
                masked_softmax_fusion=False,
                context_parallel_size=size,
                cp_comm_type=grid and "attention2d",
                hierarchical_context_parallel_sizes=grid,
                transformer_layer_spec=attention2d_layer_spec if grid else lambda config: get_gpt_layer_local_spec(),
            )
            model = provider.provide().eval()
            group = parallel_state.get_context_parallel_group()
            batch = {
                "tokens": torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(2)),
                "position_ids": torch.arange(32)[None],
            }
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
            mask = None if grid else torch.ones(1, 1, 32, 32, dtype=torch.bool).triu(1)
            with torch.no_grad():
                logits = model(batch["tokens"], batch["position_ids"], mask)[0]
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # upstream keeps them
    return dict(zip(batch["position_ids"][0].tolist(), logits, strict=True))
