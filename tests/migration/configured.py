"""A GRPO script as people write them: a configuration in the call, with TRL's classes imported two ways."""

import trl
from datasets import load_dataset
from trl import (
    GRPOConfig,  # the training arguments
    ModelConfig,
    get_peft_config,
)

from tests.varied_reward import share_of_digits


def main() -> trl.GRPOTrainer:
    training_args = GRPOConfig(
        output_dir="OUTPUT/Qwen-GRPO",
        # TRL's defaults of a while ago
        epsilon=0.2,
        beta=0.04,
        loss_type="dapo",
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=1,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.GRPOTrainer(
        model="MODEL",
        reward_funcs=share_of_digits,
        args=training_args,
        train_dataset=load_dataset("json", data_files="DATA", split="train"),
        peft_config=get_peft_config(ModelConfig(use_peft=True)),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    trainer = main()
