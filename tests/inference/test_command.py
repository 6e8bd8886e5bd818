"""`megatron-attn2d generate` and the API of one process."""

import io
import json
import math
import os
import re
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_attn2d import cli
from megatron_attn2d.data.build import build
from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference import configuration
from megatron_attn2d.inference.results import Completion
from megatron_attn2d.inference.sampling import Sampling
from tests.data.conftest import _sentencepiece
from tests.inference.conftest import described
from tests.pool import RankPool, call

PROMPTS = ["import os", "x", "def f():\n    return", "one\u2028line"]


def test_prompts_of_a_file_are_completed(trained: Path, in_pool: None, tmp_path: Path) -> None:
    asked, found = tmp_path / "prompts.jsonl", tmp_path / "found.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in PROMPTS))
    words = ("--prompts", str(asked), "--max-tokens", "5", "--temperature", "1", "--seed", "3", "-o", str(found))
    assert cli.main(["generate", str(trained), "context_parallel.size=2", "parallelism.tensor=1", *words]) == 0
    lines = [json.loads(line) for line in found.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    for line in lines:
        assert len(line["tokens"]) == len(line["logprobs"])
        assert line["stop_reason"] == ("length" if len(line["tokens"]) == 5 else "end")
    assert len({tuple(line["tokens"]) for line in lines}) == len(PROMPTS)


def test_what_is_complete_before_a_crash_is_kept(tmp_path: Path) -> None:
    from megatron_attn2d.inference.completions import Request, _written

    output, console = tmp_path / "found.jsonl", io.StringIO()
    output.write_text("of an earlier run\n")
    request = Request(mock.Mock(), ["a", "b"], Sampling(), 1, 1, str(output))
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(ZeroDivisionError))
        write = stack.enter_context(_written(request, console))
        write("a", Completion("x", [1], [-0.5], "length"))
        (line,) = (tmp_path / "found.jsonl.new").read_text().splitlines()
        1 / 0  # noqa: B018  # the crash
    assert json.loads(line) == {"prompt": "a", "text": "x", "tokens": [1], "logprobs": [-0.5], "stop_reason": "length"}
    assert console.getvalue() == f"-- 1 of 2 completions are in {output}.new\n"
    assert output.read_text() == "of an earlier run\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "prompt 0: empty; give a text of one character"),
        (["--prompt", "a\udcff"], "prompt 0: no character at place 1; give a text in UTF-8"),
        (["--prompt", "a", "--top-p", "0"], "--top-p 0.0: choose more than 0"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens 0: choose 1 or more"),
        (["--prompt", "a", "--batch", "0"], "--batch 0: choose 1 or more"),
        (["--prompt", "a", "--step", "9"], "no complete checkpoint of step 9; there are 1"),
        (["--prompt", "a", "-o", "none/e.jsonl"], "--output none/e.jsonl: there is no directory none"),
        (["--prompt", "a", "-o", "."], "--output .: a directory; name a file"),
        (["--prompts", "good.jsonl", "-o", "./good.jsonl"], "--output ./good.jsonl: holds the prompts; choose another"),
        (["--prompts", "bad.jsonl"], "bad.jsonl, line 2: not a JSON object"),
        (["--prompts", "number.jsonl"], "number.jsonl, line 1: the prompt is a int; give a text"),
        (["--prompts", "empty.jsonl"], "empty.jsonl: empty; give a line"),
        (["--prompt", "a", "data.vocab_size=300"], "data.vocab_size = 300: the run was trained with 512"),
        (["--prompt", "a", "data.tokenizer_type=TikTokenizer"], "data.tokenizer_type = 'TikTokenizer': the run was tr"),
        (["--prompt", "a", "context_parallel.mode=ring"], "context_parallel.mode = 'ring': the cache is attended on"),
        (["--prompt", "a", "training.seq_length=8"], "training.seq_length = 8: a text is as long as its prompt"),
        (["--prompt", "a", "parallelism.tensor=3"], "parallelism.tensor = 3"),
        (["--prompt", "a", "parallelism.data=2", "parallelism.expert=2"], "parallelism.data = 2: replicas complete pr"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "a"}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": 7}\n')
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", str(trained), *words]) == 2
    assert message in capsys.readouterr().err


def test_learned_positions_end(trained: Path, tmp_path: Path, capsys) -> None:
    run_dir = described(tmp_path / "run", "model.position_embedding_type=learned_absolute")
    (run_dir / "checkpoints").symlink_to(trained / "checkpoints")
    assert cli.main(["generate", str(run_dir), "--prompt", "a" * 60, "--max-tokens", "6"]) == 2
    assert "prompt 0: 60 tokens and 6 new ones are more than the 64 positions" in capsys.readouterr().err


def test_another_tokenizer_than_the_runs_is_refused(tmp_path: Path) -> None:
    choice = _sentencepiece(tmp_path)
    (tmp_path / "text.txt").write_text("Ring attention passes every key by every rank.")
    build([tmp_path / "text.txt"], tmp_path / "set", choice)
    moved, other = tmp_path / "moved.model", tmp_path / "other.model"
    moved.write_bytes(Path(choice.model or "").read_bytes())
    other.write_bytes(moved.read_bytes() + b"x")
    keys = ("data.tokenizer_type=SentencePieceTokenizer", f"data.tokenizer_model={choice.model}")
    null = ("data.vocab_size=null", "data.null_tokenizer_eod_id=null", f"data.paths=[{tmp_path / 'set'}]")
    run_dir = described(tmp_path / "run", *keys, *null)
    assert configuration.configuration(run_dir, [f"data.tokenizer_model={moved}"]).data.tokenizer_model == str(moved)
    with pytest.raises(UsageError, match=r"data.tokenizer_model = .*with another vocabulary"):
        configuration.configuration(run_dir, [f"data.tokenizer_model={other}"])


def test_the_api_of_one_process(pool: RankPool, trained: Path) -> None:
    pool.run(call, 1, _use, [str(trained)], init_group=False)


def _use(args: list[str]) -> None:
    from megatron_attn2d.inference.generator import Generator

    with Generator.load(args[0], ["parallelism.tensor=1"], step=1, batch=1, chunk=8) as generator:
        encode, greedy = generator.tokenizer.encode, Sampling(4, ignore_end=True)
        text = encode("one haystack, many questions")
        asked = [encode("a"), encode("bcd")]
        caches: list[Any] = []

        def new_cache(*of: Any) -> Any:
            assert all(cache() is None for cache in caches), "one batch's cache is gone before the next one's is made"
            made = type(generator._model).new_cache(generator._model, *of)
            caches.append(weakref.ref(made))
            return made

        told: list[Any] = []
        with mock.patch.object(generator._model, "new_cache", new_cache):
            whole = generator.generate(
                [text + question for question in asked],
                greedy,
                lambda i, new: told.append(i),
                on_completion=lambda i, completion: told.append(completion),
            )
        assert len(caches) == 2
        assert [one for one in told if isinstance(one, Completion)] == whole
        assert told.index(whole[0]) < told.index(1), "a completion is handed over before the next batch begins"
        shown: dict[int, str] = {0: "", 1: ""}
        cache = generator.prefill([text])
        shared = generator.generate(asked, greedy, lambda i, new: shown.update({i: shown[i] + new}), after=cache)
        assert [one.tokens for one in shared] == [one.tokens for one in whole]
        assert [one.text for one in shared] == [shown[0], shown[1]]
        assert cache.lengths == [len(text)]

        # a greedy completion is the likeliest, and its log probabilities are those of scoring it
        (likely, greedy_too), (other, likeliest) = generator.log_likelihood(
            asked, [one.tokens for one in whole], after=cache
        )
        assert greedy_too
        assert likeliest
        assert likely == pytest.approx(sum(whole[0].logprobs), abs=1e-4)
        assert other == pytest.approx(sum(whole[1].logprobs), abs=1e-4)
        ((again, _),) = generator.log_likelihood([text + asked[0]], [whole[0].tokens])
        assert again == pytest.approx(likely, abs=1e-4)
        ((_, unlikely),) = generator.log_likelihood([text], [[(t + 1) % 256 for t in whole[0].tokens]])
        assert not unlikely
        (scores,) = generator.score([text + asked[0] + whole[0].tokens])
        assert len(scores) == len(text) + 4
        assert sum(scores[-4:]) == pytest.approx(likely, abs=1e-4)
        assert all(score <= 0 and math.isfinite(score) for score in scores)

        after = cache.snapshot()
        generator.extend(cache, [encode("more")])
        with mock.patch.object(generator._model, "free_bytes", return_value=200_000):
            with pytest.raises(UsageError, match="has to grow for 10,000 more, which takes") as refused:
                generator.extend(cache, [[1] * 10_000])
            fits = int(re.search("choose ([0-9]+) more tokens per text", str(refused.value))[1])  # type: ignore[index]
            with pytest.raises(UsageError, match=f"choose {fits} more tokens per text"):
                generator._room.make(cache, [fits + 1], 0)
            generator._room.make(cache, [fits], 0)
        assert cache.lengths == [len(text) + 4]
        later = cache.snapshot()
        cache.roll_back(after)
        generator.extend(cache, [encode("other")])  # more tokens than the snapshot has, and not those
        with pytest.raises(ValueError, match="the snapshot holds tokens that the cache has forgotten"):
            cache.roll_back(later)

        stop = whole[0].text[1:3]
        stopped = generator.generate([text + asked[0]], Sampling(4, stop=(stop,), ignore_end=True))[0]
        assert (stopped.text, stopped.stop_reason) == (whole[0].text.partition(stop)[0], "stop")
        for wrong, message in (([[]], "prompt 0: empty"), ([[1], [300]], "prompt 1: token 300 is none of the run's")):
            with pytest.raises(UsageError, match=message):
                generator.generate(wrong)
        with (
            mock.patch.object(generator._model, "free_bytes", return_value=10_000),
            pytest.raises(
                UsageError, match=r"a cache of 1 prompt of 1,001 tokens takes .* choose \d+ tokens per prompt"
            ),
        ):
            generator.generate([[1] * 1000], Sampling(1))

        cache = generator.prefill([[1, 2]])
        next(generator._model._chunk.parameters()).data[7] = math.nan  # token 7 of embedding and output
        for sampling in (Sampling(2), Sampling(2, temperature=1.0)):
            with pytest.raises(UsageError, match="prompt 0, new token 1: the model's logits are not finite"):
                generator.generate([[1]], sampling)
        with pytest.raises(UsageError, match="the model's logits are not finite"):
            generator.generate([[1]], after=cache)
        assert cache.lengths == [2], "as before, also after an error"
        with pytest.raises(UsageError, match="text 0: the model's logits are not finite"):
            generator.score([[1, 1]])
    assert os.environ["WORLD_SIZE"] == "1"
