"""A task of one's own, by its Python path, and a reward that raises."""

from trl_gspo.tasks import Task


OPTIONS = {"prompt_column": "question", "solution_column": "answer", "reward_funcs": ["exact_match_reward"]}
TASK = Task(OPTIONS)


def make() -> Task:
    return TASK


def raising(completions, **kwargs):
    return [1 / 0 for _ in completions]
