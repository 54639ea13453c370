"""What a run saves: refused before training if no model could be loaded from it; adapters merged into their model."""

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from .config import GSPOConfig
from .placement import uses_fsdp, without_zero_init, zero_options


def check_saving(training_args: GSPOConfig, model_args: ModelConfig, merge_adapter: bool = False) -> None:
    """
    Checks that what the engine saves loads with `from_pretrained`.

    Args:
        training_args ([`GSPOConfig`]): of the run.
        model_args (`ModelConfig`): of the run.
        merge_adapter (`bool`, *optional*, defaults to `False`): whether the merged model is asked for too.

    Raises:
        ValueError: if ZeRO-3 or FSDP would save shards only, if DeepSpeed and FSDP are both on, or if there is no
            adapter that can be merged.
    """
    options, is_fsdp = zero_options(training_args), uses_fsdp(training_args)
    if options is not None and is_fsdp:
        raise ValueError(
            "`deepspeed` is set, and accelerate was started with FSDP: one engine shards a model. Leave DeepSpeed out "
            'with `--deepspeed ""`, or start with an accelerate configuration that does not use FSDP.'
        )
    zero = (options or {}).get("zero_optimization", {})
    gathers = zero.get("stage3_gather_16bit_weights_on_model_save")
    # Adapters are gathered in any case.
    if zero.get("stage") == 3 and not gathers and not model_args.use_peft:
        raise ValueError(
            "`stage3_gather_16bit_weights_on_model_save` is not true in DeepSpeed's configuration: under ZeRO-3 the "
            "run would save shards, and no model that `from_pretrained` loads. Set it to true in the JSON file "
            "(`zero3_save_16bit_model: true` in accelerate's), as configs/deepspeed/zero3.json does."
        )
    if is_fsdp:
        kind = (training_args.fsdp_plugin_args or {}).get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE")
        if "FULL_STATE_DICT" not in str(kind):
            raise ValueError(
                f"`fsdp_state_dict_type` is {kind}: the run would save no model that `from_pretrained` loads. Set it "
                "to FULL_STATE_DICT, as configs/accelerate/fsdp2.yaml does."
            )
    if merge_adapter and not model_args.use_peft:
        raise ValueError("`merge_adapter=True` needs an adapter: set `use_peft=True`, or leave it out.")
    if merge_adapter and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            "`merge_adapter=True` with a quantized model: the adapter was trained on rounded weights, and a merge "
            "into the whole ones is another model than the one that was trained. Leave it out, and load the adapter "
            "on the quantized model; or, if that other model is what you want, make it of what was saved with "
            "`trl_gspo.saving.merge_adapter`."
        )


def merge_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = "auto",
    trust_remote_code: bool = False,
) -> None:
    """
    Adds an adapter to the weights it was trained on, and saves the sum as a model of its own, with the tokenizer.

    In one process and in the host's memory, from what is on disk: the same for every engine, and without a GPU.

    Args:
        adapter (`str` or `Path`): folder of the adapter: a run's `output_dir` or one of its checkpoints.
        output_dir (`str` or `Path`): where to save; what is there is replaced once the new model is whole.
        model (`str`, *optional*): the model it was trained on; the one that the adapter names if not set.
        revision (`str`, *optional*): of that model.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the merged weights; that of the model's
            files if `"auto"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): as in `from_pretrained`.
    """
    from peft import PeftConfig, PeftModel

    model = model or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    with without_zero_init():
        base = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
        )
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    # Under another name until it is whole, so that a merge that was cut off is not taken for one.
    staging = Path(f"{output_dir}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    merged.save_pretrained(staging)
    AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=trust_remote_code).save_pretrained(staging)
    shutil.rmtree(output_dir, ignore_errors=True)
    staging.rename(output_dir)
