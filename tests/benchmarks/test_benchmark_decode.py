"""The benchmark of decoding as far as no rank runs: its model on GPUs, and its table."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_attn2d.inference import configuration
from megatron_attn2d.training.derive import Installed, derived_arguments
from tests.benchmarks.test_benchmark_multi_gpu import ROOT, script


@pytest.mark.parametrize(("model", "tensor"), [("llama_8b", 1), ("llama_8b", 2), ("gpt3_125m", 1)])
def test_its_model_is_one_that_gpus_would_run(model: str, tensor: int, tmp_path: Path) -> None:
    args = Namespace(
        device="cuda",
        model=ROOT / f"configs/models/{model}.yaml",
        ranks=4,
        tensor=tensor,
        overrides=["model.num_layers=8"],
    )
    run = configuration.configuration(script("benchmark_decode").described(tmp_path, args), [])
    assert (run.world_size, run.context_parallel.size, run.model.num_layers) == (4, 4 // tensor, 8)
    installed = Installed(
        cuda=True, transformer_engine=True, apex=False, gradient_accumulation_kernel=False, softmax_kernels=False
    )
    derived_arguments(configuration.arguments(run, None), installed)  # which refuses what contradicts it


def test_a_row_says_what_was_measured_or_what_does_not_fit() -> None:
    table = script("decode_table")
    cells = table.line({"tokens": 65536.0, **{key: 1.5 for _, key, _ in table.COLUMNS}}).replace("|", " ").split()
    assert cells[0] == "65,536"
    assert len(cells) == len(table.COLUMNS) + 1
    assert table.line({"tokens": 1e6, "needs_gib": 128.0}).endswith(
        "does not fit: 128.0 GiB of keys and values per rank |"
    )
