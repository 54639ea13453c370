#!/usr/bin/env bash
set -xeuo pipefail

export GPUS_PER_NODE=8
NNODES=${SLURM_JOB_NUM_NODES:-1}
loss_mode=gspo
MODEL_PATH=Qwen/Qwen2.5-3B-Instruct
offload=false # it's a small model
clip_ratio_low=0.0003 # the paper, section 5.1
clip_ratio_high=0.0004
max_response_length=$((1024 * 8))
experiment="${loss_mode}-${clip_ratio_low}"
train_path=/data/gsm8k/train.parquet
train_files="['$train_path']"
OFFLOAD="
    actor_rollout_ref.actor.fsdp_config.param_offload=$offload \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=$offload"

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.actor.policy_loss.loss_mode=${loss_mode} \
    actor_rollout_ref.actor.loss_agg_mode="seq-mean-token-mean" \
    data.train_files="${train_files}" \
    data.prompt_key=prompt \
    data.train_batch_size=512 \
    data.max_response_length=${max_response_length} \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.top_k=-1 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.kl_loss_coef=0.0 \
    actor_rollout_ref.actor.clip_ratio_low=${clip_ratio_low} \
    actor_rollout_ref.actor.clip_ratio_high=${clip_ratio_high} \
    actor_rollout_ref.actor.clip_ratio_c=10.0 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.05 \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.model.path="${MODEL_PATH}" \
    +reward_model.reward_kwargs.max_resp_len=$((max_response_length / 2)) \
    trainer.logger='["console","wandb"]' \
    trainer.project_name='RL-GSPO' \
    trainer.experiment_name="${experiment}" \
    trainer.n_gpus_per_node="${GPUS_PER_NODE}" \
    trainer.nnodes="${NNODES}" \
    trainer.test_freq=10 \
    trainer.save_freq=10 \
    trainer.total_training_steps=500 \
    trainer.default_local_dir="/checkpoints/${experiment}" \
    ${OFFLOAD} $@
