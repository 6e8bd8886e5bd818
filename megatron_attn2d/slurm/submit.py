"""`megatron-attn2d submit`: a batch file for a run, in the run's directory, with a snapshot of code and configuration.

Names and paths come from users: whatever they hold, the shell sees them quoted, and sbatch's own parser escaped.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import count
from pathlib import Path

from megatron_attn2d.config import ConfigError, RunConfig, load_run, megatron_arguments, resolved_yaml
from megatron_attn2d.config.errors import UsageError
from megatron_attn2d.config.files import check_files
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.run import build_run
from megatron_attn2d.corpus.matching import check_data

_OURS = (
    *("job-name", "nodes", "ntasks-per-node", "signal", "requeue", "no-requeue", "open-mode", "output", "error"),
    *("chdir", "ntasks", "array", "wrap", "parsable", "test-only"),
)
"""Options of sbatch on which the batch file rests."""
_EARLY_S = 60
"""By so much Slurm may send `--signal` too early, as sbatch's manual says."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> list[argparse.ArgumentParser]:
    """Add `submit` to the command line's `commands`."""
    parser = commands.add_parser("submit", help="hand a run to Slurm", description=_submit.__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the YAML")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: environment.nodes")
    parser.add_argument("--dry-run", action="store_true", help="print the batch file; write and submit nothing")
    parser.set_defaults(command=_submit)
    return [parser]


def _submit(args: argparse.Namespace) -> int:
    """Render a batch file for RUN.yaml into the run's directory and submit it; Slurm's options stand below `slurm:`."""
    run, nodes = _resolved(args.run, args.overrides, args.nodes)
    directory = _next_directory(Path(run.directory))
    script = render(run, nodes, directory, Path.cwd())
    if args.dry_run:
        _check_files(run, dry_run=True)
        print(script, end="")
        return 0
    if (Path(run.directory) / "finished").exists():
        raise UsageError(f"{run.directory}: this run has finished; choose another run.dir, or remove its file finished")
    if shutil.which("sbatch") is None:
        raise UsageError("sbatch is not on the PATH; submit on a login node of the cluster, or see --dry-run")
    _check_files(run)
    write_job(run, script, directory)
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
    # Unchecked: without the nodes the number of ranks may not fit.
    on_gpus = build_run(read_run(Path(path), overrides)).environment.device == "cuda"
    run = load_run(path, [*overrides, f"environment.nodes={nodes}"] if on_gpus and nodes else overrides)
    nodes = nodes or run.environment.nodes
    if nodes is None:
        raise UsageError("on how many nodes? give --nodes, or environment.nodes in the YAML")
    if on_gpus and not run.environment.gpus_per_node:
        raise ConfigError("environment.gpus_per_node", None, "not given", "extend a file of configs/clusters")
    if run.world_size % nodes:
        raise UsageError(f"--nodes {nodes}: {run.world_size} ranks do not spread evenly over them")
    _check(run)
    megatron_arguments(run)  # refuses here what each rank would
    absolute = run.run.model_copy(update={"dir": str(Path(run.directory).absolute())})
    return run.model_copy(update={"run": absolute}), nodes


def _check(run: RunConfig) -> None:
    """Refuses what a job that is queued again can't do, and options that contradict the batch file."""
    if not run.checkpoint.save or not run.checkpoint.exit_signal_handler:
        key = "checkpoint.exit_signal_handler" if run.checkpoint.save else "checkpoint.save"
        raise ConfigError(key, False, "a job that is queued again continues from its checkpoint", "choose true")
    if run.training.exit_interval:
        reason = "a job goes on until training.train_iters"
        raise ConfigError("training.exit_interval", run.training.exit_interval, reason, "choose null")
    for option, value in run.slurm.sbatch.items():
        if option in _OURS:
            raise ConfigError(f"slurm.sbatch.{option}", value, "the batch file rests on this option", "leave it out")
        if isinstance(value, str) and not value.isprintable():
            raise ConfigError(f"slurm.sbatch.{option}", value, "holds a line break", "write it on one line")
    for option in ("time", "time-min"):
        limit = _seconds(run.slurm.sbatch.get(option))
        if limit is not None and limit <= run.slurm.grace_s + _EARLY_S:
            raise ConfigError(
                f"slurm.sbatch.{option}",
                run.slurm.sbatch[option],
                f"{limit} s, and slurm.grace_s = {run.slurm.grace_s} s before the end, or up to {_EARLY_S} s earlier, "
                "ranks are told to save and exit: nothing would be trained",
                "choose more time, or a smaller slurm.grace_s",
            )
    dependency = run.slurm.sbatch.get("dependency")
    if isinstance(dependency, str) and "?" in dependency:
        reason = "with ? one of them is enough, but this run's other jobs must always have ended"
        raise ConfigError("slurm.sbatch.dependency", dependency, reason, "separate them by ,")
    if run.slurm.container_mounts and not run.slurm.container_image:
        raise ConfigError("slurm.container_mounts", run.slurm.container_mounts, "there is no container", "choose []")


