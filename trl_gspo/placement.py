"""Where a run is placed: the engine and GPUs that it starts on, and whether it fits there, before it is loaded."""

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import deepspeed as hf_deepspeed
from trl import ModelConfig, get_peft_config

from .config import GSPOConfig
from .host import HAS_FUSED_HEAD
from .memory import GIB, ModelShape, Run, estimate, model_shape


logger = get_logger(__name__)

# Of the memory of a GPU: what takes more may not fit, and is warned of.
_NEAR = 0.95
_ADAM = {"adamw_torch", "adamw_torch_fused", "adamw_apex_fused"}
_ENGINE_NAMES = {
    "ddp": "without sharding",
    "zero1": "under ZeRO-1",
    "zero2": "under ZeRO-2",
    "zero3": "under ZeRO-3",
    "fsdp2": "under FSDP2",
}


def start_alone(deepspeed: str | dict | None, use_cpu: bool) -> None:
    """
    Makes DeepSpeed start in a process that no launcher started as one of several.

    `accelerate launch` starts a single process without the variables of a distributed run, and DeepSpeed then looks
    for MPI. To be called before the training arguments are made, which start the process group.

    Args:
        deepspeed (`str` or `dict`, *optional*): the option of that name.
        use_cpu (`bool`): the option of that name.
    """
    wants_deepspeed = bool(deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    is_launched = "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1
    # Several visible GPUs are TRL's to refuse, with the launchers that use them all.
    if not wants_deepspeed or is_launched or (not use_cpu and torch.cuda.device_count() > 1):
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def connect_deepspeed(training_args: GSPOConfig) -> None:
    """
    Starts DeepSpeed's communication where it has not started: on CPU, where accelerate does not, and where ZeRO-3
    would load the model whole on each process.
    """
    if training_args.deepspeed_plugin is None or not training_args.use_cpu:
        return
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)


