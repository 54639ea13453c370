"""
`scripts/validate.py`: green on this tree, red where a line of trl_gspo or of TRL is wrong, with the right check named.

A fault is a line of source and what stands there instead. The code of the patched file takes the place of the running
one's, so that whoever imported a function has it, too; `test_patched_installation_is_red` does the same on disk, in a
process of its own, as somebody with a broken installation has it.
"""

import importlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest
import validate
from conftest import ROOT
from validate import Check, Result, Seen, Setting, SkippedError

from trl_gspo.host import HAS_FUSED_HEAD


needs_packing = pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL 1.15 is the first whose head takes packed rows")


class Fault(NamedTuple):
    """
    Args:
        module (`str`): whose source is wrong.
        line (`str`): stands there once.
        wrong (`str`): what stands there instead.
        figure (`str`): that must be out of its bound; a check that raises has no figure, and is named itself.
    """

    module: str
    line: str
    wrong: str
    figure: str


OBJECTIVE, TRAINER, DIAGNOSTICS = "trl_gspo.objective", "trl_gspo.trainer", "trl_gspo.diagnostics"
CONFIG, PACKING, CREDIT, HOST = "trl_gspo.config", "trl_gspo.packing", "trl_gspo.credit", "trl.trainer.grpo_trainer"

FAULTS = {
    # objective
    "no_exp": Fault(
        OBJECTIVE,
        "ratio = torch.exp(log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))",
        "ratio = 1 + log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)",
        "objective/sequence/loss",
    ),
    "sum_for_mean": Fault(
        OBJECTIVE,
        "return log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)",
        "return log_ratio.sum(-1, keepdim=True)",
        "objective/sequence/ratio",
    ),
    "one_unit_for_all_turns": Fault(
        OBJECTIVE,
        "return (starts.cumsum(-1) - 1).masked_fill(~mask, -1)",
        "return (starts.cumsum(-1) * 0).masked_fill(~mask, -1)",
        "objective/turn/ratio",
    ),
    "gradient_of_tokens_doubled": Fault(
        OBJECTIVE,
        "return (logps - logps.detach()) + at_tokens(mean, ids)",
        "return 2 * (logps - logps.detach()) + at_tokens(mean, ids)",
        "objective/turn/gradient",
    ),
    # masks
    "padding_in_the_length": Fault(
        OBJECTIVE,
        "/ mask.sum(-1, keepdim=True).clamp(min=1)",
        "/ mask.size(-1)",
        "objective/sequence/ratio",
    ),
    "mask_multiplies": Fault(
        OBJECTIVE,
        "log_ratio = log_ratio.masked_fill(~mask, 0.0)",
        "log_ratio = log_ratio * mask",
        "objective/padding/garbage",
    ),
    "empty_row_divides_by_0": Fault(
        OBJECTIVE,
        "~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)",
        "~mask, 0.0).sum(-1) / mask.sum(-1)",
        "objective/padding/all_masked",
    ),
    "tool_mask_ignored": Fault(
        TRAINER,
        'return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask',
        "return mask",
        "trainer/turn/whole/gradient",
    ),
    "tool_mask_ignored_by_trl": Fault(
        HOST,
        'mask = completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]\n\n',
        "mask = completion_mask\n\n",
        "host/reference/gradient",
    ),
    # normaliser
    "weighted_by_length": Fault(
        OBJECTIVE,
        "return per_sequence_loss.mean(), GSPOStatistics(",
        "return (per_sequence_loss.view(len(mask), -1).mean(-1) * mask.sum(-1)).sum() / mask.sum(), GSPOStatistics(",
        "objective/turn/loss",
    ),
    "mean_over_tokens_in_trl": Fault(
        HOST,
        "loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()",
        "loss = (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)",
        "host/reference/gradient",
    ),
    "accumulation_not_divided_in_trl": Fault(
        HOST,
        ".clamp(min=1.0)).mean()\n            normalizer = self.current_gradient_accumulation_steps if",
        ".clamp(min=1.0)).mean()\n            normalizer = 1.0 if",
        "host/rollout/weights",
    ),
    # clip
    "sign_of_the_advantage": Fault(
        OBJECTIVE,
        "return (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)",
        "return (ratio < 1 - epsilon_low) & (advantages > 0), (ratio > 1 + epsilon_high) & (advantages < 0)",
        "objective/clip/gradient",
    ),
    "sides_swapped": Fault(
        OBJECTIVE,
        "return (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)",
        "return (ratio < 1 - epsilon_high) & (advantages < 0), (ratio > 1 + epsilon_low) & (advantages > 0)",
        "objective/clip/counts",
    ),
    "max_for_min_in_trl": Fault(
        HOST,
        "per_token_loss = -torch.min(per_token_loss1, per_token_loss2)",
        "per_token_loss = -torch.max(per_token_loss1, per_token_loss2)",
        "host/reference/gradient",
    ),
    "sides_swapped_in_trl": Fault(
        HOST,
        "coef_2 = torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "coef_2 = torch.clamp(coef_1, 1 - self.epsilon_high, 1 + self.epsilon_low)",
        "host/reference/gradient",
    ),
    # metric sums
    "dead_rows_counted": Fault(
        DIAGNOSTICS,
        'is_live = units["sides"] > 0\n    live = ',
        'is_live = units["sides"] >= 0\n    live = ',
        "trainer/sequence/whole/metrics",
    ),
    "blind_to_the_sign": Fault(
        OBJECTIVE,
        "(m & is_trained for m in clip_masks(ratio, advantages, epsilon_low, epsilon_high))",
        "(m & is_trained for m in (ratio < 1 - epsilon_low, ratio > 1 + epsilon_high))",
        "trainer/sequence/whole/metrics",
    ),
    "last_micro_batch_alone": Fault(
        DIAGNOSTICS,
        "self._units.append(rows)",
        "self._units = [rows]",
        "rollout/sequence/metrics",
    ),
    "minibatches_not_told_apart": Fault(
        TRAINER,
        "minibatch=self.state.global_step - self._rollout_step if is_training else 0",
        "minibatch=0",
        "rollout/sequence/metrics",
    ),
    # defaults
    "epsilon_of_tokens": Fault(
        CONFIG, "epsilon: float = field(\n        default=EPSILON_LOW", "epsilon: float = field(\n        default=0.2",
        "config/defaults/paper",
    ),
    "dapo": Fault(
        CONFIG, 'loss_type: str = field(\n        default="grpo"', 'loss_type: str = field(\n        default="dapo"',
        "config/defaults",
    ),
    "dapo_accepted": Fault(
        CONFIG, '_LOSS_TYPES = ("grpo", "luspo")', '_LOSS_TYPES = ("grpo", "luspo", "dapo")', "config/refusals"
    ),
    "one_step_a_rollout": Fault(
        CONFIG, "MINIBATCHES_PER_ROLLOUT = 4", "MINIBATCHES_PER_ROLLOUT = 1", "config/defaults/paper"
    ),
    "dropout_by_default": Fault(
        CONFIG,
        "disable_dropout: bool = field(\n        default=True",
        "disable_dropout: bool = field(\n        default=False",
        "config/defaults/paper",
    ),
    "dropout_of_attention": Fault(
        TRAINER, "                setattr(module, name, 0.0)", "                pass", "config/dropout/off"
    ),
    # advantages and credit
    "not_divided_by_the_deviation_in_trl": Fault(
        HOST,
        "                advantages = advantages / (std_rewards + 1e-4)\n            is_std_zero",
        "                pass\n            is_std_zero",
        "host/rollout/advantages",
    ),
    "mean_of_all_groups_in_trl": Fault(
        HOST,
        "            advantages = rewards - mean_grouped_rewards\n",
        "            advantages = rewards - rewards.mean()\n",
        "host/rollout/advantages",
    ),
    "credit_to_later_tokens": Fault(
        CREDIT,
        "return normalized.flip(-1).cumsum(-1).flip(-1)",
        "return normalized.cumsum(-1)",
        "rollout/turn/advantages",
    ),
    "steps_divided_by_the_variance": Fault(
        CREDIT,
        "return centred / (variance.sqrt() + _EPSILON)",
        "return centred / (variance + _EPSILON)",
        "rollout/turn/advantages",
    ),
    # what goes through the model
    "old_logps_in_half_precision": Fault(
        TRAINER,
        'batch["old_per_token_logps"] = _at_least_float32(logps)\n            if experts',
        'batch["old_per_token_logps"] = _at_least_float32(logps.bfloat16())\n            if experts',
        "rollout/sequence/old_logps",
    ),
    "negative_advantages_dead": Fault(
        TRAINER,
        "if advantages.dim() == 1 else advantages) != 0",
        "if advantages.dim() == 1 else advantages) > 0",
        "trainer/sequence/packed/gradient",
    ),
    "wrong_positions": Fault(
        PACKING,
        "torch.from_numpy(tokens % columns)",
        "torch.from_numpy(tokens % columns * 2)",
        "trainer/sequence/packed",
    ),
    "scattered_one_off": Fault(
        PACKING,
        "torch.from_numpy(row * wanted.shape[1] + column)",
        "torch.from_numpy(row * wanted.shape[1] + (column + 1) % wanted.shape[1])",
        "trainer/sequence/packed",
    ),
    "token_predicts_itself": Fault(
        PACKING,
        "input_ids.flatten()[self.tokens[self.sources] + 1]",
        "input_ids.flatten()[self.tokens[self.sources]]",
        "trainer/sequence/packed",
    ),
    "attention_sees_the_next_token": Fault(
        "trl_gspo.attention", "is_seen = distance >= 0", "is_seen = distance >= -1", "attention/eager/float32"
    ),
    "controller_turned_round": Fault(
        "trl_gspo.clip_range",
        "np.expm1(np.quantile(above, 1 - share))",
        "np.expm1(np.quantile(above, share))",
        "trainer/controller/clip_fraction",
    ),
}  # fmt: skip
OF_PACKING = {"old_logps_in_half_precision", "negative_advantages_dead"} | {
    name for name, fault in FAULTS.items() if fault.module in (PACKING, "trl_gspo.attention")
}