def _seconds(limit: object) -> int | None:
    """A time limit as sbatch reads it: minutes[:seconds], hours:minutes:seconds or days-hours...; None: no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(limit))
    if found is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None or third is not None:
        hours, minutes, seconds = first or 0, second or 0, third or 0
    else:
        hours, minutes, seconds = 0, first or 0, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None  # 0 is no limit


def _check_files(run: RunConfig, dry_run: bool = False) -> None:
    """`check_files`, which makes the directories it misses: for a dry run elsewhere."""
    if run.slurm.container_image:  # paths are those within it
        return
    with tempfile.TemporaryDirectory() as scratch:
        for section in ("run", "data") if dry_run else ():
            where = getattr(run, section)
            if not Path(where.dir).exists():
                run = run.model_copy(update={section: where.model_copy(update={"dir": scratch})})
        check_files(run)
        check_data(run)


def _next_directory(run_dir: Path) -> Path:
    """Where this submission's files go: a job that waits or runs keeps its own."""
    return next(path for number in count(1) if not (path := run_dir / "jobs" / f"{number:03d}").exists())


def render(run: RunConfig, nodes: int, directory: Path, workdir: Path) -> str:
    """The batch file for `run` on `nodes` nodes, started in `workdir`, whose snapshot lies in `directory`.

    Raises:
        ConfigError: a path can't be mounted into a container.
    """
    options = "\n".join(f"#SBATCH --{name}{value}" for name, value in _sbatch_options(run, nodes, workdir))
    settings = "\n".join(_settings(run, nodes, directory, workdir))
    template = resources.files("megatron_attn2d.slurm").joinpath("job.sbatch").read_text()
    return template.replace("#@OPTIONS@", options).replace("#@SETTINGS@", settings)


def _sbatch_options(run: RunConfig, nodes: int, workdir: Path) -> Iterator[tuple[str, str]]:
    defaults: dict[str, str | int | bool | None] = {
        "job-name": run.run.name,
        "dependency": "singleton",  # two jobs of one run would write the same checkpoints
        "nodes": nodes,
        "ntasks-per-node": 1,
        "exclusive": True,
        "mem": 0,  # all of a node's
        "gpus-per-node": run.environment.gpus_per_node,
        "signal": f"B:TERM@{run.slurm.grace_s}",
        "requeue": True,
        "open-mode": "append",
        "chdir": str(workdir),
        "output": str(Path(run.directory)).replace("%", "%%") + "/slurm-%j.log",
    }
    given = dict(run.slurm.sbatch)
    dependency = given.get("dependency")
    if isinstance(dependency, str) and "singleton" not in dependency.split(","):
        given["dependency"] = f"{dependency},singleton"
    for name, value in (defaults | given).items():
        if value is not None and value is not False:
            yield name, "" if value is True else f"={_escaped(str(value))}"


def _escaped(text: str) -> str:
    """`text` for a line of #SBATCH: its parser takes a backslash before any character for that character."""
    return re.sub(r"([^A-Za-z0-9/._=,:;@%+*\[\]-])", r"\\\1", text)


def _quoted(text: str) -> str:
    """`text` for the shell; unlike shlex.quote no comma stays bare, which shellcheck takes for a mistake."""
    return text if re.fullmatch(r"[\w./:=@-]+", text, re.ASCII) else "'" + text.replace("'", "'\"'\"'") + "'"


def _joined(words: Sequence[str]) -> str:
    return " ".join(map(_quoted, words))


def _settings(run: RunConfig, nodes: int, directory: Path, workdir: Path) -> Iterator[str]:
    slurm = run.slurm
    python = slurm.python or ("python3" if slurm.container_image else sys.executable)
    yield f"run_dir={_quoted(run.directory)}"
    yield f"code_dir={_quoted(str(directory / 'code'))}"
    yield f"setup={_quoted(str(Path(slurm.setup).absolute()) if slurm.setup else '')}"
    yield f"python={_quoted(python)}"
    yield f"ranks_per_node={run.world_size // nodes}"
    yield f"train_iters={run.training.train_iters}"
    yield f"max_failures={slurm.max_failures}"
    train = ["-m", "megatron_attn2d.cli", "train", str(directory / "config.yaml")]
    yield f"train=({_joined(train)})"
    # One task per node takes all its cores; when one node fails the others end too. Whatever the job itself was given
    # of the environment, its tasks need PYTHONPATH.
    srun = ["--export=ALL", "--kill-on-bad-exit=1", "--cpu-bind=none", "--unbuffered"]
    yield f"srun_options=({_joined([*srun, *_container(run, workdir)])})"


def _container(run: RunConfig, workdir: Path) -> list[str]:
    image = run.slurm.container_image
    if not image:
        return []
    paths = dict.fromkeys([str(workdir), run.directory])
    for path in paths:
        if set(path) & set(",:"):
            raise ConfigError("slurm.container_image", image, f"{path} holds , or : and can't be mounted", "rename it")
    mounts = [f"{path}:{path}" for path in paths] + run.slurm.container_mounts
    for mount in run.slurm.container_mounts:
        if "," in mount or not 1 <= mount.count(":") <= 2:
            raise ConfigError("slurm.container_mounts", mount, "not a mount", "write SOURCE:TARGET or SOURCE:TARGET:ro")
    return [f"--container-image={image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={workdir}"]


def write_job(run: RunConfig, script: str, directory: Path) -> None:
    """Write the batch file, the resolved configuration and this package's code into the new `directory`.

    Raises:
        ConfigError: `run.dir` can't be written to.
    """
    package = Path(str(resources.files("megatron_attn2d")))
    try:
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(resolved_yaml(run))
        shutil.copytree(package, directory / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        (directory / "job.sbatch").write_text(script)
    except OSError as error:
        reason = f"can't be written to ({error.strerror or error})"
        raise ConfigError("run.dir", run.directory, reason, "choose another") from error
