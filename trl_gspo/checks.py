"""
What can be known to go wrong before a model is loaded: data, tokenizer, context, and packages that are not installed.

TRL finds each of these later: after minutes of loading, in the middle of a run, or, on a GPU, as a device-side assert.
"""

import importlib.util
import json
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from .config import GSPOConfig
from .host import is_vllm_available


logger = get_logger(__name__)

# Of these, transformers cannot tell whether they are installed.
_UNKNOWN_INTEGRATIONS = {"azure_ml", "flyte"}

# Where the classes are that its ZeRO optimizers keep in a checkpoint: loss scaler, stage, and address of a fragment.
_OF_DEEPSPEED = ("deepspeed.runtime.", "deepspeed.utils.tensor_fragment.")

# Bytes that a chat template may add to a prompt of one message, so that the short ones need not be rendered; and how
# many prompts are tokenized at most, the longest. What is missed is found when it is rolled out.
_TEMPLATE = 1024
_MOST_PROMPTS = 1000


def check_before_loading(
    model: Any,
    args: GSPOConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> None:
    """
    Raises an error for what is going to fail, in seconds and without weights. Arguments as of the trainer.

    Raises:
        ImportError: if a package is not installed that `args` names.
        OSError: if configuration or tokenizer of the model cannot be found.
        ValueError: if a dataset has no prompts, or too few for one rollout batch, or one that leaves no room in the
            model's context; if the tokenizer cannot be trained with this model; if a local model's files are damaged.
    """
    _check_installed(args)
    _check_rollout_batch(args, train_dataset)
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    datasets = {"train_dataset": train_dataset}
    datasets |= {f"eval_dataset[{name!r}]" if name else "eval_dataset": rows for name, rows in evals.items()}
    datasets = {name: rows for name, rows in datasets.items() if isinstance(rows, (Dataset, IterableDataset))}
    for name, rows in datasets.items():
        _check_has_prompts(name, rows)
    config = _load_config(model, args) if isinstance(model, str) else model.config
    if processing_class is None:
        processing_class = _load_processor(model if isinstance(model, str) else config._name_or_path, args)
    _check_tokens(processing_class, config)
    if not isinstance(processing_class, ProcessorMixin):  # with images a prompt is longer than its text
        for name, rows in datasets.items():
            if isinstance(rows, Dataset):
                _check_lengths(name, rows, processing_class, config, args)


def check_prompt_ids(prompt_ids: Sequence[Sequence[int]], config: PretrainedConfig, args: GSPOConfig) -> None:
    """
    Raises `ValueError` for a tokenized prompt, of text alone, that the model cannot go on from.

    Args:
        prompt_ids (`Sequence[Sequence[int]]`): of each prompt.
        config (`PretrainedConfig`): of the model.
        args ([`GSPOConfig`]): of the run.
    """
    context, vocabulary = context_length(config, args), getattr(config.get_text_config(), "vocab_size", None)
    for ids in prompt_ids:
        if len(ids) == 0:
            raise ValueError("A prompt has no token, and a model cannot begin without one: leave the row out.")
        if context is not None and len(ids) >= context:
            raise ValueError(
                f"A prompt has {len(ids)} tokens, and the model's context is {context}, which leaves no room for a "
                "completion: leave out or shorten prompts that long."
            )
        if vocabulary is not None and max(ids) >= vocabulary:
            raise ValueError(
                f"A prompt has the token {max(ids)}, and the model's vocabulary ends at {vocabulary - 1}: use the "
                "model's own tokenizer, or resize the embeddings (`model.resize_token_embeddings`)."
            )


def check_deepspeed_checkpoint(checkpoint: str | Path) -> None:
    """
    Raises `ValueError` unless the files that DeepSpeed is going to unpickle hold tensors, plain values, and objects of
    DeepSpeed's engines, and nothing else.

    DeepSpeed opens its checkpoints with `weights_only=False`, and so runs whatever a file tells it to. Here each is
    read before, without its tensors, by torch's unpickler for weights.

    Args:
        checkpoint (`str` or `Path`): a folder with `latest` and the folder that it names.
    """
    folder = Path(checkpoint)
    latest = (folder / "latest").read_text().strip() if (folder / "latest").is_file() else ""
    if latest and latest != Path(latest).name:
        raise ValueError(f"{folder / 'latest'} names {latest!r}, which is not a folder beside it.")
    for file in sorted(folder.rglob("*.pt")):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            kinds = {name: pkgutil.resolve_name(name) for name in names if name.startswith(_OF_DEEPSPEED)}
            # Not what a module of DeepSpeed only imported, under whose own name torch would allow it.
            own = [
                kind
                for name, kind in kinds.items()
                if isinstance(kind, type) and f"{kind.__module__}.{kind.__qualname__}" == name
            ]
            with torch.serialization.safe_globals(own):
                torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever a damaged file makes of it
            raise ValueError(
                f"{file} is damaged, or holds something that would be run when it is opened: go on only from "
                f"checkpoints that your own runs wrote. {str(error).splitlines()[0]}"
            ) from error


def context_length(config: PretrainedConfig, args: GSPOConfig) -> int | None:
    """
    The positions that a model was made for, `None` where it has no bound.

    A `factor` of its rotary embedding counts, whether `max_position_embeddings` does already or not: the larger one.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int) or length <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # by type of layer
    for kind in kinds:
        original = kind.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", 0)
        length = max(length, int(original * (kind.get("factor") or 1)))
    if args.use_vllm and args.vllm_max_model_length:
        length = min(length, args.vllm_max_model_length)
    return length


def _check_installed(args: GSPOConfig) -> None:
    get_reporting_integration_callbacks(args.report_to)  # raises for a name that there is not
    wanted = set(args.report_to or []) & set(INTEGRATION_TO_CALLBACK) - _UNKNOWN_INTEGRATIONS
    missing = sorted(wanted - set(get_available_reporting_integrations()))
    if missing:
        raise ImportError(
            f"`report_to` names {', '.join(missing)}, which is not installed: install it (`pip install "
            f"{' '.join(missing)}`), or leave it out (`report_to: none`)."
        )
    optimizer = getattr(args.optim, "value", args.optim)
    of_bitsandbytes = ("bnb", "adamw_8bit", "lion_", "ademamix", "paged_")
    if any(part in optimizer for part in of_bitsandbytes) and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"`optim={optimizer!r}` needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or take "
            "`optim='adamw_torch'`."
        )
    if args.use_vllm and not is_vllm_available():
        raise ImportError(
            "`use_vllm=True` needs vLLM, which is not installed: `pip install vllm`, or set it to False."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("`fp16=True` needs a GPU, and this run is on the CPU: set `fp16=False`.")


def _check_rollout_batch(args: GSPOConfig, train_dataset: Dataset | IterableDataset | None) -> None:
    # TRL's sampler drops an incomplete rollout batch, and would be left without any.
    prompts = args.generation_batch_size // args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} prompts, and one rollout batch takes {prompts} "
            f"(per_device_train_batch_size {args.per_device_train_batch_size} x processes {args.world_size} x "
            f"steps_per_generation {args.steps_per_generation} / num_generations {args.num_generations}). Set a "
            "smaller `steps_per_generation` or `per_device_train_batch_size`, or add prompts."
        )


def _check_has_prompts(name: str, rows: Dataset | IterableDataset) -> None:
    columns, is_empty = rows.column_names, isinstance(rows, Dataset) and len(rows) == 0
    if isinstance(rows, IterableDataset):
        first = next(iter(rows), None)
        columns, is_empty = columns or list(first or []), first is None
    if is_empty:
        raise ValueError(f"`{name}` has no row.")
    if "prompt" not in columns:
        raise ValueError(
            f"`{name}` has no column 'prompt'. It has {', '.join(columns)}: rename the one that holds the prompts "
            "(`dataset.rename_column`)."
        )


def _load_config(model: str, args: GSPOConfig) -> PretrainedConfig:
    trust = (args.model_init_kwargs or {}).get("trust_remote_code", args.trust_remote_code)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust)  # as TRL does
    if not config.architectures:
        raise ValueError(f"The configuration of {model!r} has no `architectures`: it is not that of a saved model.")
    if Path(model).is_dir():
        _check_weights(Path(model))
    return config


def _load_processor(model: str, args: GSPOConfig) -> PreTrainedTokenizerBase | ProcessorMixin:
    revision = (args.model_init_kwargs or {}).get("revision")
    options = dict(revision=revision, padding_side="left", trust_remote_code=args.trust_remote_code)
    try:
        return AutoProcessor.from_pretrained(model, **options)
    except Exception as error:
        # After the tokenizer it has tried image processors and others, and complains of the last. The tokenizers
        # package raises no class of its own.
        try:
            AutoTokenizer.from_pretrained(model, **options)
        except Exception as cause:
            raise ValueError(f"The tokenizer of {model!r} cannot be loaded: {cause}") from cause
        raise error


def _check_weights(folder: Path) -> None:
    # The header of a safetensors file says how long the file is. A hub's download is checked when it is made.
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read: {type(error).__name__}: {error}") from error
    for file in sorted(files):
        if not file.is_file():
            raise ValueError(f"{file} is not there, and the model's index names it: copy the model again.")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is cut off or damaged ({error}): copy the model again.") from error


def _check_tokens(processing_class: Any, config: PretrainedConfig) -> None:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no `eos_token`: no completion would ever end. Set `tokenizer.eos_token` and give the "
            "tokenizer as `processing_class`, or add `eos_token` to its tokenizer_config.json."
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        return
    used = {"eos_token": tokenizer.eos_token_id, "pad_token": tokenizer.pad_token_id}
    beyond = [f"`{name}` {index}" for name, index in used.items() if index is not None and index >= vocabulary]
    # Tokens that were added, such as one for images in a model of text alone, may stand beyond the end unused.
    if tokenizer.vocab_size > vocabulary:
        beyond.append(f"a vocabulary of {tokenizer.vocab_size} tokens")
    if beyond:
        raise ValueError(
            f"The tokenizer has {' and '.join(beyond)}, and the model has embeddings for {vocabulary} tokens: use the "
            "model's own tokenizer, or resize the embeddings (`model.resize_token_embeddings`)."
        )


def _check_lengths(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, args: GSPOConfig
) -> None:
    context = context_length(config, args)
    sizes = []
    for index, prompt in enumerate(_prompts(rows)):
        if not isinstance(prompt, (str, list)) or prompt == []:
            raise ValueError(
                f"Row {index} of `{name}` has no prompt, but {prompt!r}: a prompt is a string or a list of messages."
            )
        sizes.append(_size(prompt))
    # A token has at least one byte. The first row says whether the template renders at all.
    suspects = {index for index, size in enumerate(sizes) if context is not None and size + _TEMPLATE > context}
    suspects = set(sorted(suspects, key=sizes.__getitem__, reverse=True)[:_MOST_PROMPTS])
    suspects |= {0} | ({sizes.index(0)} if 0 in sizes else set())
    longest = 0
    for index in sorted(suspects):
        prompt = rows[index]["prompt"]
        try:
            ids = tokenize(prompt, tokenizer, args)
            check_prompt_ids([ids], config, args)
        except (TemplateError, ValueError) as error:
            raise ValueError(f"Row {index} of `{name}`: {error}") from error
        longest = max(longest, len(ids))
    completion = args.max_completion_length or 0
    if context is not None and longest + completion > context:
        logger.warning(
            f"The longest prompt of `{name}` has {longest} tokens, which with `max_completion_length={completion}` is "
            f"beyond the model's context of {context}: set `max_completion_length={context - longest}`, or leave such "
            "prompts out."
        )


def tokenize(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, args: GSPOConfig) -> list[int]:
    """A prompt as TRL tokenizes it, without tools."""
    if isinstance(prompt, str):
        return tokenizer(text=[prompt])["input_ids"][0]
    return tokenizer.apply_chat_template(
        conversation=[prompt],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(args.chat_template_kwargs or {}),
    )["input_ids"][0]


def _prompts(rows: Dataset) -> Iterator[str | list[dict]]:
    for batch in rows.select_columns(["prompt"]).iter(batch_size=1000):
        yield from batch["prompt"]


def _size(prompt: str | list[dict]) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode())
    return sum(len(str(message.get("content", "")).encode()) + _TEMPLATE // 8 for message in prompt)
