"""GSPO for Hugging Face TRL. Source: Group Sequence Policy Optimization, https://huggingface.co/papers/2507.18071"""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# Resolved on first use: the functional form (`trl_gspo.objective`) must not pay for, or need, TRL.
_LAZY = {
    "GSPOConfig": "config",
    "GSPOTrainer": "trainer",
    "gspo_loss": "objective",
    "token_reward": "credit",
    "turn_reward": "credit",
}

__all__ = ["GSPOConfig", "GSPOTrainer", "gspo_loss", "token_reward", "turn_reward"]

if TYPE_CHECKING:
    from .config import GSPOConfig
    from .credit import token_reward, turn_reward
    from .objective import gspo_loss
    from .trainer import GSPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
