"""
What becomes of each field of the configurations that `trl_gspo.migration` reads: one table for each system.

A target that starts with `@` is a fact that no single option holds; `migration` makes options of it. What the tables
follow, and at which commit it was read, stands in docs/migration.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .tasks import TASKS


class Row(NamedTuple):
    """What becomes of a field: the option it turns into (`None`: dropped), and why, where that is not plain."""

    to: str | None = None
    why: str = ""
    convert: Callable[[Any], Any] | None = None
    asks: bool = False  # a person has to decide


_NO_PROMPT_LIMIT = "TRL cuts no prompts: leave long ones out of the data."
_OTHER_ENGINE = "Of its own engine; `use_vllm` and the options vllm_... are TRL's."
_OTHER_SHARDING = "Of its own sharding; use accelerate's or DeepSpeed's: configs/deepspeed/zero3.json."
_CRITIC = "GSPO has no critic."
_WATCHED = "The health watch warns and stops, by the bounds health_..."
ONE_OLD_POLICY = (
    "Here the old policy is the one that sampled, and each rollout is trained on for four optimizer steps "
    "(GSPO paper, section 5.1)."
)


_REMOVED_FROM_TRL = "No option of TRL 1.14 to 1.16 any more."

TRL = {
    "torch_dtype": Row("dtype", "Renamed by TRL."),
    "warmup_ratio": Row("warmup_steps", "transformers 5 takes a share below 1 as `warmup_steps`."),
    "evaluation_strategy": Row("eval_strategy", "Renamed by transformers."),
    "use_liger_loss": Row("use_liger_kernel", "Renamed by TRL."),
    "wandb_log_unique_prompts": Row("log_unique_prompts", "Renamed by TRL."),
    "vllm_importance_sampling_cap": Row("vllm_importance_sampling_clip_max", "Renamed by TRL."),
    "use_transformers_paged": Row("use_transformers_continuous_batching", "Renamed by TRL."),
    "vllm_max_model_len": Row("vllm_max_model_length", "Renamed by TRL."),
    "vllm_guided_decoding_regex": Row("vllm_structured_outputs_regex", "Renamed by TRL."),
    "no_cuda": Row("use_cpu", "Renamed by transformers."),
    "reward_model_name_or_path": Row("@reward_model", "A reward model is one of the `reward_funcs`."),
    "steps_per_generation": Row("@steps_per_generation", "Kept, unless it makes one optimizer step a rollout."),
    "generation_batch_size": Row("@generation_batch_size", "As `steps_per_generation`, for the processes at hand."),
    "overwrite_output_dir": Row(None, "Here it deletes checkpoints; the output folder is a new one."),
    "resume_from_checkpoint": Row(None, "A checkpoint of the other run; the new one starts from the model."),
    "ignore_bias_buffers": Row(None, "GRPO never read it."),
    "gradient_checkpointing_use_reentrant": Row(None, _REMOVED_FROM_TRL),
    "max_prompt_length": Row(None, _NO_PROMPT_LIMIT),
    "logging_dir": Row(None, "transformers 5 takes it from the environment: TENSORBOARD_LOGGING_DIR."),
    "use_vespo": Row(None, _REMOVED_FROM_TRL),
    "datasets": Row("@datasets", "One data set becomes `dataset_name`; a mixture has to be made before.", None, True),
    "num_processes": Row("@gpus", "Of the launcher; the batch is divided by them."),
    "model_name": Row("model_name_or_path", "In TRL's example for NeMo Gym."),
    "dataset_path": Row("dataset_name", "In TRL's example for NeMo Gym."),
    "eval_dataset_path": Row("eval_dataset_name", "In TRL's example for NeMo Gym."),
    "project_name": Row(
        "@env WANDB_PROJECT", "In TRL's example for NeMo Gym; Weights & Biases reads the environment."
    ),
    "streaming": Row("dataset_streaming", "Of a mixture; the option for one data set."),
    "test_split_size": Row(
        None, "Slices do it: `dataset_train_split: train[100:]`, `dataset_test_split: train[:100]`."
    ),
}

STATESET = {
    "model_name": Row("model_name_or_path"),
    "cliprange": Row("epsilon"),
    "clip_ratio": Row("epsilon"),
    "clip_range_left": Row("epsilon"),
    "clip_range_right": Row("epsilon_high"),
    "kl_coef": Row("beta"),
    "use_reference_model": Row(
        "@use_reference_model", "Its KL term needs it; TRL loads the reference model if `beta` > 0."
    ),
    "use_gspo_token": Row("@use_gspo_token", "True: `importance_sampling_level: sequence_token`."),
    "rescore_old_log_probs": Row("@rescore", "False: `use_rollout_logps: true`, which needs vLLM."),
    "num_outer_iterations": Row("@rollouts", "Rollouts: times four optimizer steps it is `max_steps`."),
    "generations_per_iteration": Row("@prompts_per_rollout", "Prompts in a rollout; ours holds as many."),
    "mini_batch_size": Row(None, "Its trainer does not read it."),
    "generation_batch_size": Row(None, "Of its sampler; a rollout is sized by `steps_per_generation`."),
    "num_episodes": Row(
        "@episodes", "Divided by `gradient_accumulation_steps`, as its get_total_steps does: `max_steps`."
    ),
    "num_epochs": Row("num_train_epochs"),
    "batch_size": Row("per_device_train_batch_size", "Its alias."),
    "max_examples": Row("@max_examples", "A slice of `dataset_train_split`."),
    "use_lora": Row("use_peft"),
    "use_8bit": Row("load_in_8bit"),
    "use_4bit": Row("load_in_4bit"),
    "warmup_ratio": TRL["warmup_ratio"],
    "wandb_project": Row("@env WANDB_PROJECT", "Weights & Biases reads it from the environment."),
    "wandb_entity": Row("@env WANDB_ENTITY", "As above."),
    "wandb_tags": Row("@env WANDB_TAGS", "As above, with commas."),
    "wandb_notes": Row("@env WANDB_NOTES", "As above."),
    "wandb_run_name": Row("run_name", "Its alias."),
    "advantage_normalization": Row("scale_rewards", "", lambda value: "group" if value else "none"),
    "vllm_max_model_len": Row("vllm_max_model_length"),
    "vllm_enable_prefix_caching": Row(None, _OTHER_ENGINE),
    "vllm_enable_chunked_prefill": Row(None, _OTHER_ENGINE),
    "vllm_quantization": Row(None, _OTHER_ENGINE),
    "max_prompt_length": Row(None, _NO_PROMPT_LIMIT),
    "overwrite_output_dir": TRL["overwrite_output_dir"],
    "gamma": Row(None, "One reward for each completion is not discounted; `step_discount` is for step rewards."),
    "gae_lambda": Row(None, _CRITIC),
    "value_clip": Row(None, _CRITIC),
    "reward_clip": Row(None, "Rewards are normalised in their group; clip in the reward function if they need it."),
    "baseline_type": Row("@baseline", "group_mean is GSPO's."),
    "entropy_coef": Row(
        None, "GSPO has no entropy bonus. TRL's `entropy_coef` is one; every row then goes through the model."
    ),
    "auto_adjust": Row(None, _WATCHED),
    "early_stopping": Row(None, _WATCHED),
    "patience": Row(None, _WATCHED),
    "eval_split_size": Row(None, TRL["test_split_size"].why),
    "stratify_by_task": Row(None, "No counterpart."),
    "data_format": Row(None, "The ending of the file says it."),
    "run_post_eval": Row(None, "Set `eval_strategy` to evaluate."),
    "post_eval_samples": Row(None, "As `run_post_eval`."),
    "post_eval_detailed": Row(None, "As `run_post_eval`."),
    "max_steps_per_episode": Row(None, "Its trainer does not read it."),
}

OWN_DATA = {
    "gsm8k": TASKS["gsm8k"].options,
    "math": {},
    "code": {},
    "mixed": {},
}

STANDALONE = {
    "num_processes": TRL["num_processes"],
    "model_name": Row("model_name_or_path"),
    "left_clip_range": Row("epsilon"),
    "right_clip_range": Row("epsilon_high"),
    "group_size": Row("num_generations"),
    "batch_size": Row("@prompts_per_step", "Prompts in an optimizer step: times `group_size` completions."),
    "mini_batch_size": Row("@prompts_per_micro_batch", "Prompts in a micro-batch: times `group_size` completions."),
    "gradient_accumulation_steps": Row("@accumulation", "Multiplies the prompts of an optimizer step."),
    "grad_accum_steps": Row("@accumulation", "Multiplies the prompts of an optimizer step."),
    "update_frequency": Row(None, f"Epochs until its old policy is refreshed. {ONE_OLD_POLICY}"),
    "dataset": Row("@own_data", "gsm8k is on the hub; the others are made by its own code."),
    "num_train_samples": Row("@max_examples", "A slice of `dataset_train_split`."),
    "train_size": Row("@max_examples", "A slice of `dataset_train_split`."),
    "num_eval_samples": Row("@eval_examples", "A slice of `dataset_test_split`."),
    "eval_size": Row("@eval_examples", "A slice of `dataset_test_split`."),
    "val_split": Row(None, TRL["test_split_size"].why),
    "num_epochs": Row("num_train_epochs"),
    "max_length": Row("max_completion_length", "There it counts the prompt too; here the completion alone."),
    "log_frequency": Row("logging_steps"),
    "eval_frequency": Row("@eval_steps", "`eval_steps`, where there is something to evaluate on."),
    "use_wandb": Row("report_to", "", lambda value: "wandb" if value else "none"),
    "device": Row("use_cpu", "", lambda value: str(value).startswith("cpu")),
    "use_8bit_optimizer": Row("@adam8bit", "`optim: adamw_bnb_8bit`."),
    "use_gradient_checkpointing": Row("gradient_checkpointing"),
    "reward_normalization": Row(None, "Rewards are normalised in their group."),
    "advantage_normalization": STATESET["advantage_normalization"],
    "early_stopping_patience": Row(None, _WATCHED),
    "use_curriculum": Row(None, "No counterpart: order the data, with `shuffle_dataset: false`."),
    "curriculum_threshold": Row(None, "As `use_curriculum`."),
}

ACTOR = "actor_rollout_ref.actor."
MODEL = "actor_rollout_ref.model."
ROLLOUT = "actor_rollout_ref.rollout."

VERL = {
    MODEL + "path": Row("model_name_or_path"),
    MODEL + "trust_remote_code": Row("trust_remote_code"),
    MODEL + "enable_gradient_checkpointing": Row("gradient_checkpointing"),
    MODEL + "lora_rank": Row("@lora_rank", "0 is no adapter; else `use_peft` and `lora_r`."),
    MODEL + "lora_alpha": Row("lora_alpha"),
    MODEL + "target_modules": Row("lora_target_modules"),
    MODEL + "use_liger": Row("use_liger_kernel"),
    MODEL + "use_remove_padding": Row(None, "`pack_live_tokens` leaves out padding, and is on."),
    MODEL + "use_fused_kernels": Row(None, "TRL's head is fused already."),
    MODEL + "enable_activation_offload": Row(None, _OTHER_SHARDING),
    MODEL + "use_shm": Row(None, _OTHER_SHARDING),
    MODEL + "external_lib": Row(None, "Import it in a script of your own."),
    MODEL + "override_config": Row(None, "`model_init_kwargs` goes to from_pretrained."),
    "data.train_files": Row("@train_files", "`dataset_name`, if it is one file."),
    "data.val_files": Row("@val_files", "`eval_dataset_name`, if it is one file and `trainer.test_freq` is set."),
    "data.prompt_key": Row("prompt_column"),
    "data.train_batch_size": Row("@prompts_per_rollout", "Prompts in a rollout."),
    "data.max_prompt_length": Row(None, _NO_PROMPT_LIMIT),
    "data.max_response_length": Row("max_completion_length"),
    "data.shuffle": Row("shuffle_dataset"),
    "data.seed": Row("data_seed"),
    "data.trust_remote_code": Row(None, "As `actor_rollout_ref.model.trust_remote_code`."),
    "data.truncation": Row(None, _NO_PROMPT_LIMIT),
    "data.filter_overlong_prompts": Row(None, _NO_PROMPT_LIMIT),
    "data.filter_overlong_prompts_workers": Row(None, _NO_PROMPT_LIMIT),
    "data.dataloader_num_workers": Row("dataloader_num_workers"),
    "data.apply_chat_template_kwargs": Row("chat_template_kwargs"),
    "data.reward_fn_key": Row(None, "Rewards are named in `reward_funcs`."),
    "data.val_batch_size": Row(None, "`per_device_eval_batch_size` counts completions."),
    ACTOR + "optim.lr": Row("learning_rate"),
    ACTOR + "optim.lr_warmup_steps": Row(
        "@warmup_steps", "Counted in rollouts there: times the minibatches of one here."
    ),
    ACTOR + "optim.lr_warmup_steps_ratio": Row("@warmup_ratio", "A share below 1 is `warmup_steps` too."),
    ACTOR + "optim.weight_decay": Row("weight_decay"),
    ACTOR + "optim.betas": Row("@betas", "`adam_beta1` and `adam_beta2`."),
    ACTOR + "optim.clip_grad": Row("max_grad_norm"),
    ACTOR + "optim.warmup_style": Row("@schedule", "constant: `constant_with_warmup`."),
    ACTOR + "optim.lr_scheduler_type": Row("@schedule", "constant: `constant_with_warmup`."),
    ACTOR + "optim.min_lr_ratio": Row(None, "`lr_scheduler_type: cosine_with_min_lr` has it."),
    ACTOR + "optim.num_cycles": Row(None, "`lr_scheduler_kwargs` has it."),
    ACTOR + "optim.total_training_steps": Row(None, "`max_steps` says it."),
    ACTOR + "grad_clip": Row("max_grad_norm"),
    ACTOR + "strategy": Row(None, _OTHER_SHARDING),
    ACTOR + "ppo_mini_batch_size": Row(
        "@prompts_per_step", "Prompts in an optimizer step: times `rollout.n` completions."
    ),
    ACTOR + "ppo_micro_batch_size_per_gpu": Row(
        "@completions_per_micro_batch", "Completions of one process in a forward."
    ),
    ACTOR + "ppo_micro_batch_size": Row("@completions_of_all", "The same over all processes."),
    ACTOR + "use_dynamic_bsz": Row(
        "@dynamic", "Micro-batches by tokens: here rows are packed and balanced by tokens anyway."
    ),
    ACTOR + "ppo_max_token_len_per_gpu": Row(None, "As `use_dynamic_bsz`."),
    ACTOR + "ppo_epochs": Row("num_iterations"),
    ACTOR + "shuffle": Row(None, "TRL draws the minibatches of a rollout at random."),
    ACTOR + "clip_ratio": Row("@clip_ratio", "Both sides, where low and high do not say otherwise."),
    ACTOR + "clip_ratio_low": Row("epsilon"),
    ACTOR + "clip_ratio_high": Row("epsilon_high"),
    ACTOR + "clip_ratio_c": Row(None, "Its GSPO loss does not read it; TRL's `delta` bounds the ratio from above."),
    ACTOR + "policy_loss.loss_mode": Row(
        "@loss_mode",
        "gspo: `importance_sampling_level: sequence`. It has the gradient of GSPO-token, "
        "which is GSPO's where a completion has one advantage.",
    ),
    ACTOR + "loss_agg_mode": Row("@loss_agg_mode", "seq-mean-token-mean is `loss_type: grpo`."),
    ACTOR + "entropy_coeff": Row("@entropy", "0 is the default; else TRL's `entropy_coef`."),
    ACTOR + "use_kl_loss": Row("@use_kl_loss", "False: `beta` is 0."),
    ACTOR + "kl_loss_coef": Row("@kl_loss_coef", "`beta`, with `use_kl_loss`."),
    ACTOR + "kl_loss_type": Row(None, "TRL's estimator is k3, low_var_kl there."),
    ACTOR + "freeze_vision_tower": Row(None, "No counterpart."),
    ACTOR + "tis_imp_ratio_cap": Row(None, "TRL has `vllm_importance_sampling_correction`."),
    ROLLOUT + "n": Row("num_generations"),
    ROLLOUT + "name": Row("@engine", "vllm and sglang: `use_vllm`; hf: generation by transformers."),
    ROLLOUT + "temperature": Row("temperature"),
    ROLLOUT + "top_p": Row("top_p"),
    ROLLOUT + "top_k": Row("top_k", "-1 there is 0 here: no limit.", lambda value: max(int(value), 0)),
    ROLLOUT + "prompt_length": Row(None, _NO_PROMPT_LIMIT),
    ROLLOUT + "response_length": Row("max_completion_length"),
    ROLLOUT + "gpu_memory_utilization": Row("vllm_gpu_memory_utilization"),
    ROLLOUT + "tensor_model_parallel_size": Row("vllm_tensor_parallel_size"),
    ROLLOUT + "max_model_len": Row("vllm_max_model_length"),
    ROLLOUT + "free_cache_engine": Row("vllm_enable_sleep_mode"),
    "algorithm.adv_estimator": Row("@adv_estimator", "grpo is GSPO's; others are not."),
    "algorithm.norm_adv_by_std_in_grpo": Row("scale_rewards", "", lambda value: "group" if value else "none"),
    "algorithm.use_kl_in_reward": Row("@kl_in_reward", "TRL has the KL term in the loss alone."),
    "algorithm.kl_ctrl.kl_coef": Row("@kl_ctrl", "Read with `use_kl_in_reward`."),
    "algorithm.gamma": Row(None, STATESET["gamma"].why),
    "algorithm.lam": Row(None, _CRITIC),
    "algorithm.kl_penalty": Row(None, "Of the KL term in the reward."),
    "trainer.total_epochs": Row("num_train_epochs"),
    "trainer.total_training_steps": Row("@rollouts", "Rollouts: times the minibatches of one it is `max_steps`."),
    "trainer.save_freq": Row("@save_freq", "Rollouts: times the minibatches of one; -1 is never."),
    "trainer.test_freq": Row("@test_freq", "Rollouts: times the minibatches of one; -1 is never."),
    "trainer.val_before_train": Row("@eval_on_start", "`eval_on_start`, where `trainer.test_freq` is set."),
    "trainer.logger": Row("@loggers", "`report_to`; the console is always on."),
    "trainer.project_name": Row("@env WANDB_PROJECT", STATESET["wandb_project"].why),
    "trainer.experiment_name": Row("run_name"),
    "trainer.default_local_dir": Row("output_dir"),
    "trainer.n_gpus_per_node": Row("@gpus", "Processes: the batch is divided by them."),
    "trainer.nnodes": Row("@nodes", "Processes: the batch is divided by them."),
    "trainer.max_actor_ckpt_to_keep": Row("save_total_limit"),
    "trainer.log_val_generations": Row(None, "`log_completions: true` logs those of the training."),
    "trainer.resume_mode": Row(None, "--resume goes on from the last checkpoint."),
    "trainer.critic_warmup": Row(None, _CRITIC),
    "trainer.balance_batch": Row(None, "Rows are balanced between ranks by tokens."),
    "trainer.device": Row("use_cpu", "", lambda value: str(value) == "cpu"),
    "custom_reward_function.path": Row(
        None,
        "Signature differs: TRL's get completions and columns, and return a list. Wrap it, and name it in "
        "`reward_funcs`.",
        None,
        True,
    ),
    "custom_reward_function.name": Row(None, "As `custom_reward_function.path`."),
}

# Whole sections of verl's configuration, the longest name first.
VERL_SECTIONS = {
    ACTOR + "fsdp_config": _OTHER_SHARDING,
    ACTOR + "megatron": _OTHER_SHARDING,
    ACTOR + "ulysses_sequence_parallel_size": _OTHER_SHARDING,
    ACTOR + "optim": "Of its own optimizer.",
    ACTOR + "checkpoint": "`save_only_model: true` saves the weights alone.",
    ACTOR + "policy_loss": "Of other losses.",
    ACTOR + "profiler": "No counterpart.",
    ACTOR + "entropy_checkpointing": "TRL's head computes entropies in chunks.",
    ACTOR + "entropy_from_logits_with_chunking": "TRL's head computes entropies in chunks.",
    ACTOR + "use_torch_compile": "`torch_compile` compiles the model; nothing is packed then.",
    ACTOR + "use_fused_kernels": VERL[MODEL + "use_fused_kernels"].why,
    ACTOR + "use_remove_padding": VERL[MODEL + "use_remove_padding"].why,
    ROLLOUT.rstrip("."): _OTHER_ENGINE,
    MODEL.rstrip("."): "Of its own model loading.",
    "actor_rollout_ref.ref": "TRL loads the reference model if `beta` > 0, and shards it as the model.",
    "actor_rollout_ref.hybrid_engine": _OTHER_ENGINE,
    "actor_rollout_ref.nccl_timeout": "`ddp_timeout` is transformers'.",
    "algorithm.filter_groups": "TRL does not sample again.",
    "algorithm.kl_ctrl": "Of the KL term in the reward.",
    "algorithm.pf_ppo": "Of another algorithm.",
    "algorithm.use_pf_ppo": "Of another algorithm.",
    "algorithm.rollout_correction": "TRL has `vllm_importance_sampling_correction`.",
    "critic": _CRITIC,
    "reward_model": "Rewards are named in `reward_funcs`.",
    "reward": "Rewards are named in `reward_funcs`.",
    **dict.fromkeys(
        (
            "data.tokenizer",
            "data.use_shm",
            "data.return_raw_input_ids",
            "data.return_raw_chat",
            "data.return_full_prompt",
            "data.return_multi_modal_inputs",
            "data.validation_shuffle",
            "data.image_key",
            "data.video_key",
            "data.custom_cls",
            "data.sampler",
            "data.datagen",
        ),
        "Of its own data loader.",
    ),
    **dict.fromkeys(
        (
            "trainer.esi_redundant_time",
            "trainer.rollout_data_dir",
            "trainer.validation_data_dir",
            "trainer.val_only",
            "trainer.resume_from_path",
            "trainer.default_hdfs_dir",
            "trainer.del_local_ckpt_after_load",
            "trainer.max_critic_ckpt_to_keep",
            "trainer.ray_wait_register_center_timeout",
            "trainer.use_legacy_worker_impl",
        ),
        "No counterpart.",
    ),
    "global_profiler": "No counterpart.",
    "ray_init": "accelerate starts the processes.",
    "ray_kwargs": "accelerate starts the processes.",
    "transfer_queue": "No counterpart.",
    "defaults": "Of Hydra. Give the composed configuration: `python -m verl.trainer.main_ppo ... --cfg job`.",
    "hydra": "Of Hydra.",
    "--config-path": "Of Hydra.",
    "--config-name": "Of Hydra.",
}

SWIFT_REWARDS = {
    "accuracy": "accuracy_reward",
    "format": "think_format_reward",
    "cosine": "get_cosine_scaled_reward",
    "repetition": "get_repetition_penalty_reward",
    "soft_overlong": "get_soft_overlong_punishment",
}

SWIFT = {
    "model": Row("model_name_or_path"),
    "torch_dtype": Row("dtype"),
    "attn_impl": Row("attn_implementation", "", lambda value: {"flash_attn": "flash_attention_2"}.get(value, value)),
    "rlhf_type": Row("@rlhf_type", "Has to be grpo."),
    "train_type": Row("@tuner", "lora is its default: `use_peft`."),
    "tuner_type": Row("@tuner", "lora is its default: `use_peft`."),
    "sft_type": Row("@tuner", "lora is its default: `use_peft`."),
    "lora_rank": Row("lora_r"),
    "target_modules": Row(
        "lora_target_modules", "", lambda value: "all-linear" if value in ("DEFAULT", ["DEFAULT"]) else value
    ),
    "modules_to_save": Row("lora_modules_to_save"),
    "quant_method": Row("@quant_method", "bnb: `load_in_4bit` or `load_in_8bit`, by `quant_bits`."),
    "quant_bits": Row("@quant_bits", "With `quant_method: bnb`."),
    "bnb_4bit_use_double_quant": Row("use_bnb_nested_quant"),
    "bnb_4bit_compute_dtype": Row(None, "TRL computes in `dtype`."),
    "dataset": Row("@dataset", "One of them, with `#n` as a slice of `dataset_train_split`."),
    "val_dataset": Row("@val_dataset", "`eval_dataset_name`."),
    "split_dataset_ratio": Row(None, TRL["test_split_size"].why),
    "columns": Row("@columns", "`prompt_column` and `solution_column`."),
    "system": Row("system_prompt"),
    "reward_funcs": Row(
        "@reward_funcs",
        "accuracy, format, cosine, repetition and soft_overlong have TRL's names; plugins are functions of your own.",
    ),
    "reward_model": Row("@reward_model", TRL["reward_model_name_or_path"].why),
    "external_plugins": Row(None, "Name its functions in `reward_funcs`, as package.module.function.", None, True),
    "soft_cache_length": Row("@soft_cache_length", "`reward_kwargs` of get_soft_overlong_punishment."),
    "soft_max_length": Row("@soft_max_length", "`reward_kwargs` of get_soft_overlong_punishment."),
    "steps_per_generation": TRL["steps_per_generation"],
    "generation_batch_size": TRL["generation_batch_size"],
    "overlong_filter": Row("mask_truncated_completions"),
    "warmup_ratio": TRL["warmup_ratio"],
    "vllm_max_model_len": Row("vllm_max_model_length"),
    "sleep_level": Row("vllm_enable_sleep_mode", "", lambda value: int(value) > 0),
    "deepspeed": Row("@deepspeed", "zero3 is configs/deepspeed/zero3.json."),
    "NPROC_PER_NODE": Row("@gpus", "Processes: the batch is divided by them."),
    "NNODES": Row("@nodes", "Processes: the batch is divided by them."),
    "max_length": Row(None, _NO_PROMPT_LIMIT),
    "truncation_strategy": Row(None, _NO_PROMPT_LIMIT),
    "max_new_tokens": Row("max_completion_length", "Its older name."),
    "response_length": Row("max_completion_length", "Its older name."),
    "dynamic_sample": Row(
        None, "TRL does not sample again; groups of equal rewards cost nothing in the loss step here."
    ),
    "max_resample_times": Row(None, "As `dynamic_sample`."),
    "offload_optimizer": Row(None, "`vllm_enable_sleep_mode` and DeepSpeed's offloading are TRL's ways."),
    "offload_model": Row(None, "As `offload_optimizer`."),
    "gc_collect_after_offload": Row(None, "As `offload_optimizer`."),
    "move_model_batches": Row(None, "As `offload_optimizer`."),
    "log_entropy": Row(None, "TRL logs the entropy always."),
    "advantage_estimator": Row("@adv_estimator", "grpo is GSPO's; others are not."),
    "kl_in_reward": Row("@kl_in_reward", "TRL has the KL term in the loss alone."),
    "load_from_cache_file": Row(None, "The library `datasets` keeps a cache by itself."),
    "dataset_num_proc": Row(None, "The library `datasets` reads in one process here."),
    "dataset_shuffle": Row("shuffle_dataset"),
    "train_dataloader_shuffle": Row("shuffle_dataset"),
    "model_type": Row(None, "transformers reads it from the model."),
    "template": Row(None, "The chat template is the tokenizer's."),
    "use_hf": Row(None, "Models and data come from the Hugging Face hub."),
    "check_model": Row(None, "No counterpart."),
    "add_version": Row(None, "The output folder is used as it is."),
    "tuner_backend": Row(None, "PEFT."),
    "async_generate": Row(None, "No counterpart."),
    "multi_turn_scheduler": Row(None, "TRL's are `environment_factory` and `tools`, in a script.", None, True),
    "max_turns": Row(None, "`max_tool_calling_iterations` limits TRL's tool calls."),
    "padding_free": Row(None, VERL[MODEL + "use_remove_padding"].why),
    "sequence_parallel_size": Row(None, "GRPO of TRL has no sequence parallelism."),
    "vllm_max_num_seqs": Row(None, _OTHER_ENGINE),
    "vllm_enforce_eager": Row(None, _OTHER_ENGINE),
    "vllm_enable_prefix_caching": Row(None, _OTHER_ENGINE),
    "vllm_limit_mm_per_prompt": Row(None, _OTHER_ENGINE),
    "vllm_disable_custom_all_reduce": Row(None, _OTHER_ENGINE),
    "ref_model": Row(None, "TRL's reference is the model at the start."),
    "CUDA_VISIBLE_DEVICES": Row(None, "Set it before `accelerate launch`."),
}

SYSTEMS = {"trl": TRL, "stateset": STATESET, "standalone": STANDALONE, "verl": VERL, "ms-swift": SWIFT}

NAMES = {
    "trl": "TRL",
    "stateset": "stateset-agents",
    "standalone": "a stand-alone GSPO script",
    "verl": "verl",
    "ms-swift": "ms-swift",
}

# A value that only this system knows.
TELLING = {("importance_sampling_level", "sequence_token"): "ms-swift", ("rlhf_type", "grpo"): "ms-swift"}

# What the source does where its configuration is silent, and TRL something else.
DEFAULTS = {
    "stateset": {
        "use_peft": True,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "temperature": 0.7,
        "top_p": 0.9,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    },
    "standalone": {"num_generations": 4, "logging_steps": 5},
    "verl": {
        "use_vllm": True,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant_with_warmup",
        "prompt_column": "prompt",
    },
    "ms-swift": {
        "use_peft": True,
        "lora_r": 8,
        "lora_target_modules": "all-linear",
        "temperature": 0.9,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 5,
    },
}


# TRL's names that a stand-alone script uses for the same thing.
STANDALONE_SHARED = {"learning_rate", "output_dir", "seed", "max_grad_norm", "weight_decay", "temperature", "beta"}
