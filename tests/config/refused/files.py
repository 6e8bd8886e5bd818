"""What is wrong with files: with the content of a run's own, and with others that the run names."""

CONTENTS = {
    "model: {num_layers: 4": "line 1, column 22: not valid YAML",
    "model:\n  num_layers: 4\n  num_layers: 8\n": "line 3, column 3: not valid YAML: the key 'num_layers' occurs twice",
    "a: &x [1]\nb: *x\n": "line 1, column 4: not valid YAML: anchors and aliases are not supported",
    "a: &x [*x]": "not valid YAML: anchors and aliases are not supported",
    "a: !!python/object/apply:os.system ['touch pwned']": "could not determine a constructor for the tag",
    "a: 1\n---\nb: 2\n": "not valid YAML: but found another document",
    "- 1\n": "must hold a mapping of sections",
    "4\n": "must hold a mapping of sections",
    "1: 2\n": "not valid YAML: a key must be a plain name",
    "? [a, b]\n: 2\n": "not valid YAML: a key must be a plain name",
    "a: " + "[" * 3000: "not valid YAML: nested too deeply",
    "a: \x07": "not valid YAML",
    "extends: 4\nmodel: {}": "extends = 4: in ",
    "extends: [1]": "not a list of files; write [models/gpt.yaml, ...]",
    "extends: missing.yaml": "missing.yaml: No such file or directory; there are ",
    "extends: run.yaml": "files extend each other in a circle (run.yaml -> run.yaml); break the circle",
    "{}": "model: missing; every run needs it",
    "model.num_layers: 4\n": "model.num_layers: unknown key; write num_layers below model:",
}
"""What a run's file holds -> a part of the message."""

ABSENT = {
    "data.paths=[nowhere]": "data.paths = 'nowhere': nowhere.bin and nowhere.idx are not both there; build it: ...",
    "data.paths={nowhere: 0.5}": "data.paths = 'nowhere': nowhere.bin and nowhere.idx are not both there; ...",
    "data.mock=true data.tokenizer_type=SentencePieceTokenizer data.tokenizer_model=nowhere": (
        "data.tokenizer_model = 'nowhere': there is no such file or folder; name one on local disk"
    ),
    "data.mock=true checkpoint.load=nowhere": (
        "checkpoint.load = 'nowhere': there is no checkpoint in it, as it holds no latest_checkpointed_iteration.txt; "
        "name the folder that another run saves to, or null"
    ),
    "data.mock=true run.dir=/proc/run": "run.dir = '/proc/run': can't be made a directory (...",
    "data.mock=true run.dir=run.yaml": "run.dir = 'run.yaml': can't be made a directory (File exists); choose another",
    "data.dir=run.yaml/data": "data.dir = 'run.yaml/data': can't be made a directory (Not a directory); ...",
}
"""What only the files of this machine tell: overrides of BASE -> the message."""
