"""Keys and overrides that are written wrongly, and values of a wrong type."""

REFUSED = {
    # names
    "num_layers=4": "num_layers: unknown key; did you mean model.num_layers?",
    "modle.num_layers=4": "modle: unknown key; did you mean model?",
    "model.num_layer=4": "model.num_layer: unknown key; did you mean num_layers?",
    "model.seq_length=8": "model.seq_length: unknown key; did you mean training.seq_length?",
    "parallelism.context=8": "parallelism.context: unknown key; known: data, expert, pipeline, sequence_parallel, ...",
    "context_parallel.zzz=8": "context_parallel.zzz: unknown key; known: grid, head_groups, layer_modes, ...",
    # types
    "model.num_layers='4'": "model.num_layers = '4': not an integer; write 8, without quotes or a decimal point",
    "model.num_layers=4.0": "model.num_layers = 4.0: not an integer; ...",
    "model.num_layers=true": "model.num_layers = true: not an integer; ...",
    "model.num_layers=null": "model.num_layers = null: not an integer; ...",
    "model.num_layers=[4]": "model.num_layers = [4]: not an integer; ...",
    "model.num_layers=1_000": "model.num_layers = '1_000': not an integer; ...",
    "model.num_layers=0": "model.num_layers = 0: must be greater than 0",
    "training.train_iters=-1": "training.train_iters = -1: must be greater than 0",
    "model.swiglu=yes": "model.swiglu = 'yes': not a boolean; write true or false",
    "model.swiglu=1": "model.swiglu = 1: not a boolean; write true or false",
    "optimizer.lr='1e-4'": "optimizer.lr = '1e-4': not a number; write 0.1 or 1e-4, without quotes",
    "optimizer.lr=.inf": "optimizer.lr = inf: must be a finite number",
    "optimizer.lr=.nan": "optimizer.lr = nan: must be a finite number",
    "optimizer.lr=0": "optimizer.lr = 0: must be greater than 0",
    "optimizer.adam_beta2=1": "optimizer.adam_beta2 = 1: must be less than 1",
    "model.normalization=rmsnorm": "model.normalization = 'rmsnorm': no such choice; choose LayerNorm or RMSNorm",
    "training.precision=fp8": "training.precision = 'fp8': no such choice; choose fp32, bf16 or fp16",
    "context_parallel.mode=p2p": (
        "context_parallel.mode = 'p2p': no such choice; choose attention2d, ring, all_gather or ulysses"
    ),
    "context_parallel.mode=attention2d:2x1": (
        "context_parallel.mode = 'attention2d:2x1': a grid has a key of its own; "
        "write mode: attention2d and grid: [2, 1]"
    ),
    "context_parallel.grid=2x2": (
        "context_parallel.grid = '2x2': not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "context_parallel.grid=[4]": (
        "context_parallel.grid = [4]: not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "context_parallel.grid=[2, true]": (
        "context_parallel.grid = [2, True]: not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "context_parallel.grid=[-2, -2]": (
        "context_parallel.grid = [-2, -2]: not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "data.paths=corpus": (
        "data.paths = 'corpus': not a list of prefixes, nor a blend; write [prefix, ...] or {prefix: weight, ...}"
    ),
    "data.split=98 1 1": "data.split = '98 1 1': not three weights; write 98,1,1",
    "data.split='9.8.7,1,1'": "data.split = '9.8.7,1,1': not three numbers; write 98,1,1",
    "run.name=../x": (
        "run.name = '../x': holds characters that a name or path must not; use letters, digits and . _ + -"
    ),
    "run.name=$(id)": "run.name = '$(id)': holds characters that a name or path must not; ...",
    "run.dir=--save": "run.dir = '--save': holds characters that a name or path must not; ...",
    "environment.variables={A: [1]}": (
        "environment.variables = {'A': [1]}: not environment variables; write {NAME: \"value\", ...}"
    ),
    'environment.variables={A: "a\\0b"}': "environment.variables = {'A': 'a\\x00b'}: not environment variables; ...",
    "model=4": "model = 4: not a section; write its keys below model:",
    'environment.variables={RANK: "3"}': (
        "environment.variables = {'RANK': '3'}: RANK is the launcher's, different in each rank; leave out RANK"
    ),
    # overrides themselves
    "model.num_layers": "model.num_layers: not an override; write key.sub=value",
    "=4": "=4: not an override; write key.sub=value",
    "model..x=4": "model..x=4: not an override; write key.sub=value",
    "extends=other.yaml": "extends=other.yaml: extends belongs in a file; name the file there",
    "model.num_layers.x=1": (
        "model.num_layers.x=1: model.num_layers is a value, not a section; write model.num_layers=..."
    ),
    "data.paths=[a] data.paths.b=1": "data.paths.b=1: data.paths is a value, not a section; write data.paths=...",
    "data.paths=[a] data.paths+={b: 1}": (
        "data.paths+ = {'b': 1}: data.paths is a list so far; add the same kind, or replace it: data.paths"
    ),
    "model.num_layers+=[4]": "model.num_layers+ = [4]: model.num_layers is 4 so far; add the same kind, or ...",
    "model.num_layers+=4": (
        "model.num_layers+ = 4: not a list or a table, which alone can be added to; write model.num_layers"
    ),
    "data={paths: [a], paths+: [b]}": "data.paths = ['a']: is given with + and without; keep one",
    "model+={num_layers: 4}": "model+: unknown key; did you mean model?",
    "run={name:": "override 'run={name:', line 1, column 7: not valid YAML: ...",
}
