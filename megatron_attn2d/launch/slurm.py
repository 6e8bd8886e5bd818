"""Writes a run's batch file for Slurm into the run's directory, with a snapshot of code and configuration.

Users choose names and paths. Whatever these hold, they are quoted for the shell, and escaped for sbatch's own parser.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from megatron_attn2d.config import ConfigError, RunConfig, resolved_yaml

_OURS = (
    *("job-name", "nodes", "ntasks-per-node", "signal", "requeue", "no-requeue", "open-mode", "output", "error"),
    *("chdir", "ntasks", "array", "wrap", "parsable", "test-only"),
)
"""Options of sbatch that the batch file itself sets or depends on."""
_OURS_OF_SRUN = (
    *("nodes", "ntasks", "ntasks-per-node", "export", "kill-on-bad-exit", "multi-prog", "pty"),
    *("container-image", "container-mounts", "container-workdir"),  # keys slurm.container_* set these
)
"""Options of srun that the batch file itself sets or depends on."""
_EARLY_S = 60
"""Seconds by which Slurm may send `--signal` too early, by sbatch's manual."""


def check(run: RunConfig) -> None:
    """Refuse keys with which a job can't be queued again, and options that contradict the batch file.

    Raises:
        ConfigError: there is such a key or option; names it.
    """
    if not run.checkpoint.save or not run.checkpoint.exit_signal_handler:
        key = "checkpoint.exit_signal_handler" if run.checkpoint.save else "checkpoint.save"
        raise ConfigError(key, False, "a job that is queued again continues from its checkpoint", "choose true")
    if run.training.exit_interval:
        reason = "a job goes on until training.train_iters"
        raise ConfigError("training.exit_interval", run.training.exit_interval, reason, "choose null")
    for key, options, ours in (("sbatch", run.slurm.sbatch, _OURS), ("srun", run.slurm.srun, _OURS_OF_SRUN)):
        for option, value in options.items():
            _check_option(f"slurm.{key}.{option}", option, value, ours)
    _check_limits(run)
    dependency = run.slurm.sbatch.get("dependency")
    if isinstance(dependency, str) and "?" in dependency:
        reason = "with ? one of them is enough, but this run's other jobs must always have ended"
        raise ConfigError("slurm.sbatch.dependency", dependency, reason, "separate them by ,")
    if not run.slurm.container_image:
        for key, unset in (("container_mounts", []), ("container_runtime", "pyxis")):
            if (value := getattr(run.slurm, key)) != unset:
                raise ConfigError(
                    f"slurm.{key}", value, "there is no container", f"choose {unset}, or name slurm.container_image"
                )


def _check_option(key: str, option: str, value: str | int | bool | None, ours: Collection[str]) -> None:
    """Raise ConfigError if `ours` holds an option, or if its name or value can't stand in the batch file."""
    if option in ours:
        raise ConfigError(key, value, "the batch file rests on this option", "leave it out")
    if len(option) == 1:
        raise ConfigError(key, value, "not the long name of an option", "write its long name")
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError(key, value, "holds a line break", "write it on one line")


def _check_limits(run: RunConfig) -> None:
    """Raise ConfigError if a time limit leaves no time to train before the ranks are told to save."""
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


def check_setup(run: RunConfig) -> None:
    """Raise ConfigError if bash can't read or parse `slurm.setup`; the job would fail only after its wait."""
    setup = run.slurm.setup
    if setup is None:
        return
    if not Path(setup).is_file():
        raise ConfigError("slurm.setup", setup, "there is no such file", "name one that the nodes see too, or null")
    parsed = subprocess.run(["bash", "-n", str(Path(setup).absolute())], capture_output=True, text=True)
    if parsed.returncode:
        raise ConfigError("slurm.setup", setup, f"bash can't read it ({parsed.stderr.strip()})", "correct it")


