"""CUDA graphs."""

REFUSED = {
    "training.cuda_graphs=layer": (
        "training.cuda_graphs = 'layer': environment.device = cpu has no CUDA graphs; choose none"
    ),
    "environment.device=cuda megatron_args.cuda_graph_impl=full_iteration": (
        "training.cuda_graphs = 'none': megatron_args.cuda_graph_impl is full_iteration; choose iteration"
    ),
    "megatron_args.external_cuda_graph=true": (
        "megatron_args.external_cuda_graph = true: training.cuda_graphs decides about --external-cuda-graph; ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer environment.variables="
    "{NCCL_GRAPH_REGISTER: 1, PYTORCH_CUDA_ALLOC_CONF: 'expandable_segments:True'}": (
        "environment.variables = {'NCCL_GRAPH_REGISTER': 1, 'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:Tr...: "
        "NCCL_GRAPH_REGISTER='1': NCCL would register the buffers of messages in CUDA graphs, which "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True does not allow; choose NCCL_GRAPH_REGISTER=0, or leave "
        "expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF"
    ),
    "environment.device=cuda training.cuda_graphs=layer logging.attention_communication=true": (
        "logging.attention_communication = true: it measures by the CPU's calls, of which ..."
    ),
    "environment.device=cuda training.cuda_graphs=attention": (
        "training.precision = 'fp32': Megatron captures training.cuda_graphs = attention in bf16; choose bf16, or "
        "training.cuda_graphs=layer"
    ),
    "environment.device=cuda training.cuda_graphs=iteration data.document_masking=true "
    "megatron_args.mtp_num_layers=1": (
        "training.cuda_graphs = 'iteration': megatron_args.mtp_num_layers would predict a neighbour's tokens where "
        "documents are bins, under data.document_masking; choose none"
    ),
    "environment.device=cuda training.precision=bf16 training.cuda_graphs=attention model.rope_scaling=yarn "
    "model.rope_scaling_factor=4 model.rope_original_length=64 model.position_embedding_type=rope": (
        "model.rope_scaling = 'yarn': Megatron gives graphs (training.cuda_graphs = attention) no angles of yarn: ..."
    ),
    "environment.device=cuda training.precision=bf16 training.cuda_graphs=attention training.check_finite=true": (
        "training.check_finite = true: it waits for the GPU in each layer, which training.cuda_graphs = attention ..."
    ),
    "environment.device=cuda training.cuda_graphs=iteration training.precision=fp16": (
        "training.precision = 'fp16': the scale of the loss would stay as training.cuda_graphs = iteration has ..."
    ),
    "environment.device=cuda training.cuda_graphs=iteration logging.timing_log_level=1": (
        "logging.timing_log_level = 1: timers wait for the GPU, which training.cuda_graphs = iteration cannot; ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer training.recompute_granularity=full "
    "training.recompute_method=uniform training.recompute_num_layers=1": (
        "training.recompute_granularity = 'full': a layer's graph (training.cuda_graphs = layer) can't be ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer training.recompute_granularity=selective "
    "model.attention_dropout=0.1": (
        "training.recompute_granularity = 'selective': attention with dropout can't be recomputed in a graph ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer megatron_args.num_experts=4": (
        "training.cuda_graphs = 'layer': how many tokens an expert gets is known to the CPU alone; choose attention"
    ),
    "environment.device=cuda training.cuda_graphs=layer training.eval_iters=1 data.mock=true data.paths=[] "
    "model.hidden_dropout=0.1": (
        "training.eval_iters = 1: validation would replay graphs that drop as in training ..."
    ),
}
