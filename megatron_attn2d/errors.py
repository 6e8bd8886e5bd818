"""What a user reads when a configuration is wrong."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A user's mistake: its message alone is shown, without a traceback."""


class ConfigError(UsageError):
    """A mistake in a configuration: names the key, its value, the reason and a valid choice."""

    def __init__(self, key: str, value: object = None, reason: str = "", choice: str = "", *, has_value: bool = True):
        """`has_value=False` leaves the value out, for keys that are themselves the mistake."""
        self.key = key
        head = f"{key} = {show(value)}" if has_value else key
        super().__init__(f"{head}: {reason}" + (f"; {choice}" if choice else ""))


class ConfigErrors(ConfigError):
    """Several mistakes of one configuration, a line each."""

    def __init__(self, errors: list[ConfigError]):
        """`errors` holds at least one."""
        self.key = errors[0].key
        ValueError.__init__(self, "\n".join(map(str, errors)))


def show(value: object) -> str:
    """`value` as it would stand in YAML, cut to a readable length."""
    text = (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?', or the known names when none is near."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        return f"did you mean {close[0]}?"
    return "known: " + ", ".join(names) if len(names) <= 40 else f"none of the {len(names)} known names is near"
