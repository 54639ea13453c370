"""Tiny models and data for all tests: made once a session, nothing is downloaded."""

import os
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Rewards such as `tests.varied_reward.share_of_digits` are imported from Python's path, in processes of tests too.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest  # noqa: E402 - the environment has to stand before anything of Hugging Face is imported
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny import make_model, make_tokenizer, sorting_rows  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_path(tokenizer, tmp_path_factory):
    """Folder of a tiny random Qwen3 with its tokenizer."""
    return _save(tokenizer, tmp_path_factory, "qwen3")


@pytest.fixture(scope="session")
def moe_path(tokenizer, tmp_path_factory):
    """Folder of a tiny random Qwen3-MoE with its tokenizer."""
    return _save(tokenizer, tmp_path_factory, "qwen3_moe", moe=True)


@pytest.fixture(scope="session")
def dataset():
    """Sorting prompts with the columns `prompt` and `solution`."""
    return Dataset.from_list(sorting_rows(64, seed=0))


def _save(tokenizer, tmp_path_factory, name, **kwargs):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / name
    make_model(tokenizer, **kwargs).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
