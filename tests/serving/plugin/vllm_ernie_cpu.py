"""Works around three bugs of vLLM 0.32 that keep ERNIE-4.5-VL from running on CPUs (not GPUs).

vLLM calls `register` in each of its processes, through the entry point in pyproject.toml.
"""

import copy
from typing import Any


def register() -> None:
    _rotary_embedding()
    _router_with_bias()
    _experts_under_lora()


def _rotary_embedding() -> None:
    """The model's rotary embedding has a native and a CUDA path, and is asked for a CPU's."""
    from vllm.model_executor.layers.rotary_embedding import ernie45_vl_rope

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None, *_: Any) -> Any:
        return self.forward_native(positions, query, key)

    ernie45_vl_rope.Ernie4_5_VLRotaryEmbedding.forward_cpu = forward_cpu


def _router_with_bias() -> None:
    """The CPU's router leaves out the correction bias where experts form no groups."""
    import torch
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    original = cpu_router.CPURouter._compute_routing

    def routing(
        self: Any, hidden: Any, logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        bias = self.e_score_correction_bias
        softmax = self.scoring_func == "softmax" and self.custom_routing_function is None
        if bias is None or self.use_grouped_topk or not softmax:
            return original(self, hidden, logits, indices_type, input_ids=input_ids)
        scores = torch.softmax(logits.float(), -1)  # (tokens, experts)
        chosen = torch.topk(scores + bias.float(), self.top_k, -1).indices  # (tokens, top_k)
        weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.contiguous(), chosen.to(torch.int32).contiguous()

    cpu_router.CPURouter._compute_routing = routing


def _experts_under_lora() -> None:
    """With LoRA on, no expert kernel for a CPU is found, though experts carry no adapter."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.oracle import unquantized as oracle

    original = oracle.select_unquantized_moe_backend

    def select(moe_config: Any) -> Any:
        without = copy.copy(moe_config)
        object.__setattr__(without, "is_lora_enabled", False)
        return original(without)

    oracle.select_unquantized_moe_backend = select
    method.select_unquantized_moe_backend = select