def cases(names):
    return [pytest.param(FAULTS[name], id=name, marks=[needs_packing] if name in OF_PACKING else []) for name in names]


def source_of(module):
    """File and text of an imported or installed module."""
    path = Path(importlib.util.find_spec(module).origin)
    return path, path.read_text()


def patched_source(fault):
    _, source = source_of(fault.module)
    assert source.count(fault.line) == 1, f"{fault.line!r} stands {source.count(fault.line)} times in {fault.module}"
    return source.replace(fault.line, fault.wrong)


def functions_of(module):
    """Functions of a module and methods of its classes, those that decorators wrap too."""
    found = []
    for holder in (module, *(value for value in vars(module).values() if isinstance(value, type))):
        if holder is not module and holder.__module__ != module.__name__:
            continue
        for value in vars(holder).values():
            value = value.fget if isinstance(value, property) else value
            while value is not None:
                if isinstance(value, FunctionType):
                    found.append(value)
                value = getattr(value, "__wrapped__", None)
    return [function for function in found if function.__module__ == module.__name__]


def codes_in(code):
    """Code objects of all functions in `code`, by name and first line."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    found = {(one.co_name, one.co_firstlineno): one for one in inner}
    for one in inner:
        found |= codes_in(one)
    return found


def break_functions(fault, monkeypatch):
    """Puts the code of the patched source into the functions that differ."""
    path, _ = source_of(fault.module)
    codes = codes_in(compile(patched_source(fault), str(path), "exec"))
    functions = functions_of(importlib.import_module(fault.module))
    keys = {function: (function.__code__.co_name, function.__code__.co_firstlineno) for function in functions}
    broken = [function for function in functions if codes.get(keys[function], function.__code__) != function.__code__]
    assert broken
    for function in broken:
        monkeypatch.setattr(function, "__code__", codes[keys[function]])


def break_config(fault, monkeypatch):
    """Defaults of a dataclass are in no function's code: the class of the patched source takes its place."""
    module = importlib.util.module_from_spec(importlib.util.find_spec(CONFIG))
    monkeypatch.setitem(sys.modules, CONFIG, module)  # where `dataclass` looks for the module of its class
    exec(compile(patched_source(fault), "patched config.py", "exec"), vars(module))  # noqa: S102
    monkeypatch.setattr(validate, "GSPOConfig", module.GSPOConfig)


