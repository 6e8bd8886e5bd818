"""Checks of what must fit together in a run, a file per subject; `config/check.py` runs all of them."""
