"""The run's model on this rank, asked for the logits of given tokens at given positions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_attn2d.inference.cache import Cache
from megatron_attn2d.inference.latent import Latent
from megatron_attn2d.megatron.core_attention import ContextParallelAttention
from megatron_attn2d.megatron.upstream.graph_environment import graph_fault
from megatron_attn2d.training import session


class Model:
    """A stage of the model, whose attention is to a cache.

    Attributes:
        context_group: the context-parallel ranks; None for one.
        last: whether this rank's stage gives logits.
        device: of its parameters.
        layers: the attention of this rank's layers.
        latents: of those with latent attention, by the layer's number.
        graphs: CUDA graphs of it, to be let go of before the ranks' groups end.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Takes Megatron's model chunks of this rank; they are no longer fit for training.

        Raises:
            ValueError: a layer keeps what is no keys and values, or positions are not served.
        """
        (self._chunk,) = chunks
        self._chunk.eval()
        self.context_group = mpu.get_context_parallel_group() if mpu.get_context_parallel_world_size() > 1 else None
        self.last = mpu.is_pipeline_last_stage(ignore_virtual=True)
        self.device = next(self._chunk.parameters()).device
        self.layers = [module for module in self._chunk.modules() if isinstance(module, ContextParallelAttention)]
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.latents: dict[int, Latent] = {}
        self._positions: Tensor | None = None
        self._rows: Tensor | None = None
        _check_layers(self._chunk)
        for module in self._chunk.modules():
            if isinstance(module, MLASelfAttention):
                self.latents[module.layer_number] = Latent(module)
            if isinstance(module, RotaryEmbedding | YarnRotaryEmbedding):
                self._follow_positions(module)
        if self.last:
            unwrap_model(self._chunk).output_layer.register_forward_pre_hook(self._narrow)

    @classmethod
    def built(cls) -> Model:
        """Inside Megatron: the model of its arguments, with the weights of their checkpoint."""
        if graph_fault(os.environ):
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        _, chunks = session.set_up_model()
        return cls(chunks)

    @property
    def replica(self) -> tuple[int, int]:
        """This rank's replica, and how many there are."""
        return mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()

    @property
    def bytes_per_token(self) -> int:
        """Of one token's keys and values, in all layers of this rank."""
        return sum(map(self.layer_bytes, self.layers))

    def layer_bytes(self, layer: ContextParallelAttention) -> int:
        """What a layer keeps of one token."""
        latent = self.latents.get(layer.layer_number)
        numbers = layer.kept_heads * sum(layer.head_dims) if latent is None else latent.width
        return numbers * layer.config.params_dtype.itemsize

    def new_cache(self, sequences: int, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens of each sequence on this rank."""
        return Cache(sequences, capacity, self.context_group, self.device, self.latents)

    @property
    def graph_refusal(self) -> str | None:
        """Why a pass over single tokens can't be captured as a CUDA graph; None if it can."""
        if self.device.type != "cuda":
            return "needs a CUDA device"
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            return "pipeline stages send to each other outside of it"
        if fault := graph_fault(os.environ):
            return fault[0]
        if self.layers and self.layers[0].config.num_moe_experts:
            return "experts wait for how many tokens each of them gets"
        return None

    def close(self) -> None:
        """Lets go of the graphs: the groups that they hold can't end before."""
        if self.graphs:
            torch.cuda.synchronize()
        while self.graphs:
            self.graphs.pop().reset()

    @property
    def weight_bytes(self) -> int:
        """Of this rank's parameters."""
        return sum(weight.numel() * weight.element_size() for weight in self._chunk.parameters())

    def free_bytes(self) -> int:
        """Memory that a cache could take on each rank of the replica; all of them call, and get the same."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        else:
            free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self._over_replica(free, dist.ReduceOp.MIN)

    def largest(self, value: int) -> int:
        """The largest `value` of the ranks of the replica; all of them call, and get the same."""
        return self._over_replica(value, dist.ReduceOp.MAX)

    def _over_replica(self, value: int, op: Any) -> int:
        found = torch.tensor(value, dtype=torch.long, device=self.device)
        for group in (
            mpu.get_context_parallel_group(),
            mpu.get_tensor_model_parallel_group(),
            mpu.get_pipeline_model_parallel_group(),
        ):
            if group.size() > 1:
                dist.all_reduce(found, op, group=group)
        return int(found)

    @torch.no_grad()
    def logits(self, cache: Cache, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor | None:
        """Runs tokens [t] at `positions` [t] through the model, in the pass that `cache` has begun.

        Every rank of the replica calls it.

        Returns:
            fp32 logits of `rows` of them, [rows, padded vocabulary]; None on all stages but the last.
        """
        self._positions, self._rows = positions, rows
        inputs = tokens[None], positions[None], None
        with self._attending(cache):
            if mpu.get_pipeline_model_parallel_world_size() == 1:
                found = self._chunk(*inputs)
            else:
                found = self._through_stages(inputs, tokens.numel() * cache.ranks)
        return gather_from_tensor_model_parallel_region(found)[0].float() if self.last else None

    @contextmanager
    def _attending(self, cache: Cache) -> Iterator[None]:
        """While entered the layers attend to `cache`; afterwards they hold it no longer, so that it may be freed."""
        for layer in self.layers:
            layer.cache = cache
        try:
            yield
        finally:
            for layer in self.layers:
                layer.cache = None

    def _through_stages(self, inputs: tuple[Any, ...], tokens: int) -> Tensor | None:
        found = []

        def collect(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            found.append(output)
            return output.sum(), torch.tensor(1, dtype=torch.int, device=output.device), {}

        get_forward_backward_func()(
            forward_step_func=lambda iterator, model: (model(*inputs), collect),
            data_iterator=None,
            model=[self._chunk],
            num_microbatches=1,
            seq_length=tokens,
            micro_batch_size=1,
            forward_only=True,
        )
        return found[0] if self.last else None

    def broadcast(self, x: Tensor) -> Tensor:
        """`x` as the last stage's first context rank has it, in place, on all ranks of the replica but tensor ones.

        Tensor ranks compute the same numbers anyhow. Context ranks need not, to the last bit.
        """
        if self.last and self.context_group is not None:
            dist.broadcast(x, dist.get_process_group_ranks(self.context_group)[0], group=self.context_group)
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            dist.broadcast(
                x, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
            )
        return x

    def last_logits(self, rows: Sequence[Tensor | None]) -> Tensor:
        """Logits of each sequence's last token, of which one context rank has each, on all of them: [B, vocabulary]."""
        width = unwrap_model(self._chunk).output_layer.output_size
        found = torch.zeros(len(rows), width, device=self.device)
        for i, row in enumerate(rows):
            if row is not None:
                found[i] = row
        return self.sum_over_context(found)

    def sum_over_context(self, x: Tensor) -> Tensor:
        """The sum of `x` over the context ranks, in place."""
        if self.context_group is not None:
            dist.all_reduce(x, group=self.context_group)
        return x

    def of_all_replicas(self, found: dict[int, Any]) -> dict[int, Any]:
        """What the replicas found, together."""
        replicas = mpu.get_data_parallel_world_size()
        if replicas == 1:
            return found
        parts: list[Any] = [None] * replicas
        dist.all_gather_object(parts, found, group=mpu.get_data_parallel_group())
        return {place: one for part in parts for place, one in part.items()}

    def _narrow(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the output layer: only the rows whose logits are asked for."""
        return (inputs[0][self._rows], *inputs[1:])

    def _follow_positions(self, module: torch.nn.Module) -> None:
        """Makes `module` give the angles of this pass's positions, where upstream slices 0, 1, 2, ... by rank."""
        scaled = isinstance(module, YarnRotaryEmbedding)
        found: Any = module.get_emb(2)  # type: ignore[operator]
        angles, scale = found if scaled else (found, None)
        unit = angles[1, 0, 0].to(self.device)  # of position 1: angles grow with the position in proportion

        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._positions is not None
            turned = (self._positions.to(unit.dtype)[:, None] * unit)[:, None, None]
            return (turned, scale) if scaled else turned

        module.forward = forward


def _check_layers(chunk: torch.nn.Module) -> None:
    for module in chunk.modules():
        attention = getattr(module, "core_attention", None)
        if attention is not None and not isinstance(attention, ContextParallelAttention):
            raise ValueError(f"generation: {type(attention).__name__} keeps no keys and values that could be spread")
        if isinstance(module, MultimodalRotaryEmbedding):
            raise ValueError("generation: position_embedding_type mrope is not supported; choose rope, yarn, learned")
        if type(module).__name__ in ("MambaMixer", "GatedDeltaNet"):
            raise ValueError(
                f"generation: layers of {type(module).__name__} keep a state, which is not supported; of "
                "hybrid_layer_pattern only attention (*), MLP (-) and experts (E) are"
            )