def results_of(checks, setting):
    with validate.quiet():
        return {result.name: result for check in checks for result in validate.run_check(check, setting)}


def check_of(figure):
    """The check that sees a figure."""
    (check,) = (check for check in validate.technical_checks("cpu") if f"{figure}/".startswith(f"{check.name}/"))
    return check


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("validate"))


CODES = {
    function: function.__code__
    for module in {fault.module for fault in FAULTS.values()}
    for function in functions_of(importlib.import_module(module))
}


@pytest.fixture
def restored():
    """Afterwards the code that runs is that of the files."""
    yield
    assert all(function.__code__ is code for function, code in CODES.items())
    assert validate.GSPOConfig is importlib.import_module("trl_gspo").GSPOConfig


# ---- green and red


@needs_packing
def test_this_tree_is_green_and_its_report_says_so(tmp_path, capsys):
    assert validate.main(["--quick", "--cpu", "--output", str(tmp_path)]) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "validate.md").read_text()
    lines = [line for line in printed.splitlines() if line.startswith(("ok ", "FAIL ", "skipped "))]
    states = {line.split()[1]: line.split()[0] for line in lines}
    names = [check.name for check in validate.technical_checks("cpu")]
    assert all(any(f"{seen}/".startswith(f"{name}/") for seen in states) for name in names)
    assert all(state == ("skipped" if "/flash" in name or "/flex" in name else "ok") for name, state in states.items())
    # Each figure that a fault has to move was there to be moved.
    assert {fault.figure for fault in FAULTS.values()} - states.keys() <= set(names)
    assert text.startswith("# Validation of trl_gspo\n\nNone failed, ") and "What failed" not in text
    for heading in ("Environment", "Skipped", "Noise floor of this machine", "All checks"):
        assert f"## {heading}\n" in text
    assert all(f"| {name} |" in text for name in states)
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fault", cases(FAULTS))
def test_fault_is_red_where_it_is(fault, setting, monkeypatch, restored):
    with monkeypatch.context() as patch:
        (break_config if fault.module == CONFIG else break_functions)(fault, patch)
        results = results_of([check_of(fault.figure)], setting)
    assert results[fault.figure].state == "FAIL", results
    assert results[fault.figure].remedy


