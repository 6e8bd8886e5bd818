"""Nothing is lost and nothing corrupt is taken: flipped bytes and a full disk."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_attn2d.data import indexed
from megatron_attn2d.data.build import build
from megatron_attn2d.data.tokenizers import TokenizerChoice
from megatron_attn2d.run import checkpoints
from tests.megatron.runs import arguments, context_parallel, metrics, train
from tests.pool import RankPool

OPTIONS: dict[str, Any] = {
    "mock_data": True,
    "num_layers": 1,
    "train_iters": 3,
    "verify_integrity": True,
    **context_parallel("attention2d", 1, 2),
}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2 of a run on two ranks."""
    directory = tmp_path_factory.mktemp("saved")
    train(pool, 2, directory / "run", save=directory / "checkpoints", save_interval=1, exit_interval=2, **OPTIONS)
    return directory / "checkpoints"


def refused(rank: int, folder: str) -> list[str]:
    """Flips bytes of each file of a checkpoint in turn; the files of which no error tells."""
    from megatron_attn2d.training.guards.integrity import CorruptCheckpointError, verify

    silent = []
    for path in sorted(Path(folder).iterdir()):
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, -1):
            flip(path, at)
            try:
                verify(Path(folder))
                silent.append(f"{path.name}: loaded")
            except CorruptCheckpointError as error:
                if path.name != checkpoints.CHECKSUMS and f" {path.name}: hash mismatch" not in str(error):
                    silent.append(f"{path.name}: {error}")
            path.write_bytes(whole)
    verify(Path(folder))
    return silent


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_refused_with_the_files_name(
    pool: RankPool, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints.folder(saved, 2), tmp_path / "iter_0000002")
    kinds = {"".join(filter(str.isalpha, path.name)) for path in folder.iterdir()}
    assert kinds >= {"distcp", "metadata", "metadatajson", "integrityjson"}
    assert pool.run(refused, 1, str(folder)) == [[]]


def resume(rank: int, args: list[str]) -> str:
    from megatron_attn2d.errors import UsageError
    from megatron_attn2d.training import pretrain_gpt
    from megatron_attn2d.training.guards.integrity import CorruptCheckpointError

    try:
        pretrain_gpt.main(args)
    except (CorruptCheckpointError, UsageError) as error:
        return str(error)
    return ""


