"""
Evaluates a model on a task: pass@1 and pass@k with intervals, and before against after.

    python scripts/evaluate.py --config configs/gsm8k_0.5b.yaml --model_name_or_path outputs/gsm8k_0.5b \\
        --before Qwen/Qwen2.5-0.5B-Instruct --num_samples 8 --k 1 8
    python scripts/evaluate.py --task gsm8k --model_name_or_path path/to/model --dataset_name path/to/gsm8k

It takes the options and the configurations of `scripts/train.py`, and samples as the training does: `temperature`,
`top_p`, `max_completion_length`, `reward_weights` and the rest. What concerns the training alone has no effect. A
model may be a folder of a LoRA adapter. The rows are those that the training holds out or evaluates on.

In `report_dir`, `report.md` has the tables and samples side by side, `report.json` all figures, and `samples.jsonl`
every sample. Exit codes: 0 done; 2 bad input, named in one line; 4 a reward function raised; 1 any other error.
"""

import json
import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import train
import yaml
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_quantization_config

from trl_gspo import evaluation
from trl_gspo.rewards import check_columns
from trl_gspo.tasks import load_task


@dataclass
class EvaluationArguments(train.ScriptArguments):
    """
    Arguments of this script, beside those of `scripts/train.py`.

    Parameters:
        before (`str`, *optional*):
            A model to compare with, by folder or hub id: sampled on the same prompts with the same seeds.
        num_samples (`int`, *optional*, defaults to `4`):
            Samples of each problem.
        k (`list[int]`, *optional*):
            For pass@k, each at most `num_samples`; 1 and `num_samples` if not set.
        pass_threshold (`float`, *optional*, defaults to `1.0`):
            Score, the weighted sum of the rewards, from which a sample passes.
        num_shown (`int`, *optional*, defaults to `12`):
            Problems that the report shows.
        report_dir (`str`, *optional*):
            Folder of the report; `evaluation` in `output_dir` if not set.
    """

    before: str | None = field(
        default=None, metadata={"help": "Model to compare with, on the same prompts with the same seeds."}
    )
    num_samples: int = field(default=4, metadata={"help": "Samples of each problem."})
    k: list[int] | None = field(
        default=None, metadata={"help": "For pass@k, each at most `num_samples`; 1 and `num_samples` if not set."}
    )
    pass_threshold: float = field(
        default=1.0, metadata={"help": "Score, the weighted sum of the rewards, from which a sample passes."}
    )
    num_shown: int = field(default=12, metadata={"help": "Problems that the report shows."})
    report_dir: str | None = field(
        default=None, metadata={"help": "Folder of the report; `evaluation` in `output_dir` if not set."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {self.num_samples}.")
        self.k = sorted(set(self.k or (1, self.num_samples)))
        for k in self.k:
            if not 1 <= k <= self.num_samples:
                raise ValueError(f"`k` must be from 1 to `num_samples={self.num_samples}`, got {k}.")
        if self.num_shown < 0:
            raise ValueError(f"`num_shown` must be at least 0, got {self.num_shown}.")


def find_report_dir(args: EvaluationArguments, output_dir: str) -> Path:
    folder = Path(args.report_dir or Path(output_dir) / "evaluation")
    if (folder / "report.json").exists() and not args.overwrite_output_dir:
        raise FileExistsError(
            f"`report_dir={folder}` holds an earlier report: choose another --report_dir, or write over it with "
            "--overwrite_output_dir."
        )
    return folder


def load_model(path: str, training_args, model_args):
    """A causal model, or a LoRA adapter with its base, and the tokenizer."""
    options = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    } | (training_args.model_init_kwargs or {})
    if path == model_args.model_name_or_path:
        options["revision"] = model_args.model_revision
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **{k: v for k, v in options.items() if v is not None})
        tokenizer_path = path
        if os.path.isdir(path) and not (Path(path) / "tokenizer_config.json").is_file():
            tokenizer_path = model.config._name_or_path  # an adapter saved without one: its base's
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    except (OSError, ValueError) as error:
        raise OSError(f"The model {path!r} cannot be loaded: {error}") from error
    if "device_map" not in options and options["quantization_config"] is None:
        model = model.to(training_args.device)
    return model.eval(), tokenizer


