"""The model that lm-evaluation-harness sees, on a generator that counts; and under the harness where that is there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.sampling import Sampling

HARNESS = importlib.util.find_spec("lm_eval") is not None


class StandIn:
    """What the harness's base class gives a model, where the harness is not installed."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *of: None)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not HARNESS:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", StandIn, raising=False)
    monkeypatch.delitem(sys.modules, "megatron_attn2d.inference.lm_eval", raising=False)
    return importlib.import_module("megatron_attn2d.inference.lm_eval")


class Counting:
    """A generator over bytes: a token's log probability is minus its distance from the token before it."""

    positions: int | None = None
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()), end=256)

    def __init__(self) -> None:
        self.cached: list[list[int]] = []
        self.options: list[Sampling] = []
        self.longest = 0

    def prefill(self, prompts: list[list[int]], *, room: int) -> list[int]:
        self.cached += prompts
        return prompts[0]

    def log_likelihood(self, contexts: Any, continuations: Any, after: Any = ()) -> list[tuple[float, bool]]:
        found = []
        for context, continuation in zip(contexts, continuations, strict=True):
            text = [*after, *context, *continuation]
            self.longest = max(self.longest, len(text))
            steps = [abs(text[i] - text[i - 1]) for i in range(len(text) - len(continuation), len(text))]
            found.append((-float(sum(steps)), not any(steps)))
        return found

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Any]:
        self.options.append(sampling)
        return [SimpleNamespace(text=f"{len(prompt)}") for prompt in prompts]


@pytest.fixture
def model(adapter: Any) -> Any:
    made = adapter.MegatronLM.__new__(adapter.MegatronLM)
    made._use(Counting())
    return made


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_continuations_are_scored_in_order_and_long_contexts_are_cached_once(model: Any) -> None:
    long = "b" * 300
    requests = [asked(long, "b"), asked("ab", "c"), asked(long, "a"), asked("", "a"), asked("x ", "x")]
    scores = [(0.0, True), (-1.0, False), (-1.0, False), (-159.0, False), (-176.0, False)]
    assert model.loglikelihood(requests) == scores
    assert model.generator.cached == [list(long.encode())]


@pytest.mark.parametrize("positions", [None, 100, 7, 2])
def test_a_rolling_score_takes_each_token_once(model: Any, positions: int | None) -> None:
    text = "the quick brown fox"
    model.generator.positions = positions
    tokens = [256, *text.encode()]
    whole = -sum(abs(b - a) for a, b in pairwise(tokens))
    assert model.loglikelihood_rolling([asked(text)]) == [whole]
    assert model.generator.longest == min(len(tokens), positions or len(tokens))


def test_texts_are_generated_by_options(model: Any) -> None:
    greedy, drawn = {"until": ["\n"], "max_gen_toks": 5}, {"until": ".", "do_sample": True, "top_p": 0.9}
    warm, cold = {"temperature": 0.5, "max_tokens": 7}, {"temperature": 0.5, "do_sample": False}
    requests = [asked("abc", greedy), asked("ab", drawn), asked("", greedy), asked("a", warm), asked("abcd", cold)]
    assert model.generate_until(requests) == ["3", "2", "1", "1", "4"]
    assert model.generator.options == [
        Sampling(max_tokens=5, stop=("\n",)),
        Sampling(max_tokens=256, temperature=1.0, top_p=0.9, stop=(".",)),
        Sampling(max_tokens=7, temperature=0.5),
        Sampling(max_tokens=256),
    ]
    with pytest.raises(UsageError, match="generation option num_beams: not served; served are until"):
        model.generate_until([asked("a", {"num_beams": 4})])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": "auto"}, "batch_size auto: choose a number"), ({"max_batch_size": 4}, "give batch_size")],
)
def test_mistakes_are_named(adapter: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        adapter.MegatronLM("runs/mine", **options)


@pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is not installed: pip install 'megatron-attn2d[eval]'")
def test_the_harness_finds_the_model_and_scores_a_local_task(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in (9, 20)))
    (tmp_path / "task.yaml").write_text(
        "task: local\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/set.jsonl}}}}\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    options = {"run_dir": trained, "parallelism.tensor": 1, "optimizer.use_distributed_optimizer": "false"}
    words = [
        *("run", "--model", "megatron_attn2d", "--tasks", "local", "--include_path", str(tmp_path)),
        *("--model_args", ",".join(f"{key}={value}" for key, value in options.items())),
    ]
    command = [sys.executable, "-m", "megatron_attn2d.inference.lm_eval", *words]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("|local"))
    assert 7 < float(row.split("|")[7]) < 11  # 512 ids, untrained: 9 bits per byte
