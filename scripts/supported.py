"""Print docs/supported.md's table of supported attention, from what the tests run: `python -m scripts.supported`."""

from tests.attention.support import table

if __name__ == "__main__":
    print(table())
