"""Which checkpoints are complete, which one a run continues from, and which are kept."""

from pathlib import Path

import pytest

from megatron_attn2d.run import checkpoints

WHOLE = ("__0_0.distcp", ".metadata", "metadata.json")


def write(directory: Path, *steps: int, files: tuple[str, ...] = WHOLE, tracker: str | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    for step in steps:
        checkpoints.folder(directory, step).mkdir()
        for name in files:
            (checkpoints.folder(directory, step) / name).write_text("{}")
    if tracker is not None:
        (directory / checkpoints.TRACKER).write_text(tracker)
    return directory


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("whole", "half", "tracker", "expected"),
    [
        ([], [], None, None),
        ([], [3], None, None),  # killed in the first save
        ([3, 6], [], "6", 6),
        ([3, 6], [9], "6", 6),  # killed in a save
        ([3, 6], [], "", 6),  # killed while the tracker was written
        ([3, 6], [], None, 6),
        ([3], [6], "6", 3),  # the tracker's is damaged
        ([3, 6], [], "12", 6),  # the tracker's was removed
        ([3, 6, 9], [], "6", 6),  # somebody went back
        ([3], [], "junk", 3),
    ],
)
def test_a_run_continues_from_the_last_complete_one(whole, half, tracker, expected, tmp_path: Path) -> None:
    write(tmp_path, *whole, tracker=tracker)
    write(tmp_path, *half, files=WHOLE[:-1])
    assert checkpoints.complete(tmp_path) == whole
    assert checkpoints.last_complete(tmp_path) == expected
    checkpoints.repair_tracker(tmp_path)
    path = tmp_path / checkpoints.TRACKER
    assert (path.read_text() if path.exists() else None) == (None if expected is None else str(expected))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ([path.name] if expected else [])


def test_a_directory_that_is_not_there_has_none(tmp_path: Path) -> None:
    checkpoints.repair_tracker(tmp_path / "missing")
    assert checkpoints.last_complete(tmp_path / "missing") is None


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 3)
    for name in ("iter_last", "iter_", "release"):
        (tmp_path / name).mkdir()
    assert checkpoints.complete(tmp_path) == [3]


def test_one_that_is_being_overwritten_is_not_complete(tmp_path: Path) -> None:
    write(tmp_path, 3, 6, tracker="6")
    checkpoints.begin_save(tmp_path, 6)
    checkpoints.begin_save(tmp_path, 9)
    assert checkpoints.last_complete(tmp_path) == 3


@pytest.mark.parametrize(
    ("keep", "whole", "half", "tracker", "kept"),
    [
        (1, [3, 6, 9], [], "9", [9]),
        (2, [3, 6, 9], [], "9", [6, 9]),
        (5, [3, 6, 9], [], "9", [3, 6, 9]),
        (1, [3, 6], [9], "6", [6, 9]),  # 9 is being written
        (1, [3, 9], [6], "9", [9]),  # 6 was never finished
        (2, [3, 6, 9], [], "6", [3, 6, 9]),  # an asynchronous save of 9 has just ended, or somebody went back
        (1, [3, 6], [9], "9", [3, 6, 9]),  # the tracker's isn't complete: nothing is safe to delete
        (1, [3, 6], [], None, [3, 6]),
        (1, [3, 6], [], "", [3, 6]),
    ],
)
def test_the_last_are_kept_and_never_the_last_complete_one_deleted(keep, whole, half, tracker, kept, tmp_path) -> None:
    write(tmp_path, *whole, tracker=tracker)
    write(tmp_path, *half, files=WHOLE[:-1])
    checkpoints.prune(tmp_path, keep).join()
    assert folders(tmp_path) == [f"iter_{step:07d}" for step in kept]


def test_a_linked_checkpoint_stays_and_an_interrupted_deletion_is_finished(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", 3)
    directory = write(tmp_path / "run", 6, 9, tracker="9")
    checkpoints.folder(directory, 3).symlink_to(checkpoints.folder(tmp_path / "elsewhere", 3))
    (directory / ".deleted-iter_0000001").mkdir()
    checkpoints.prune(directory, 1).join()
    assert folders(directory) == ["iter_0000003", "iter_0000009"]
    assert folders(tmp_path / "elsewhere") == ["iter_0000003"]