def patched_installation(fault, folder):
    """The package of the fault copied into `folder`, with one line changed."""
    path, _ = source_of(fault.module)
    package = fault.module.partition(".")[0]
    root = Path(importlib.util.find_spec(package).origin).parent
    shutil.copytree(root, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / package / path.relative_to(root)).write_text(patched_source(fault))
    return os.pathsep.join([str(folder), ROOT])


def run_script(path, output, *options):
    command = [sys.executable, str(Path(ROOT) / "scripts" / "validate.py"), "--cpu", "--output", str(output), *options]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=output, capture_output=True, text=True, timeout=600
    )


def assert_red(fault, folder, *options):
    path = patched_installation(fault, folder / "installed")
    done = run_script(path, folder, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAILED {fault.figure}\n" in done.stdout
    text = (folder / "validate.md").read_text()
    assert f"| {fault.figure} |" in text.partition("## What failed")[2].partition("## Environment")[0]
    assert str(folder / "installed" / fault.module.partition(".")[0]) in text


@pytest.mark.slow
def test_patched_trl_is_red(tmp_path):
    assert_red(FAULTS["max_for_min_in_trl"], tmp_path, "--only", "config", "host")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", cases(FAULTS))
def test_patched_installation_is_red(fault, tmp_path):
    assert_red(fault, tmp_path, "--quick")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_whole_validation_is_green(seed, tmp_path):
    done = run_script(ROOT, tmp_path, "--seed", seed)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "validate.md").read_text()
    for name in validate.RANGES:
        assert f"| {name} |" in text
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


# ---- the script


