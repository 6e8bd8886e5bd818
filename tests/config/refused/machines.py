"""Machines and ranks."""

REFUSED = {
    "environment.gpus_per_node=8": "environment.gpus_per_node = 8: environment.device = cpu has no GPUs; choose null",
    "environment.nodes=2": "environment.nodes = 2: CPU ranks run on one machine; choose 1",
    "environment.device=cuda environment.nodes=2": (
        "environment.nodes = 2: environment.gpus_per_node is not given; set that too, or leave out both"
    ),
    "environment.device=cuda environment.gpus_per_node=6": (
        "world size = 6: not a multiple of tensor * pipeline * context = 1 * 2 * 4 = 8 ranks; "
        "choose 8 ranks, or other sizes"
    ),
    "environment.device=cuda environment.gpus_per_node=8 parallelism.data=2": (
        "parallelism.data = 2: with 8 ranks per replica that is 16 ranks, but there are 8; "
        "choose 1, or null to derive it"
    ),
}
