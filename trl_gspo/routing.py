"""
Which experts a mixture of experts routed its tokens to, and how many of them differ between two policies.

The routers are heard by hooks during forwards that happen anyway: no forward, no gradient and no synchronisation with
the host is added. B sequences, T completion tokens, L layers with routed experts, K experts for each token.

What is compared is what the router itself chose, the one integer tensor among its outputs: a top-k over its logits
would be wrong where a bias corrects them or groups limit the choice (DeepSeek-V3, GLM, Kimi). transformers declares
its routers, and nearly all of its families return that tensor. Those that do not are refused by name, in the first
forward: DBRX, Doge, ERNIE-4.5-VL, JetMoe and Llama 4. Layers whose routing is a fixed table of token ids
(DeepSeek-V4) are none of the declared, and are left out. Older versions of transformers declare fewer: 5.2 has Qwen2,
Qwen3 and Qwen3.5 with their relatives, Mixtral, OLMoE, FlexOlmo, gpt-oss, MiniMax, PhiMoE and ERNIE-4.5.

Source: section 5.3 of GSPO, https://huggingface.co/papers/2507.18071, which finds about a tenth of the experts of a
48-layer model changed by one gradient update, and blames that for the instability of token-level ratios.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def find_routers(model: nn.Module) -> list[nn.Module]:
    """
    Routers of a model, in the order of its layers: what transformers declares as the source of `router_logits`.

    Args:
        model (`nn.Module`): of transformers, or one wrapped by PEFT, DDP, DeepSpeed or `torch.compile`.

    Raises:
        ValueError: if it has none: a dense model, or one whose routers transformers does not declare.
    """
    networks = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    classes = []
    for network in networks:
        declared = network.can_record_outputs.get("router_logits", [])
        # A class, or an `OutputRecorder` of one.
        classes += [getattr(it, "target_class", it) for it in (declared if isinstance(declared, list) else [declared])]
    classes = tuple(it for it in classes if isinstance(it, type))
    routers = [module for module in model.modules() if isinstance(module, classes)]
    if not routers:
        model_type = networks[0].config.model_type if networks else None
        raise ValueError(
            f"`log_expert_change=True` compares the experts that routers choose, and transformers declares no router "
            f"in this model (model type {model_type!r}): it is dense, or a mixture of experts of which only a later "
            "version declares them. Set `log_expert_change=False`."
        )
    return routers


class RoutingRecorder:
    """
    Records the experts that `routers` choose in the forwards under `with`.

    What runs outside adds nothing: not the forward that gradient checkpointing repeats in the backward, nor a
    reference model's. Routers that do not run are left out.

    ```python
    recorder = RoutingRecorder(find_routers(model))
    with recorder:
        model(input_ids)
    experts = recorder.experts(*input_ids.shape)
    ```

    A model under `torch.compile` is compiled once more for the forwards that are recorded; with gradient
    checkpointing too, its graph breaks at each layer that is checkpointed. Build the recorder before the first
    forward of such a model: hooks that come later are not in its graph.

    Args:
        routers (`Iterable[nn.Module]`): from [`find_routers`]. Each keeps a hook, idle outside `with`.
    """

    def __init__(self, routers: Iterable[nn.Module]):
        self._chosen: dict[nn.Module, list[Tensor]] = {}
        self._is_active = False
        # For good, not for each `with`: `torch.compile` has no eyes for hooks that come and go after its tracing.
        for router in routers:
            router.register_forward_hook(self._record)

    def __enter__(self) -> "RoutingRecorder":
        self._chosen = {}
        self._is_active = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self._is_active = False

    def _record(self, router: nn.Module, args: tuple, output: Any) -> None:
        if not self._is_active:
            return
        outputs = [value for value in output if isinstance(value, Tensor)] if isinstance(output, tuple) else []
        scores = [value for value in outputs if value.is_floating_point()]
        indices = [value for value in outputs if value.dtype in (torch.int64, torch.int32)]
        if len(indices) != 1 or not scores:
            raise ValueError(
                f"`log_expert_change=True` needs routers that return the indices of the experts they choose, and "
                f"{type(router).__name__} returns {len(indices)} integer tensors instead of one. Set "
                "`log_expert_change=False`."
            )
        # Among the scores are the logits, one for each expert: a bound of the index that costs no look at its values.
        dtype = torch.uint8 if max(value.size(-1) for value in scores) <= 256 else torch.int16
        self._chosen.setdefault(router, []).append(indices[0].flatten(0, -2).to(dtype))

    def experts(self, rows: int, length: int) -> Tensor:
        """
        Experts chosen in the forwards since `with` was entered; forgets them.

        Args:
            rows (`int`): sequences of the input, over all forwards: `B`, or 1 where several are packed into one.
            length (`int`): tokens of each, prompt and padding with them.

        Returns:
            `Tensor`: `(rows, length, L, K)`, uint8 up to 256 experts, else int16. The rows of later forwards follow
            those of earlier ones. At padding anything.

        Raises:
            ValueError: if no router ran, or not on `rows * length` tokens.
        """
        layers = [torch.cat(chosen) for chosen in self._chosen.values()]
        self._chosen = {}
        if not layers:
            raise ValueError(
                "`log_expert_change=True` heard from no router in this forward: the model bypasses them, as with a "
                "kernel that replaces the whole expert layer (`use_kernels=True`), or was compiled before they had "
                "their hooks. Set `log_expert_change=False`."
            )
        if {len(chosen) for chosen in layers} != {rows * length}:
            raise ValueError(
                f"`log_expert_change=True` needs the routing of each of {rows} x {length} tokens, and a router saw "
                f"{len(layers[0])}: sequences are split over processes or devices, or carry the virtual tokens of a "
                "prompt-learning adapter. Set `log_expert_change=False`."
            )
        return torch.stack(layers, dim=1).view(rows, length, len(layers), -1)


def changed_slots(experts: Tensor, old_experts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    How many of the experts that the old policy routed its tokens to, the new one no longer does.

        changed = sum_(i,t,l) m_it |E_old,itl \\ E_new,itl|,   total = sum_(i,t) m_it L K

    with `E` the K experts of a token in a layer, as a set: a layer sums over them, and their order is nothing to it.

    Args:
        experts (`Tensor`): `(B, T, L, K)`, integers, under the new policy. Different from each other along K.
        old_experts (`Tensor`): `(B, T, L, K)`, of the same tokens, under the policy that sampled.
        mask (`Tensor`): `(B, T)`, true on the tokens to count. Experts elsewhere may be anything.

    Returns:
        `tuple[Tensor, Tensor]`: `changed` and `total`, scalars, int64, on the device.

    Raises:
        ValueError: if the shapes do not fit. A silent broadcast would count, wrongly.
    """
    if experts.shape != old_experts.shape or experts.shape[:2] != mask.shape:
        raise ValueError(
            f"`experts` and `old_experts` must be (B, T, L, K) and `mask` (B, T), got {tuple(experts.shape)}, "
            f"{tuple(old_experts.shape)} and {tuple(mask.shape)}."
        )
    mask = mask.bool()
    layers, slots = experts.shape[2:]
    # Slot by slot: all pairs at once would take K times the memory.
    changed = sum(
        ((experts != slot.unsqueeze(-1)).all(-1) & mask.unsqueeze(-1)).sum() for slot in old_experts.unbind(-1)
    )
    return changed, mask.sum() * (layers * slots)
