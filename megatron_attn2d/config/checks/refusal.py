"""The form in which a check refuses a key."""

Refusal = tuple[str, str, str]
"""The key "section.name", the reason and a valid choice."""


def divisors(number: int, limit: int = 8) -> str:
    """The largest `limit` divisors of `number`, ascending, as text: '1, 2, 4'."""
    found = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(map(str, found[-limit:]))