def check_prompts(rows: list[dict], tokenizer, path: str) -> None:
    if any(not isinstance(row["prompt"], str) for row in rows) and tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts are messages, and the tokenizer of {path!r} has no chat template: turn them into text with "
            '--conversational false --system_prompt "", or take a model with a template.'
        )


def main(argv: list[str]) -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_gspo").setLevel(logging.INFO)
    try:
        args, training_args, model_args, _ = train.parse(argv, script_type=EvaluationArguments)
        if training_args.world_size > 1:
            raise ValueError("This script runs in one process: start it with `python`, not with a launcher.")
        folder = find_report_dir(args, training_args.output_dir)
        train.print_task(args)
        rewards = train.load_rewards(args, training_args)
        weights = training_args.reward_weights
        if weights is not None and len(weights) != len(rewards):
            raise ValueError(f"`reward_weights` has {len(weights)} numbers for {len(rewards)} `reward_funcs`.")
        rows = load_task(args, train=False)[1]
        if isinstance(rows, IterableDataset) and args.num_eval_samples is None:
            raise ValueError("`dataset_streaming` needs `num_eval_samples`: a stream has no length.")
        rows = list(rows)
        for reward in rewards:
            check_columns(reward, list(rows[0]))
        scorers = evaluation.to_scorers(
            args.reward_funcs, rewards, training_args.device, **(training_args.chat_template_kwargs or {})
        )
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2

    models = {"before": args.before} if args.before else {}
    models["after" if args.before else "model"] = model_args.model_name_or_path
    samples, figures = {}, {}
    for name, path in models.items():
        started = time.time()
        try:
            model, tokenizer = load_model(path, training_args, model_args)
            check_prompts(rows, tokenizer, path)
            samples[name] = evaluation.generate(
                model,
                tokenizer,
                [row["prompt"] for row in rows],
                args.num_samples,
                seed=training_args.seed,
                batch_size=training_args.per_device_eval_batch_size,
                max_new_tokens=training_args.max_completion_length,
                temperature=training_args.temperature,
                top_p=training_args.top_p,
                top_k=training_args.top_k,
                min_p=training_args.min_p,
                repetition_penalty=training_args.repetition_penalty,
                chat_template_kwargs=training_args.chat_template_kwargs,
                description=None if training_args.disable_tqdm else f"{name} {path}",
            )
        except (ValueError, OSError) as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            return 2
        del model
        try:
            evaluation.score(samples[name], rows, scorers, weights, args.pass_threshold)
        except Exception as error:
            traceback.print_exc()
            print(f"evaluate.py: a reward function raised {type(error).__name__}: {error}", file=sys.stderr)
            return 4
        figures[name] = {"model": path} | evaluation.summarize(samples[name], args.k)
        figures[name]["seconds"] = round(time.time() - started, 1)

    report = {
        "data": describe_data(args),
        "problems": len(rows),
        "num_samples": args.num_samples,
        "seed": training_args.seed,
        "sampling": f"temperature {training_args.temperature:g}, top_p {training_args.top_p:g}, top_k "
        f"{training_args.top_k}, at most {training_args.max_completion_length} tokens",
        "pass_threshold": args.pass_threshold,
        "models": figures,
        "difference": evaluation.compare(samples["before"], samples["after"], args.k) if args.before else None,
        "shown": evaluation.pick_examples(samples, args.num_shown),
    }
    (folder / "samples.jsonl").write_text(evaluation.samples_to_jsonl(rows, samples))
    (folder / "report.md").write_text(evaluation.to_markdown(report, rows, samples))
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(report, folder)
    return 0


def describe_data(args: EvaluationArguments) -> str:
    name = args.eval_dataset_name or args.dataset_name
    parts = [args.task, None if name is None else os.path.basename(name) if os.path.exists(name) else name]
    held_out = "held-out rows" if args.holds_out or name is None else args.dataset_test_split
    return f"{', '.join(filter(None, parts))} ({held_out})"


def print_report(report: dict, folder: Path) -> None:
    for name, figures in report["models"].items():
        for k, share in figures["pass_at"].items():
            print(f"{name:8}pass@{k:<4}{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]")
    for k, change in (report["difference"] or {}).items():
        print(
            f"change  pass@{k:<4}{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}], "
            f"{change['improved']} better, {change['worsened']} worse, {change['unchanged']} same"
        )
    print(f"saved   {folder} (report.md, report.json, samples.jsonl)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