def nodes_for(run: RunConfig) -> int:
    """The fewest nodes of `environment.gpus_per_node` GPUs that hold the ranks of `run`.

    The ranks are tensor * pipeline * context for each of `parallelism.data` replicas, or for one replica.
    """
    assert run.environment.gpus_per_node
    return -(-run.model_ranks * (run.parallelism.data or 1) // run.environment.gpus_per_node)


def _seconds(limit: object) -> int | None:
    """Seconds of a time limit, as sbatch reads it; None: no limit.

    Forms are minutes[:seconds], hours:minutes:seconds and days-hours[:minutes[:seconds]].
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(limit))
    if found is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None or third is not None:
        hours, minutes, seconds = first or 0, second or 0, third or 0
    else:
        hours, minutes, seconds = 0, first or 0, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None  # 0 is no limit


def render(run: RunConfig, nodes: int, directory: Path, workdir: Path) -> str:
    """The text of the batch file.

    Args:
        run: the run, with an absolute directory.
        nodes: number of nodes.
        directory: holds the snapshot of code and configuration.
        workdir: the folder in which the job runs.

    Raises:
        ConfigError: a path can't be mounted into a container.
    """
    options = "\n".join(f"#SBATCH --{name}{value}" for name, value in _sbatch_options(run, nodes, workdir))
    settings = "\n".join(_settings(run, nodes, directory, workdir))
    template = resources.files("megatron_attn2d.launch").joinpath("job.sbatch").read_text()
    return template.replace("#@OPTIONS@", options).replace("#@SETTINGS@", settings)


def _sbatch_options(run: RunConfig, nodes: int, workdir: Path) -> Iterator[tuple[str, str]]:
    defaults: dict[str, str | int | bool | None] = {
        "job-name": run.run.name,
        "dependency": "singleton",  # two jobs of one run would write the same checkpoints
        "nodes": nodes,
        "ntasks-per-node": 1,
        "exclusive": True,
        "mem": 0,  # all memory of a node
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
    for name, value in _given(defaults | given):
        yield name, f"={_escaped(value[1:])}" if value else ""


def _given(options: Mapping[str, str | int | bool | None]) -> Iterator[tuple[str, str]]:
    """Yields name and =VALUE of each option that is given; '' in the place of =VALUE for one without a value."""
    for name, value in options.items():
        if value is not None and value is not False:
            yield name, "" if value is True else f"={value}"


def _escaped(text: str) -> str:
    """`text`, escaped for a line of #SBATCH, whose parser takes a backslash and a character for that character."""
    return re.sub(r"([^A-Za-z0-9/._=,:;@%+*\[\]-])", r"\\\1", text)


def _quoted(text: str) -> str:
    """`text`, quoted for the shell; unlike shlex.quote also a comma, which shellcheck takes for a mistake if bare."""
    return text if re.fullmatch(r"[\w./:=@-]+", text, re.ASCII) else "'" + text.replace("'", "'\"'\"'") + "'"


def _joined(words: Sequence[str]) -> str:
    return " ".join(map(_quoted, words))


def _settings(run: RunConfig, nodes: int, directory: Path, workdir: Path) -> Iterator[str]:
    slurm = run.slurm
    python = slurm.python or ("python3" if slurm.container_image else sys.executable)
    of_srun, wrapper = _container(run, workdir)
    yield f"run_dir={_quoted(run.directory)}"
    yield f"code_dir={_quoted(str(directory / 'code'))}"
    yield f"setup={_quoted(str(Path(slurm.setup).absolute()) if slurm.setup else '')}"
    yield f"python=({_joined([*wrapper, python])})"
    yield f"ranks_per_node={run.world_size // nodes}"
    yield f"train_iters={run.training.train_iters}"
    yield f"max_failures={slurm.max_failures}"
    train = ["-m", "megatron_attn2d.cli", "train", str(directory / "config.yaml")]
    yield f"train=({_joined(train)})"
    # One task per node takes all its cores, and when one node fails the others end too. Tasks get the environment, as
    # they need PYTHONPATH, even where the job itself was given none.
    ours: dict[str, str | int | bool | None] = {"export": "ALL", "kill-on-bad-exit": 1}
    ours |= {"cpu-bind": "none", "unbuffered": True}
    srun = [f"--{name}{value}" for name, value in _given(ours | slurm.srun)]
    yield f"srun_options=({_joined([*srun, *of_srun])})"


def _container(run: RunConfig, workdir: Path) -> tuple[list[str], list[str]]:
    """Options of Pyxis for srun, and the command that runs the interpreter in a container of another runtime."""
    image = run.slurm.container_image
    if not image:
        return [], []
    paths = dict.fromkeys([str(workdir), run.directory])
    for path in paths:
        if set(path) & set(",:"):
            raise ConfigError("slurm.container_image", image, f"{path} holds , or : and can't be mounted", "rename it")
    mounts = [f"{path}:{path}" for path in paths] + run.slurm.container_mounts
    for mount in run.slurm.container_mounts:
        if "," in mount or not 1 <= mount.count(":") <= 2:
            raise ConfigError("slurm.container_mounts", mount, "not a mount", "write SOURCE:TARGET or SOURCE:TARGET:ro")
    bound = ",".join(mounts)
    if run.slurm.container_runtime == "pyxis":
        return [f"--container-image={image}", f"--container-mounts={bound}", f"--container-workdir={workdir}"], []
    gpus = ["--nv"] if run.environment.device == "cuda" else []
    return [], [run.slurm.container_runtime, "exec", *gpus, "--bind", bound, "--pwd", str(workdir), image]


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
