"""
How much GPU memory a run takes, by arithmetic: what no run of its kind can do without, and what one like it takes.

Pure functions of numbers, for one GPU of `gpus` alike; P parameters, of which T are trained. Bytes throughout. Nothing
here was measured on a GPU: the sizes of weights, gradients and optimizer states follow from their dtypes, those of
activations from the shapes of a decoder of gated MLPs, and `RESERVE` is an assumption.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import nn
from transformers import PretrainedConfig


Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]

GIB = 1024**3
# CUDA's context, buffers of NCCL and cuBLAS, and what the allocator cannot use. Assumed, not measured.
RESERVE = 2 * GIB
# Tokens and bytes of a tile of TRL's fused head (TRL 1.15, trl/kernels/chunked_logprob.py), and the bytes of what is
# kept of each token of whole logits where there is none: the model's, and in float32 their log-softmax and gradient.
_TILE, _TILE_BYTES, _LOGIT_BYTES = 4096, 4, 10
# DeepSpeed's `stage3_max_live_parameters` and `sub_group_size`, at their defaults.
_LIVE_PARAMETERS = _SUB_GROUP = 1_000_000_000


class ModelShape(NamedTuple):
    """
    What the memory of a decoder depends on.

    Args:
        parameters (`int`): P.
        head (`int`): parameters of the output embedding, of which TRL's fused head sums the gradient in float32.
        largest_layer (`int`): parameters of the largest decoder layer, which sharding gathers at once.
        quantizable (`int`): parameters that bitsandbytes packs: linear layers without the head.
        layers (`int`): decoder layers.
        hidden (`int`): width of the residual stream.
        intermediate (`int`): width of the MLP that a token goes through: of all of its experts in a mixture.
        vocabulary (`int`): rows of the head.
        cache_width (`int`): elements of keys and values for each token and layer.
    """

    parameters: int
    head: int
    largest_layer: int
    quantizable: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    cache_width: int


def model_shape(model: nn.Module, config: PretrainedConfig) -> ModelShape:
    """The shape of a model, which may be on the meta device; `config` is its own."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    expert_width = getattr(config, "moe_intermediate_size", None)
    layers = next((part for name, part in model.named_modules() if name.split(".")[-1] == "layers"), [])
    output = model.get_output_embeddings()
    linear = {id(part.weight): part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)}
    if output is not None:
        linear.pop(id(output.weight), None)
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        head=output.weight.numel() if output is not None else 0,
        largest_layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        quantizable=sum(linear.values()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=experts * expert_width if expert_width else getattr(config, "intermediate_size", None) or 0,
        vocabulary=config.vocab_size,
        cache_width=2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim,
    )


@dataclass(frozen=True)
class Run:
    """
    What the memory of a run depends on, beside the model.

    Args:
        gpus (`int`): processes, one GPU each, that share out what the engine shares out.
        engine (`str`): `"ddp"` is also one GPU without an engine; `"fsdp2"` reshards after each forward.
        weight_bytes (`int`): bytes of a weight as it is loaded: 2 or 4.
        bits (`int`, *optional*): 4 or 8 where bitsandbytes packs the frozen linear layers.
        is_half (`bool`): half precision, by autocast or by the engine.
        trained (`int`, *optional*): T; `None` for all parameters.
        state_bytes (`int`, *optional*): bytes of optimizer state for each trained float32 weight: 8 for Adam; `None`
            where the optimizer is not known.
        offloads_optimizer (`bool`): gradients, master weights and optimizer states are in the host's memory.
        offloads_weights (`bool`): so are the weights.
        gathers (`bool`): ZeRO-3 gathers all weights for a rollout (`ds3_gather_for_generation`).
        has_reference (`bool`): a reference model beside the trained one.
        in_vllm (`bool`): vLLM samples.
        vllm_bytes (`int`): what it holds of this GPU.
        rollout_rows (`int`): sequences that this GPU samples at once: `per_device_train_batch_size x
            steps_per_generation`.
        micro_batch_rows (`int`): `per_device_train_batch_size`.
        prompt_tokens (`int`): an assumption where the data is not read.
        completion_tokens (`int`): `max_completion_length`.
        is_checkpointed (`bool`): `gradient_checkpointing`.
        has_fused_head (`bool`): TRL 1.15 and later.
    """

    gpus: int = 1
    engine: Engine = "ddp"
    weight_bytes: int = 2
    bits: int | None = None
    is_half: bool = True
    trained: int | None = None
    state_bytes: int | None = 8
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    gathers: bool = True
    has_reference: bool = False
    in_vllm: bool = False
    vllm_bytes: int = 0
    rollout_rows: int = 32
    micro_batch_rows: int = 2
    prompt_tokens: int = 512
    completion_tokens: int = 2048
    is_checkpointed: bool = True
    has_fused_head: bool = True


