"""The TRL that trainer and config ride on, imported after checking that it is one we know."""

import inspect
import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


# What the parity tests cover. The same range stands in pyproject.toml; a test compares the two.
SUPPORTED_TRL = SpecifierSet(">=1.14.2,<1.17")

# `GRPOConfig` fields that `GSPOConfig` reads or redeclares.
_CONFIG_FIELDS = {
    "beta",
    "deepspeed",
    "disable_dropout",
    "epsilon",
    "epsilon_high",
    "generation_batch_size",
    "generation_kwargs",
    "gradient_accumulation_steps",
    "hub_token",
    "importance_sampling_level",
    "loss_type",
    "max_completion_length",
    "min_p",
    "num_generations",
    "num_iterations",
    "per_device_train_batch_size",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "steps_per_generation",
    "top_k",
    "top_p",
    "use_vllm",
    "vespo_k_neg",
    "vespo_k_pos",
    "vespo_lambda_neg",
    "vespo_lambda_pos",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
}


def _missing_from_host() -> list[str]:
    """What this package builds on and the installed TRL lacks, by name."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except (ImportError, RuntimeError) as error:  # older lazy modules raise the latter
        return [f"GRPOConfig and GRPOTrainer ({error})"]
    missing = [f"GRPOConfig.{name}" for name in sorted(_CONFIG_FIELDS - set(GRPOConfig.__dataclass_fields__))]
    loss = getattr(GRPOTrainer, "_compute_loss", None)
    if loss is None or list(inspect.signature(loss).parameters) != ["self", "model", "inputs"]:
        missing.append("GRPOTrainer._compute_loss(self, model, inputs)")
    elif '"sequence"' not in inspect.getsource(loss):
        missing.append("the sequence-level ratio in GRPOTrainer._compute_loss")
    if not hasattr(GRPOTrainer, "_get_per_token_logps_and_entropies"):
        missing.append("GRPOTrainer._get_per_token_logps_and_entropies")
    return missing


def check_trl() -> None:
    """
    Checks the installed TRL against the range that the parity tests cover.

    Raises:
        ImportError: if TRL is not installed, or is outside the range and lacks what this package builds on.

    Warns:
        UserWarning: if TRL is outside the range but has all that this package builds on.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"trl_gspo needs TRL {SUPPORTED_TRL}: pip install 'trl{SUPPORTED_TRL}'.") from None
    if SUPPORTED_TRL.contains(installed, prereleases=True):
        return
    stands = f"trl_gspo is tested with TRL {SUPPORTED_TRL}, and TRL {installed} is installed"
    missing = _missing_from_host()
    if missing:
        raise ImportError(
            f"{stands}, which lacks {', '.join(missing)}. Install a tested one: pip install 'trl{SUPPORTED_TRL}'."
        )
    warnings.warn(
        f"{stands}. It has what trl_gspo builds on, but its loss was not compared with GSPO's; if in doubt, "
        f"pip install 'trl{SUPPORTED_TRL}'.",
        UserWarning,
        stacklevel=2,
    )


check_trl()

import trl.trainer.utils  # noqa: E402 - only after the check, whose message beats an AttributeError
from trl import GRPOConfig, GRPOTrainer  # noqa: E402 - only after the check, whose message beats an AttributeError
from trl.import_utils import is_vllm_available  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402


# Since TRL 1.15 a model's forward gives log-probabilities at any place, of labels that are shifted already.
HAS_FUSED_HEAD = hasattr(trl.trainer.utils, "add_fused_lm_head")

__all__ = [
    "HAS_FUSED_HEAD",
    "SUPPORTED_TRL",
    "GRPOConfig",
    "GRPOTrainer",
    "check_trl",
    "disable_gradient_checkpointing",
    "is_vllm_available",
    "nanstd",
]
