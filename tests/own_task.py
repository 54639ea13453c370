"""A task of one's own, by its Python path."""

from trl_gspo.tasks import Task


OPTIONS = {"prompt_column": "question", "solution_column": "answer", "reward_funcs": ["exact_match_reward"]}
TASK = Task(OPTIONS)


def make() -> Task:
    return TASK
