"""
TRL's GRPOTrainer on the demo's task, with its flag for a sequence-level ratio, and nothing else of GSPO.

    python scripts/demo.py prepare
    python tests/migration/flag.py
    python scripts/migrate.py tests/migration/flag.py
"""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from trl_gspo.rewards import exact_match_reward


training_args = GRPOConfig(
    output_dir="outputs/flag-grpo",
    importance_sampling_level="sequence",
    num_generations=16,
    per_device_train_batch_size=256,
    max_completion_length=6,
    learning_rate=2e-4,
    max_steps=80,
    logging_steps=4,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
)
trainer = GRPOTrainer(
    model="outputs/tiny/base",
    reward_funcs=exact_match_reward,
    args=training_args,
    train_dataset=load_dataset("json", data_files="outputs/tiny/data/train.jsonl", split="train"),
)
trainer.train()

logs = [entry for entry in trainer.state.log_history if "reward" in entry]
clipped = [entry["clip_ratio/region_mean"] for entry in logs]
print(f"{type(trainer).__name__}: clipped {sum(clipped) / len(clipped):.4f}")
print(f"reward {logs[0]['reward']:.3f} -> {logs[-1]['reward']:.3f}, in {trainer.state.global_step} steps")