def uses_fsdp(training_args: GSPOConfig) -> bool:
    """Whether accelerate shards by FSDP: on accelerators only; on CPU it falls back on DDP."""
    asked = bool(training_args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and not training_args.use_cpu


def zero_options(training_args: GSPOConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration, `None` without it."""
    plugin = training_args.deepspeed_plugin
    return None if plugin is None else plugin.hf_ds_config.config


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Models that are made here are whole, although ZeRO-3 is on for others."""
    config = hf_deepspeed.deepspeed_config()
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref() if config is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            hf_deepspeed.set_hf_deepspeed_config(kept)


def read_shape(model_args: ModelConfig, training_args: GSPOConfig) -> tuple[ModelShape, PretrainedConfig, int | None]:
    """
    Shape and configuration of the model that a run would load, and how many parameters its adapter trains (`None`
    without adapter), from its configuration alone: no weights.
    """
    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=getattr(training_args, "trust_remote_code", False),
    )
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with without_zero_init(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(config) if kind else AutoModelForCausalLM.from_config(config)
        shape = model_shape(model, config)
        return shape, config, _trained_by_adapter(model, model_args) if model_args.use_peft else None


def _trained_by_adapter(model: nn.Module, model_args: ModelConfig) -> int:
    from peft import get_peft_model

    try:
        adapted = get_peft_model(model, get_peft_config(model_args), low_cpu_mem_usage=True)
    except Exception:  # training says what is wrong with it; adapters are small beside the model
        return 0
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def run_of(training_args: GSPOConfig, model_args: ModelConfig, config: PretrainedConfig) -> Run | None:
    """
    What the memory of a run depends on, as its options say it; `None` where they say something that the arithmetic of
    [`~trl_gspo.memory.estimate`] does not know.
    """
    given = training_args.model_init_kwargs or {}
    is_unknown = getattr(config, "quantization_config", None) or training_args.parallelism_config
    if is_unknown or given.keys() & {"quantization_config", "device_map", "config"}:
        return None
    dtype = given.get("dtype", model_args.dtype)
    dtype = config.dtype if dtype in (None, "auto") else dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    options, engine, offloads = zero_options(training_args), "ddp", [False, False]
    state_bytes = 8 if _value(training_args.optim) in _ADAM else None
    if options is not None:
        zero, half = options.get("zero_optimization", {}), options.get("bf16", {})
        stage = zero.get("stage", 0)
        shrinks = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zenflow")
        if stage not in (1, 2, 3) or half.get("bf16_master_weights_and_grads") or any(map(zero.get, shrinks)):
            return None
        engine = f"zero{stage}"
        offloads = [_is_offloaded(zero, "offload_optimizer"), _is_offloaded(zero, "offload_param")]
        if "optimizer" in options:
            state_bytes = 8 if str(options["optimizer"].get("type")).lower() in ("adam", "adamw") else None
    elif uses_fsdp(training_args):
        arguments, engine = training_args.fsdp_plugin_args or {}, "fsdp2"
        is_offloaded = arguments.get("cpu_offload", os.environ.get("FSDP_OFFLOAD_PARAMS", "false"))
        offloads = [str(is_offloaded).lower() == "true"] * 2
        if str(arguments.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) != "2":
            return None
    in_vllm = training_args.use_vllm
    held = in_vllm and training_args.vllm_mode == "colocate" and not training_args.vllm_enable_sleep_mode
    return Run(
        gpus=training_args.world_size,
        engine=engine,
        weight_bytes=2 if dtype is None else dtype.itemsize,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
        is_half=bool(training_args.bf16 or training_args.fp16),
        state_bytes=state_bytes,
        offloads_optimizer=offloads[0],
        offloads_weights=offloads[1],
        gathers=training_args.ds3_gather_for_generation,
        has_reference=training_args.beta != 0.0 and not model_args.use_peft,
        in_vllm=in_vllm,
        vllm_bytes=int(training_args.vllm_gpu_memory_utilization * gpu_bytes(training_args)) if held else 0,
        rollout_rows=training_args.per_device_train_batch_size * training_args.steps_per_generation,
        micro_batch_rows=training_args.per_device_train_batch_size,
        completion_tokens=training_args.max_completion_length,
        is_checkpointed=training_args.gradient_checkpointing,
        has_fused_head=HAS_FUSED_HEAD,
    )


def _is_offloaded(zero: dict[str, Any], name: str) -> bool:
    return _value((zero.get(name) or {}).get("device", "none")) != "none"


def _value(option: Any) -> str:
    return str(getattr(option, "value", option))


def gpu_bytes(training_args: GSPOConfig) -> int:
    """
    Memory of the smallest GPU that a process of this machine trains on, 0 on CPU. A single process without an engine
    spreads the model over all it sees.
    """
    if training_args.use_cpu or not torch.cuda.is_available():
        return 0
    seen = torch.cuda.device_count()
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(seen)]
    if "LOCAL_RANK" not in os.environ:
        return sum(sizes)
    return min(sizes[: int(os.environ.get("LOCAL_WORLD_SIZE", seen))])


def check_memory(training_args: GSPOConfig, model_args: ModelConfig, config_file: str | None = None) -> None:
    """
    Says before anything is loaded whether a run fits on the GPUs it was started on.

    Refuses only what is certain: [`Memory.floor`](~trl_gspo.memory.Memory), the weights, gradients and optimizer
    states, above what the GPU has. Warns where a rollout of the longest completions, or an update on them, does not
    fit by [`~trl_gspo.memory.estimate`]. Both name what does. Silent on CPU, and where the model's configuration
    cannot be read, which loading the model reports.

    Args:
        training_args ([`GSPOConfig`]): of the run.
        model_args (`ModelConfig`): of the run.
        config_file (`str`, *optional*): the YAML file; those beside it whose names begin with its own are proposed.

    Raises:
        ValueError: if the run cannot fit.
    """
    available = gpu_bytes(training_args)
    if not available:
        return
    try:
        shape, config, trained = read_shape(model_args, training_args)
    except Exception as error:
        logger.debug(f"The model's configuration cannot be read, and its memory not estimated: {error}")
        return
    run = run_of(training_args, model_args, config)
    if run is None:
        return
    run = replace(run, trained=trained)
    memory = estimate(shape, run)
    proposals = _what_fits(shape, run, available, config_file, training_args.num_generations)
    per_gpu = "all GPUs together" if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1 else "each GPU"
    what = (
        f"{model_args.model_name_or_path} ({shape.parameters / 1e9:.1f}B parameters), "
        f"{_method(run)} {_ENGINE_NAMES[run.engine]}{' with offload' if run.offloads_optimizer else ''} "
        f"on {run.gpus} GPU{'s' if run.gpus > 1 else ''}"
    )
    # Layers of a frozen model that do not fit are kept in the host's memory, where no engine forbids it.
    may_spill = run.trained is not None and "LOCAL_RANK" not in os.environ
    if memory.floor > available and not may_spill:
        needed = f"weights {_gib(memory.weights)}, optimizer {_gib(memory.optimizer)}"
        needed += f", gradients {_gib(memory.gradients)}" if memory.gradients >= memory.gathered else ""
        needed += f", gathered for a rollout {_gib(memory.gathered)}" if memory.gathered > memory.gradients else ""
        raise ValueError(
            f"{what} cannot fit: it takes at least {_gib(memory.floor)} on {per_gpu}, which has {_gib(available)} "
            f"({needed}). {proposals} `--memory_check false` starts it all the same."
        )
    parts = (
        f"rollout {_gib(memory.rollout)}, of which the key-value cache of {run.rollout_rows} sequences is up to "
        f"{_gib(memory.cache)}; update {_gib(memory.update)}"
    )
    if memory.peak > _NEAR * available:
        logger.warning(
            f"{what} may run out of memory: by arithmetic it takes up to {_gib(memory.peak)} on {per_gpu}, which has "
            f"{_gib(available)} ({parts}). {proposals}"
        )
    else:
        logger.info(f"{what}: up to {_gib(memory.peak)} of {_gib(available)} on {per_gpu}, by arithmetic ({parts}).")


def _method(run: Run) -> str:
    return "full fine-tuning" if run.trained is None else f"LoRA in {run.bits} bits" if run.bits else "LoRA"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _what_fits(
    shape: ModelShape, run: Run, available: int, config_file: str | None = None, num_generations: int = 1
) -> str:
    others = alternatives(run, config_file, num_generations)
    others += [(f"{gpus} GPUs of this size as it is", replace(run, gpus=gpus)) for gpus in _more_gpus(run)]
    fits = [(words, estimate(shape, other)) for words, other in others]
    fits = [words.format(host=_gib(memory.host)) for words, memory in fits if memory.peak <= _NEAR * available]
    # One way to offload is enough, and the smallest number of GPUs.
    for kind in ("zero3_offload", "as it is"):
        fits = [words for words in fits if words not in [words for words in fits if kind in words][1:]]
    if not fits:
        return "By the same arithmetic no configuration we ship fits there: take a smaller model or larger GPUs."
    return f"By the same arithmetic these fit: {'; '.join(fits)}."


def _more_gpus(run: Run) -> list[int]:
    return [gpus for gpus in (2, 4, 8, 16, 32, 64, 128) if gpus > run.gpus]


def _offloaded(run: Run) -> Run:
    return replace(run, engine="zero3", weight_bytes=2, offloads_optimizer=True)


def alternatives(run: Run, config_file: str | None = None, num_generations: int = 1) -> list[tuple[str, Run]]:
    """What to try in place of a run that does not fit, as options of the script."""
    found, folder = [], "configs/deepspeed"
    if run.trained is None:
        if run.engine in ("ddp", "zero1", "zero2") and run.gpus > 1:
            sharded = replace(run, engine="zero3", weight_bytes=2)
            found.append((f"`--deepspeed {folder}/zero3.json`", sharded))
        if run.engine != "fsdp2" and not run.offloads_optimizer:
            offload = f"`--deepspeed {folder}/zero3_offload.json"
            memory = "with {host} of host memory, for all GPUs together"
            found.append((f"{offload}` {memory}", _offloaded(run)))
            if run.gathers and not run.in_vllm:
                layers = replace(_offloaded(run), gathers=False)
                found.append((f"{offload} --ds3_gather_for_generation false` {memory}, with slow rollouts", layers))
        if run.engine == "zero3" and run.gathers and not run.in_vllm:
            found.append(("`--ds3_gather_for_generation false`, whose rollouts are slow", replace(run, gathers=False)))
        for name, other in _beside(config_file, run):
            found.append((f"`--config {name}`", other))
    # Half of the micro-batches' rows is half of the rollout's.
    if run.micro_batch_rows % 2 == 0 and run.rollout_rows // 2 * run.gpus % num_generations == 0:
        rows = run.micro_batch_rows // 2
        half = replace(run, micro_batch_rows=rows, rollout_rows=run.rollout_rows // 2)
        found.append((f"`--per_device_train_batch_size {rows}`, with half the batch", half))
    return found


def _beside(config_file: str | None, run: Run) -> list[tuple[str, Run]]:
    """The configurations of adapters in the folder of a YAML file whose names begin with its own."""
    found, path = [], Path(config_file or "")
    for other in sorted(path.parent.glob(f"{path.stem}_*.yaml")) if config_file else ():
        options = yaml.safe_load(other.read_text())
        if not isinstance(options, dict) or not options.get("use_peft"):
            continue
        rows = options.get("per_device_train_batch_size", 8)
        adapter = replace(
            run,
            engine="ddp",
            weight_bytes=4 if options.get("dtype", "float32") == "float32" else 2,
            bits=4 if options.get("load_in_4bit") else 8 if options.get("load_in_8bit") else None,
            # More than enough: of rank 16 on all linear layers of a 7B model it has 40M.
            trained=10**8,
            has_reference=False,
            offloads_optimizer=False,
            offloads_weights=False,
            micro_batch_rows=rows,
            rollout_rows=rows * options.get("steps_per_generation", 32),
            completion_tokens=options.get("max_completion_length", 256),
        )
        found.append((str(other), adapter))
    return found