@pytest.mark.parametrize(
    ("seen", "is_ok", "bound"),
    [
        (Seen("", 0.0, 0), True, "exactly 0"),
        (Seen("", 1e-300, 0), False, "exactly 0"),
        (Seen("", 2e-5, 1e-5), False, "at most 1e-05"),
        (Seen("", math.nan, 1e-5), False, "at most 1e-05"),
        (Seen("", math.nan, 1.0, 0.0), False, "0 to 1"),
        (Seen("", 0.1, 1.0, 0.2), False, "0.2 to 1"),
        (Seen("", 0.3, math.inf, 0.2), True, "at least 0.2"),
    ],
)
def test_bounds(seen, is_ok, bound):
    assert (seen.is_ok, seen.bound) == (is_ok, bound)


def test_check_that_raises_fails_and_the_others_run(setting, monkeypatch, tmp_path, capsys):
    def raises(setting):
        yield Seen("first", 0.0, 1.0)
        raise ZeroDivisionError("by nothing\nat all")

    def cannot(setting):
        raise SkippedError("there is no moon")
        yield

    def compares_nothing(setting):
        yield from ()

    checks = [
        Check("a/raises", raises, "mend it"),
        Check("b/cannot", cannot, "wait"),
        Check("c/nothing", compares_nothing, "compare"),
        Check("d/fine", lambda setting: iter([Seen("", 0.5, 1.0)]), ""),
    ]
    monkeypatch.setattr(validate, "technical_checks", lambda device: checks)
    assert validate.main(["--quick", "--output", str(tmp_path)]) == 1
    printed, text = capsys.readouterr().out, (tmp_path / "validate.md").read_text()
    states = [line.split()[:2] for line in printed.splitlines()[:5]]
    assert states == [
        ["ok", "a/raises/first"], ["FAIL", "a/raises"], ["skipped", "b/cannot"], ["FAIL", "c/nothing"],
        ["ok", "d/fine"],
    ]  # fmt: skip
    assert "2 passed, 2 failed, 1 skipped" in printed and printed.endswith("FAILED a/raises\nFAILED c/nothing\n")
    assert text.startswith("# Validation of trl_gspo\n\n**2 failed**, 2 passed, 1 skipped.")
    failed = text.partition("## What failed")[2].partition("## Environment")[0]
    assert "ZeroDivisionError: by nothing" in failed and "mend it" in failed and "d/fine" not in failed
    assert "there is no moon" in text.partition("## Skipped")[2]

    assert validate.main(["--quick", "--only", "d", "b", "--output", str(tmp_path)]) == 0
    assert "1 passed, 0 failed, 1 skipped" in capsys.readouterr().out
    assert validate.main(["--quick", "--only", "d", "moon"]) == 2
    assert "no check begins with 'moon'; there are a/raises, b/cannot" in capsys.readouterr().err


def test_attention_that_cannot_run_is_skipped(setting):
    checks = [check for check in validate.technical_checks("cuda") if "/flash" in check.name or "/flex" in check.name]
    results = results_of(checks, setting)
    assert {name.split("/")[1] for name in results} == {"flex_attention", "flash_attention_2"}
    assert {result.state for result in results.values()} == {"skipped"}


def test_without_a_head_for_packed_rows_the_rest_is_checked(setting, monkeypatch):
    for module in ("validate", "trl_gspo.trainer"):
        monkeypatch.setattr(f"{module}.HAS_FUSED_HEAD", False)
    names = ("trainer/sequence/packed", "attention/sdpa/float32", "trainer/function", "rollout/sequence")
    results = results_of([check for check in validate.technical_checks("cpu") if check.name in names], setting)
    states = {name: result.state for name, result in results.items()}
    assert {name for name, state in states.items() if state == "skipped"} == set(names[:2])
    assert {"trainer/function/turn", "rollout/sequence/weights", "rollout/sequence/metrics"} < states.keys()
    assert "FAIL" not in states.values()


def run_of(reward, **values):
    entry = {
        "loss": 0.0, "grad_norm": 1.0, "entropy": 0.5, "completions/mean_length": 6.0, "epoch": 1.0,
        "gspo/ratio/mean": 1.0, "gspo/ratio/max": 1.1, "gspo/ratio/min": 0.9, "gspo/ratio/std": 0.02,
        "gspo/ratio/noise": 0.0, "gspo/clip_fraction/sequences": 0.15, "gspo/clip_fraction/tokens": 0.15,
        "gspo/epsilon_low": 0.02, "gspo/epsilon_high": 0.03,
    } | values  # fmt: skip
    count = validate.STEPS // validate.MINIBATCHES
    logs = [entry | {"step": 4 * index + 4, "reward": 0.4 + reward * index / count} for index in range(count)]
    return {"logs": logs, "seconds": 12.0, "after": 0.4 + reward}