def test_training_refuses_a_corrupt_checkpoint_and_continues_from_the_one_before(
    pool: RankPool, saved: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    corrupt = sorted(checkpoints.folder(directory, 2).glob("*.distcp"))[0]
    flip(corrupt, 1000)
    options = {"load": directory, **OPTIONS}
    for message in pool.run(resume, 2, arguments(run_dir=tmp_path / "run", **options)):
        assert f"{corrupt.name}: hash mismatch" in message
        assert f"To go on from another step, write it into {directory / checkpoints.TRACKER}" in message
    (directory / checkpoints.TRACKER).write_text("1")
    assert [step["step"] for step in train(pool, 2, tmp_path / "run", **options)] == [2, 3]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"load": True, "train_iters": 5}, "total number of iterations is 12 in this checkpoint and 20 here; "),
    "layers, width, vocabulary": (
        {"pretrained_checkpoint": True, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 128, "vocab_size": 600},
        "model.num_layers is 1 in this checkpoint and 2 here; choose 1, or another checkpoint\n"
        "{folder}: model.hidden_size is 64 in this checkpoint and 32 here; choose 64, or another checkpoint\n"
        "{folder}: model.ffn_hidden_size is 256 in this checkpoint and 128 here; choose 256, or another checkpoint\n"
        "{folder}: model.kv_channels is 16 in this checkpoint and 8 here; choose 16, or another checkpoint\n"
        "{folder}: data.vocab_size is 512 in this checkpoint and 600 here; choose 512, or another checkpoint",
    ),
    "a tensor's shape": (
        {"load": True, "mtp_num_layers": 1},
        "{folder}: it does not fit this run: ",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_in_words(
    case: str, pool: RankPool, saved: Path, tmp_path: Path
) -> None:
    changes, expected = OTHERS[case]
    options = OPTIONS | {name: saved if value is True else value for name, value in changes.items()}
    for message in pool.run(resume, 2, arguments(run_dir=tmp_path / "run", **options)):
        assert message.startswith(f"{checkpoints.folder(saved, 2)}: ")
        assert expected.format(folder=checkpoints.folder(saved, 2)) in message


def test_weights_alone_are_started_from_once(pool: RankPool, saved: Path, tmp_path: Path) -> None:
    """As checkpoint.start_from compiles to: another plan, a batch less, and the same command after a stop."""
    own = tmp_path / "checkpoints"
    options = {**OPTIONS, "train_iters": 4, "pretrained_checkpoint": saved, "load": own, "save": own}
    whole = train(pool, 2, tmp_path / "undisturbed", **{**options, "load": None, "save": None})
    assert [step["step"] for step in whole] == [1, 2, 3, 4]
    fresh = metrics(saved.parent / "run")
    assert whole[0]["loss"] < fresh[0]["loss"], "the weights are not the checkpoint's"
    train(pool, 2, tmp_path / "run", exit_interval=2, **options)
    steps = train(pool, 2, tmp_path / "run", **options)
    assert [(step["step"], step["loss"]) for step in steps] == [(step["step"], step["loss"]) for step in whole]


def fill_the_disk(rank: int, args: list[str], step: int) -> str:
    """Trains; from the save of `step` on no file may grow beyond 20 KB, as on a full disk. What the save says."""
    from megatron.core import dist_checkpointing

    from megatron_attn2d.training import pretrain_gpt
    from megatron_attn2d.training.guards.retention import SaveError

    save, limits = dist_checkpointing.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_little_space(state: Any, directory: str, *rest: Any, **kwargs: Any) -> Any:
        if directory.endswith(f"{step:07d}"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return save(state, directory, *rest, **kwargs)

    with mock.patch.object(dist_checkpointing, "save", save_with_little_space):
        try:
            pretrain_gpt.main(args)
        except SaveError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(pool: RankPool, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    options = {**OPTIONS, "context_parallel_size": 1, "cp_comm_type": None, "train_iters": 4, "save": directory}
    options["hierarchical_context_parallel_sizes"] = None
    args = arguments(run_dir=tmp_path / "run", save_interval=2, **options)
    (message,) = pool.run(fill_the_disk, 1, args, 4)
    assert f"step 4 could not be saved to {directory}" in message
    assert "step 2 is whole: continue from it" in message
    pool.close()  # a job that failed is started again in new processes
    recorded = metrics(tmp_path / "run")[:2]
    checkpoints.repair_tracker(directory)
    steps = train(pool, 1, tmp_path / "run", load=directory, **options)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[:2] == recorded, "the run began anew"
    assert checkpoints.last_complete(directory) == 4


def test_a_flipped_byte_in_the_index_of_a_data_set_is_refused_with_the_files_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    embedded = indexed.build([tmp_path / "a.txt"], tmp_path / "embedded")
    build([tmp_path / "a.txt"], tmp_path / "built", TokenizerChoice("bytes"))
    for prefix in (embedded, tmp_path / "built"):
        index = prefix.with_name(f"{prefix.name}.idx")
        indexed.verify_index(prefix)
        for at in range(len(index.read_bytes())):
            flip(index, at)
            with pytest.raises(ValueError, match=f"{index} is not the index that was built"):
                indexed.verify_index(prefix)
            flip(index, at)
        indexed.verify_index(prefix)


def test_training_verifies_its_data_sets(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 1000)
    prefix = indexed.build([tmp_path / "a.txt"], tmp_path / "text")
    flip(tmp_path / "text.idx", -1)
    (message,) = pool.run(start, 1, arguments(run_dir=tmp_path / "run", data_path=prefix))
    assert "text.idx is not the index that was built" in message


def start(rank: int, args: list[str]) -> str:
    from megatron_attn2d.training import pretrain_gpt

    try:
        pretrain_gpt.main(args)
    except ValueError as error:
        return str(error)
    return ""


def test_a_flipped_byte_in_a_sample_index_that_megatron_cached_is_refused(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 1000)
    prefix = indexed.build([tmp_path / "a.txt"], tmp_path / "text")
    args = {"data_path": prefix, "num_layers": 1, "train_iters": 1}
    assert len(train(pool, 1, tmp_path / "run", **args)) == 1
    cached = sorted(tmp_path.rglob("*.npy"))
    assert {path.stem.rpartition("-")[2] for path in cached} == {"document_index", "sample_index", "shuffle_index"}
    for path in cached:
        with indexed.sealed_caches([path.parent], verifies=True, seals=False):
            pass
        for at in range(0, len(path.read_bytes()), 7):
            flip(path, at)
            with (
                pytest.raises(ValueError, match=f"{path} is not the index that was built"),
                indexed.sealed_caches([path.parent], verifies=True, seals=False),
            ):
                pass
            flip(path, at)
    flip(cached[0], -1)
    (message,) = pool.run(start, 1, arguments(run_dir=tmp_path / "run", **args))
    assert f"{cached[0]} is not the index that was built: remove it" in message
    for path in tmp_path.rglob("*_index.npy*"):
        path.unlink()
    assert len(train(pool, 1, tmp_path / "run", **args)) == 1


@pytest.mark.parametrize("content", ["", "x", "1", "3\n", "02"])
def test_a_changed_tracker_leads_to_a_complete_checkpoint(content: str, saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    (directory / checkpoints.TRACKER).write_text(content)
    checkpoints.repair_tracker(directory)
    assert checkpoints.tracked(directory) == (1 if content == "1" else 2)
