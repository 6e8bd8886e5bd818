"""What must fit together in a run, a file per subject; `config/check.py` asks all of them."""