@pytest.mark.parametrize(
    ("run", "figures"),
    [
        (run_of(0.5), set()),
        (run_of(0.0), {"reward_rise", "accuracy_rise"}),
        (run_of(0.5, grad_norm=math.nan), {"not_finite"}),
        (run_of(0.5, loss=None), {"not_finite"}),
        (run_of(0.5, entropy=0.0), {"entropy"}),
        (run_of(0.5, **{"gspo/ratio/max": 11.0}), {"ratio_max"}),
        (run_of(0.5, **{"gspo/ratio/min": 0.01}), {"ratio_min"}),
        (run_of(0.5, **{"gspo/ratio/std": 0.0}), {"ratio_std"}),
        (run_of(0.5, **{"gspo/ratio/noise": 1e-3}), {"noise"}),
        (run_of(0.5, **{"gspo/clip_fraction/sequences": 0.0}), {"clip_fraction"}),
        (run_of(0.5, **{"gspo/clip_fraction/sequences": None}), {"clip_fraction"}),
        (run_of(0.5, **{"completions/mean_length": 2.0}), {"length"}),
        ({**run_of(0.5), "logs": run_of(0.5)["logs"][:-3]}, {"logs"}),
    ],
)
def test_a_run_that_does_not_learn_or_collapses_is_red(run, figures, tmp_path, monkeypatch):
    setting = Setting(tmp_path)
    setting.runs["before"] = 0.3
    monkeypatch.setattr(validate, "train_with", lambda setting, name: run)
    checks = [check for check in validate.training_checks() if check.name == "training/controller"]
    results = results_of(checks, setting)
    assert {name.split("/")[-1] for name, result in results.items() if result.state == "FAIL"} == figures


def test_clip_ranges_are_compared_and_drawn(tmp_path, monkeypatch, capsys):
    shares = {"too tight": 0.7, "paper's": 0.4, "controller": 0.15, "token-level": 0.0}
    runs = {name: run_of(0.5, **{"gspo/clip_fraction/tokens": share}) for name, share in shares.items()}

    def train_with(setting, name):
        setting.runs["before"] = 0.3
        return runs[name]

    monkeypatch.setattr(validate, "train_with", train_with)
    assert validate.main(["--only", "training", "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    text = (tmp_path / "validate.md").read_text()
    assert "| too tight | 0.433 | 0.850 | 0.300 | 0.900 | 0.700 | 0.02 | 0.02, 0.03 | 12 |" in text
    assert "no evidence for one range over another" in text
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")

    runs["paper's"] = runs["token-level"]
    assert validate.main(["--only", "training", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("\nFAILED training/clip_ranges/papers_over_token_level\n")


def test_two_steps_of_a_training_run(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "STEPS", 8)
    monkeypatch.setattr(validate, "TEST_ROWS", 64)
    monkeypatch.setattr("demo.PRETRAIN_STEPS", 5)
    setting = Setting(tmp_path)
    with validate.quiet():
        run = validate.train_with(setting, "token-level")
    assert [entry["step"] for entry in run["logs"]] == [4, 8]
    assert {entry["gspo/epsilon_low"] for entry in run["logs"]} == {0.2}
    assert 0 <= run["after"] <= 1 and 0 <= setting.runs["before"] <= 1


def test_report_without_matplotlib(setting, monkeypatch, tmp_path):
    def draw_noise(noise, path):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(validate, "draw_noise", draw_noise)
    monkeypatch.setattr(setting, "noise", [{"attention": "sdpa"}])
    assert "pip install matplotlib" in validate.draw_all(setting, tmp_path)


def test_a_pipe_in_a_message_leaves_the_table_whole():
    result = Result("a", "FAIL", "error", "", 0.0, "x | y", "")
    assert validate.markdown_table(["name", "note"], [[result.name, result.note]]).endswith("| a | x / y |\n")
