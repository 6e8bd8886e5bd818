"""Checks that CUDA graphs can hold what a run asks for."""

from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.schema import GRAPH_IMPLEMENTATIONS, RunConfig
from megatron_attn2d.megatron.upstream.graph_environment import graph_fault


def check_graphs(run: RunConfig) -> Iterator[Refusal]:
    """Refuse beside CUDA graphs what waits for the GPU or changes between steps; nothing without graphs."""
    training, graphs, implementation = run.training, run.training.cuda_graphs, run.graph_implementation
    if implementation == "none":
        return
    if graphs == "none":
        chosen = {one: name for name, one in GRAPH_IMPLEMENTATIONS.items()}.get(implementation, "layer")
        yield "training.cuda_graphs", f"megatron_args.cuda_graph_impl is {implementation}", f"choose {chosen}"
    if run.environment.device == "cpu":
        yield "training.cuda_graphs", "environment.device = cpu has no CUDA graphs", "choose none"
    if fault := graph_fault({"NCCL_GRAPH_REGISTER": "0", **{k: str(v) for k, v in run.environment.variables.items()}}):
        yield "environment.variables", *fault
    if run.logging.attention_communication:
        reason = f"it measures by the CPU's calls, of which training.cuda_graphs = {graphs} makes none"
        yield "logging.attention_communication", reason, "choose false, or training.cuda_graphs=none"
    if training.check_finite:
        reason = f"it waits for the GPU in each layer, which training.cuda_graphs = {graphs} cannot"
        yield "training.check_finite", reason, "choose false, or training.cuda_graphs=none"
    yield from _check_iteration(run) if implementation == "full_iteration" else _check_layers(run)


def _check_iteration(run: RunConfig) -> Iterator[Refusal]:
    """Refusals for one graph of all passes of a step."""
    graphs = run.training.cuda_graphs
    if run.training.precision == "fp16":
        reason = f"the scale of the loss would stay as training.cuda_graphs = {graphs} has captured it"
        yield "training.precision", reason, "choose bf16, or training.cuda_graphs=layer"
    if run.logging.timing_log_level:
        reason = f"timers wait for the GPU, which training.cuda_graphs = {graphs} cannot"
        yield "logging.timing_log_level", reason, "choose 0, or training.cuda_graphs=layer"


def _check_layers(run: RunConfig) -> Iterator[Refusal]:
    """Refusals for a graph per layer, or per layer's attention."""
    model, training, given = run.model, run.training, run.megatron_args
    graphs, implementation = training.cuda_graphs, run.graph_implementation
    if implementation == "transformer_engine" and model.rope_scaling == "yarn":
        reason = f"Megatron gives graphs (training.cuda_graphs = {graphs}) no angles of yarn: nothing would be rotated"
        yield "model.rope_scaling", reason, "choose another, or training.cuda_graphs=layer"
    if implementation == "transformer_engine" and training.precision != "bf16":
        reason = f"Megatron captures training.cuda_graphs = {graphs} in bf16"
        yield "training.precision", reason, "choose bf16, or training.cuda_graphs=layer"
    if training.recompute_granularity == "full":
        reason = f"a layer's graph (training.cuda_graphs = {graphs}) can't be recomputed as a whole"
        yield "training.recompute_granularity", reason, "choose selective, or training.cuda_graphs=iteration"
    if training.recompute_granularity == "selective" and model.attention_dropout:
        yield (
            "training.recompute_granularity",
            f"attention with dropout can't be recomputed in a graph (training.cuda_graphs = {graphs})",
            "choose null, or model.attention_dropout=0.0",
        )
    if graphs == "layer" and given.get("num_experts") and not given.get("moe_pad_expert_input_to_capacity"):
        yield "training.cuda_graphs", "how many tokens an expert gets is known to the CPU alone", "choose attention"
    if implementation == "local" and training.eval_iters and (model.attention_dropout or model.hidden_dropout):
        yield (
            "training.eval_iters",
            f"validation would replay graphs that drop as in training (training.cuda_graphs = {graphs})",
            "choose 0, or megatron_args.cuda_graph_impl=transformer_engine",
        )
