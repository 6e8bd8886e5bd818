"""`megatron-attn2d submit`: hand a run to Slurm."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from megatron_attn2d.config import ConfigError, RunConfig, load_run, megatron_arguments
from megatron_attn2d.config.files import check_files
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.read import build_run
from megatron_attn2d.data.matching import check_data
from megatron_attn2d.errors import UsageError
from megatron_attn2d.launch import slurm


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `submit` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("submit", help="hand a run to Slurm", description=_submit.__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the YAML")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: environment.nodes, or what the ranks need")
    parser.add_argument("--dry-run", action="store_true", help="print the batch file; write and submit nothing")
    parser.set_defaults(command=_submit)
    return [parser]


def _submit(args: argparse.Namespace) -> int:
    """Render a batch file for RUN.yaml into the run's directory and submit it; Slurm's options stand below `slurm:`."""
    run, nodes = _resolved(args.run, args.overrides, args.nodes)
    directory = _next_directory(Path(run.directory))
    script = slurm.render(run, nodes, directory, Path.cwd())
    if args.dry_run:
        _check_files_seen_from_here(run)
        print(script, end="")
        return 0
    if (Path(run.directory) / "finished").exists():
        raise UsageError(f"{run.directory}: this run has finished; choose another run.dir, or remove its file finished")
    if shutil.which("sbatch") is None:
        raise UsageError("sbatch is not on the PATH; submit on a login node of the cluster, or see --dry-run")
    _check_files(run)
    slurm.write_job(run, script, directory)
    result = subprocess.run(["sbatch", "--parsable", directory / "job.sbatch"], capture_output=True, text=True)
    if result.returncode:
        raise UsageError(f"sbatch refused {directory / 'job.sbatch'}:\n{result.stderr.strip()}")
    job = result.stdout.strip().partition(";")[0]
    print(f"job {job}: {directory / 'job.sbatch'}\nlog: {Path(run.directory) / f'slurm-{job}.log'}")
    return 0


def _resolved(path: str, overrides: Sequence[str], nodes: int | None) -> tuple[RunConfig, int]:
    """The run, on as many nodes as asked for, with an absolute directory; and the number of nodes."""
    if nodes is not None and nodes < 1:
        raise UsageError(f"--nodes {nodes}: must be at least 1")
    # Not checked yet: the number of ranks may not fit before the nodes are known.
    asked = build_run(read_run(Path(path), overrides))
    on_gpus = asked.environment.device == "cuda"
    if on_gpus and not asked.environment.gpus_per_node:
        raise ConfigError("environment.gpus_per_node", None, "not given", "extend a file of configs/clusters")
    if on_gpus and not nodes and not asked.environment.nodes:
        nodes = slurm.nodes_for(asked)
        print(f"megatron-attn2d: --nodes {nodes} follows from the ranks of the run", file=sys.stderr)
    run = load_run(path, [*overrides, f"environment.nodes={nodes}"] if on_gpus and nodes else overrides)
    nodes = nodes or run.environment.nodes
    if nodes is None:
        raise UsageError("on how many nodes? give --nodes, or environment.nodes in the YAML")
    if run.world_size % nodes:
        raise UsageError(f"--nodes {nodes}: {run.world_size} ranks do not spread evenly over them")
    slurm.check(run)
    megatron_arguments(run)  # raises here the errors that each rank would raise
    absolute = run.run.model_copy(update={"dir": str(Path(run.directory).absolute())})
    return run.model_copy(update={"run": absolute}), nodes


def _check_files(run: RunConfig) -> None:
    slurm.check_setup(run)
    if not run.slurm.container_image:  # in a container other paths hold
        check_files(run)
        check_data(run)


def _check_files_seen_from_here(run: RunConfig) -> None:
    """For a dry run: report the errors of `_check_files`, with temporary directories in the place of missing ones."""
    with tempfile.TemporaryDirectory() as scratch:
        for section in ("run", "data"):
            where = getattr(run, section)
            if not Path(where.dir).exists():
                run = run.model_copy(update={section: where.model_copy(update={"dir": scratch})})
        try:
            _check_files(run)
        except ConfigError as error:
            print(f"megatron-attn2d: without --dry-run this is refused on this host:\n{error}", file=sys.stderr)


def _next_directory(run_dir: Path) -> Path:
    """A new directory for this submission's files, as a job that waits or runs keeps its own."""
    return next(path for number in count(1) if not (path := run_dir / "jobs" / f"{number:03d}").exists())
