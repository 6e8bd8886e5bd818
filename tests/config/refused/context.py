"""Context parallelism: modes, grids, tiles and groups of heads."""

REFUSED = {
    "training.seq_length=252": (
        "training.seq_length = 252: not a multiple of 2 * context_parallel.size = 8, the chunks of the zigzag; "
        "choose 248 or 256"
    ),
    "context_parallel.grid=[2, 3]": (
        "context_parallel.grid = [2, 3]: 6 ranks, but context_parallel.size is 4; "
        "choose auto or one of [4, 1], [2, 2], [1, 4]"
    ),
    "context_parallel.mode=ring context_parallel.grid=[2, 2]": (
        "context_parallel.grid = [2, 2]: context_parallel.mode = ring has no grid; choose auto"
    ),
    "context_parallel.mode=ulysses model.num_attention_heads=6 model.hidden_size=48": (
        "context_parallel.size = 4: 6 query and 6 key/value heads per tensor rank do not spread over 4 ranks; "
        "spread them over one of 1, 2, 3, 6"
    ),
    "context_parallel.grid=[2, 2] context_parallel.tile=[2, 4]": (
        "context_parallel.tile = [2, 4]: does not fill the grid of 2 rows x 2 columns; "
        "rows: one of 1, 2; columns: one of 1, 2"
    ),
    "context_parallel.layer_modes=[attention2d, ring]": (
        "context_parallel.layer_modes = ['attention2d', 'ring']: names 2 layers, but model.num_layers is 4; name ..."
    ),
    "context_parallel.layer_modes=[ring, ring, ring, ulysses]": (
        "context_parallel.mode = 'attention2d': is the mode of no layer in context_parallel.layer_modes; choose one ..."
    ),
    "context_parallel.mode=ring context_parallel.layer_modes=[ring, attention2d, ring, ring]": (
        "context_parallel.mode = 'ring': context_parallel.layer_modes has attention2d; choose attention2d"
    ),
    "context_parallel.layer_modes=[attention2d,ulysses,ring,ring] model.num_attention_heads=6 model.hidden_size=48": (
        "context_parallel.size = 4: 6 query and 6 key/value heads per tensor rank do not spread over 4 ranks; ..."
    ),
    "context_parallel.mode=ring context_parallel.tile=[1, 1]": (
        "context_parallel.tile = [1, 1]: context_parallel.mode = ring has no grid; choose null"
    ),
    "context_parallel.head_groups=3": (
        "context_parallel.head_groups = 3: does not divide the 4 key/value heads of a tensor rank; "
        "choose auto or one of 1, 2, 4"
    ),
    "context_parallel.grid=[4,1,1] model.num_attention_heads=12 model.num_query_groups=3 model.hidden_size=96": (
        "context_parallel.grid = [4, 1, 1]: 12 query and 3 key/value heads per tensor rank do not spread over 4 ranks; "
        "spread them over one of 1, 3"
    ),
    "context_parallel.mode=ring context_parallel.grid=auto context_parallel.tile=[3,1]": (
        "context_parallel.tile = [3, 1]: context_parallel.mode = ring has no grid; choose null"
    ),
}