class Memory(NamedTuple):
    """
    Bytes on each GPU, by part. A rollout and an update do not need all of them at once: `peak` is the larger.

    Args:
        weights: of the model, of the reference model, and of autocast's copy, which lives as long as a forward.
        gradients: as they are kept between micro-batches, with DDP's buckets.
        optimizer: master weights and states.
        gathered: of other GPUs' weights, in a rollout.
        cache: keys and values of a rollout in which all sequences reach the longest completion.
        prefill: activations of the prompts, all at once, before there is a cache.
        activations: of a micro-batch of the longest sequences, forward and backward, with what the engine gathers.
        logits: of that micro-batch; and the head's gradient in float32.
        reserve: `RESERVE`, and what vLLM holds.
        floor: what no run of this kind can do without: weights, gradients and states at an update, or weights, states
            and what is gathered in a rollout. No activations, no cache, no reserve.
        host: master weights, states and gradients in the host's memory, for all GPUs together.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    cache: float
    prefill: float
    activations: float
    logits: float
    reserve: float
    floor: float
    host: float

    @property
    def rollout(self) -> float:
        held = self.weights + self.gradients + self.optimizer + self.gathered + self.reserve
        return held + max(self.cache, self.prefill)

    @property
    def update(self) -> float:
        held = self.weights + self.gradients + self.optimizer + self.reserve
        return held + self.activations + self.logits

    @property
    def peak(self) -> float:
        return max(self.rollout, self.update)


def estimate(shape: ModelShape, run: Run) -> Memory:
    """
    The memory of `run` on each GPU.

    Full fine-tuning with Adam takes 16 bytes a parameter, in one of two forms: float32 weights, gradients and two
    states (4 + 4 + 8), or, under DeepSpeed, bfloat16 weights and gradients beside float32 master weights and states
    (2 + 2 + 12). Source: ZeRO, https://huggingface.co/papers/1910.02054, section 3.1; what each stage shares out over
    the GPUs: section 5.
    """
    frozen = shape.parameters if run.trained is not None else 0
    trained = shape.parameters if run.trained is None else run.trained
    is_zero = run.engine.startswith("zero")
    shards = run.gpus if run.engine in ("zero3", "fsdp2") else 1
    computed = 2 if run.is_half or run.weight_bytes == 2 else 4
    # DeepSpeed casts the weights it is given, and keeps a float32 copy; accelerate makes FSDP2's float32; PEFT makes
    # adapters float32, but TRL not those under ZeRO-3.
    if is_zero:
        stored, kept = computed, 4
    elif run.engine == "fsdp2" and run.is_half or run.trained is not None:
        stored, kept = 4, 0
    else:
        stored, kept = run.weight_bytes, 0
    states = 0.0 if run.state_bytes is None else run.state_bytes * (1 if kept or stored == 4 else stored / 4)

    frozen_bytes = frozen * (computed if is_zero else run.weight_bytes)
    if run.bits:
        frozen_bytes = shape.quantizable * run.bits / 8 + (frozen - shape.quantizable) * run.weight_bytes
    weights = (frozen_bytes + trained * stored) / shards
    reference = shape.parameters * run.weight_bytes / shards if run.has_reference else 0.0
    gradients = trained * stored / (run.gpus if run.engine in ("zero2", "zero3", "fsdp2") else 1)
    optimizer = trained * (kept + states) / (run.gpus if is_zero or run.engine == "fsdp2" else 1)
    # An engine may drop or move the gradients of other GPUs' weights before an update.
    is_known = run.state_bytes is not None  # others may use gradients up as they come
    needed_gradients = (gradients if run.engine != "zero1" else gradients / run.gpus) if is_known else 0.0
    needed_optimizer = optimizer if is_known else 0.0

    host = 0.0
    if run.offloads_optimizer:
        # Gradients in float32 beside master weights and states.
        host = trained * (4 + 4 + (run.state_bytes or 0))
        gradients = needed_gradients = optimizer = needed_optimizer = 0.0
    if run.offloads_weights:
        host += weights * shards
        weights = reference = 0.0

    whole = frozen * computed + trained * stored
    layer = shape.largest_layer * computed
    gathered = needed_gathered = while_training = 0.0
    if shards > 1 or run.offloads_weights:
        live = min(shape.parameters, _LIVE_PARAMETERS) * computed
        while_training = live if is_zero else 2 * layer + 2 * shape.head * computed
        if not run.in_vllm:
            gathered = whole if is_zero and run.gathers else while_training
            needed_gathered = whole if is_zero and run.gathers and not run.bits else 0.0
    buckets = trained * stored if run.engine == "ddp" and run.gpus > 1 else 0.0
    if is_zero and not run.offloads_optimizer:
        # The float32 gradients of the group of weights that is being updated.
        while_training = max(while_training, 4 * min(trained / run.gpus, _SUB_GROUP))
    # Autocast keeps those that are trained in half precision beside those in float32, for the length of a forward.
    cast = trained * 2 if run.is_half and run.engine == "ddp" and stored == 4 else 0.0

    tokens = run.micro_batch_rows * (run.prompt_tokens + run.completion_tokens)
    one_layer = tokens * (8 * shape.hidden + 4 * shape.intermediate) * computed
    kept_layers = shape.layers * tokens * shape.hidden * computed if run.is_checkpointed else shape.layers * one_layer
    activations = kept_layers + 2 * one_layer + while_training
    if run.has_fused_head:
        logits = min(tokens, _TILE) * shape.vocabulary * _TILE_BYTES + 4 * shape.head * (run.trained is None)
    else:
        logits = run.micro_batch_rows * run.completion_tokens * shape.vocabulary * _LOGIT_BYTES
    cached_tokens = 0 if run.in_vllm else run.rollout_rows * (run.prompt_tokens + run.completion_tokens)
    prompt_tokens = 0 if run.in_vllm else run.rollout_rows * run.prompt_tokens
    return Memory(
        weights=weights + reference + cast,
        gradients=gradients + buckets,
        optimizer=optimizer,
        gathered=gathered,
        cache=cached_tokens * shape.layers * shape.cache_width * computed,
        prefill=prompt_tokens * (4 * shape.hidden + 3 * shape.intermediate) * computed,
        activations=activations,
        logits=logits,
        reserve=RESERVE + run.vllm_bytes,
        floor=weights + needed_optimizer + max(needed_gradients, needed_gathered),
        host=host,
    )


def most_that_fits(shape: ModelShape, run: Run, usable: float) -> int:
    """The most sequences a GPU can sample at once in `usable` bytes, by halving `rollout_rows`; 0 for none."""
    rows = run.rollout_rows
    while rows and estimate(shape, replace(run, rollout_rows=rows)).peak > usable:
        rows //= 2
    return rows
