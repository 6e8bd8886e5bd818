"""Jobs of Slurm: a batch file for a run, in the run's directory, with a snapshot of code and configuration.

Names and paths come from users: whatever they hold, the shell sees them quoted, and sbatch's own parser escaped.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from megatron_attn2d.config import ConfigError, RunConfig, resolved_yaml

_OURS = (
    *("job-name", "nodes", "ntasks-per-node", "signal", "requeue", "no-requeue", "open-mode", "output", "error"),
    *("chdir", "ntasks", "array", "wrap", "parsable", "test-only"),
)
"""Options of sbatch on which the batch file rests."""
_OURS_OF_SRUN = (
    *("nodes", "ntasks", "ntasks-per-node", "export", "kill-on-bad-exit", "multi-prog", "pty"),
    *("container-image", "container-mounts", "container-workdir"),  # slurm.container_... say these
)
"""Options of srun on which the batch file rests."""
_EARLY_S = 60
"""By so much Slurm may send `--signal` too early, as sbatch's manual says."""


def check(run: RunConfig) -> None:
    """Refuses what a job that is queued again can't do, and options that contradict the batch file.

    Raises:
        ConfigError: names the key.
    """
    if not run.checkpoint.save or not run.checkpoint.exit_signal_handler:
        key = "checkpoint.exit_signal_handler" if run.checkpoint.save else "checkpoint.save"
        raise ConfigError(key, False, "a job that is queued again continues from its checkpoint", "choose true")
    if run.training.exit_interval:
        reason = "a job goes on until training.train_iters"
        raise ConfigError("training.exit_interval", run.training.exit_interval, reason, "choose null")
    for key, options, ours in (("sbatch", run.slurm.sbatch, _OURS), ("srun", run.slurm.srun, _OURS_OF_SRUN)):
        for option, value in options.items():
            if option in ours:
                reason = "the batch file rests on this option"
                raise ConfigError(f"slurm.{key}.{option}", value, reason, "leave it out")
            if len(option) == 1:
                raise ConfigError(f"slurm.{key}.{option}", value, "not the long name of an option", "write that")
            if isinstance(value, str) and not value.isprintable():
                raise ConfigError(f"slurm.{key}.{option}", value, "holds a line break", "write it on one line")
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
    if not run.slurm.container_image:
        for key, unset in (("container_mounts", []), ("container_runtime", "pyxis")):
            if (value := getattr(run.slurm, key)) != unset:
                raise ConfigError(
                    f"slurm.{key}", value, "there is no container", f"choose {unset}, or name slurm.container_image"
                )


def check_setup(run: RunConfig) -> None:
    """Raise ConfigError if bash can't read `slurm.setup`, or can't parse it: the job would find out after its wait."""
    setup = run.slurm.setup
    if setup is None:
        return
    if not Path(setup).is_file():
        raise ConfigError("slurm.setup", setup, "there is no such file", "name one that the nodes see too, or null")
    parsed = subprocess.run(["bash", "-n", str(Path(setup).absolute())], capture_output=True, text=True)
    if parsed.returncode:
        raise ConfigError("slurm.setup", setup, f"bash can't read it ({parsed.stderr.strip()})", "correct it")


def nodes_for(run: RunConfig) -> int:
    """The fewest nodes of `environment.gpus_per_node` GPUs that hold the ranks which `run` asks for.

    Those are tensor * pipeline * context ranks for each of `parallelism.data` replicas, or for one.
    """
    assert run.environment.gpus_per_node
    return -(-run.model_ranks * (run.parallelism.data or 1) // run.environment.gpus_per_node)


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


def render(run: RunConfig, nodes: int, directory: Path, workdir: Path) -> str:
    """The batch file for `run` on `nodes` nodes, started in `workdir`, whose snapshot lies in `directory`.

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
    for name, value in _given(defaults | given):
        yield name, f"={_escaped(value[1:])}" if value else ""


def _given(options: Mapping[str, str | int | bool | None]) -> Iterator[tuple[str, str]]:
    """Name and =VALUE of each option that is not left out; only its name where it takes no value."""
    for name, value in options.items():
        if value is not None and value is not False:
            yield name, "" if value is True else f"={value}"


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
    # One task per node takes all its cores; when one node fails the others end too. Whatever the job itself was given
    # of the environment, its tasks need PYTHONPATH.
    ours: dict[str, str | int | bool | None] = {"export": "ALL", "kill-on-bad-exit": 1}
    ours |= {"cpu-bind": "none", "unbuffered": True}
    srun = [f"--{name}{value}" for name, value in _given(ours | slurm.srun)]
    yield f"srun_options=({_joined([*srun, *of_srun])})"


def _container(run: RunConfig, workdir: Path) -> tuple[list[str], list[str]]:
    """Pyxis's options for srun, and the command that runs the interpreter in a container of another runtime."""
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
