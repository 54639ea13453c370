# The shortest GRPO script there is: no configuration at all.
from datasets import load_dataset
from trl import GRPOTrainer

from tests.varied_reward import share_of_digits


trainer = GRPOTrainer(
    model="MODEL",
    reward_funcs=share_of_digits,
    train_dataset=load_dataset("json", data_files="DATA", split="train"),
)
trainer.train()
