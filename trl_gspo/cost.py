"""What a run costs in completions and tokens, by arithmetic on its configuration; nothing is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .config import GSPOConfig


@dataclass(frozen=True)
class RunCost:
    """
    Completions, prompts and tokens of a run, over all processes. Tokens are those that are generated, at most.

    Parameters:
        processes (`int`):
            Number of processes.
        step_completions (`int`):
            Completions in the loss of an optimizer step.
        rollout_completions (`int`):
            Completions that are generated for a rollout batch.
        rollout_prompts (`int`):
            Prompts of a rollout batch.
        steps_per_rollout (`Fraction`):
            Optimizer steps that a rollout batch lasts; below 1 where a step takes several batches.
        steps (`int`, *optional*):
            Optimizer steps of the run; `None` where neither `max_steps` nor the number of rows is known.
        rollouts (`int`, *optional*):
            Rollout batches of the run.
        epochs (`float`, *optional*):
            Times that the run goes over the data.
        checkpoints (`int`, *optional*):
            Checkpoints that are written, of which `save_total_limit` may keep fewer.
        evaluations (`int`, *optional*):
            Times that the evaluation data is sampled.
        evaluation_completions (`int`, *optional*):
            Completions of one evaluation; `None` where the number of its rows is not known.
        completion_tokens (`int`, *optional*):
            Most tokens of a completion: `max_completion_length`.
    """

    processes: int
    step_completions: int
    rollout_completions: int
    rollout_prompts: int
    steps_per_rollout: Fraction
    steps: int | None
    rollouts: int | None
    epochs: float | None
    checkpoints: int | None
    evaluations: int | None
    evaluation_completions: int | None
    completion_tokens: int | None

    def tokens(self, completions: int | None) -> int | None:
        """The most tokens that so many completions have."""
        known = completions is not None and self.completion_tokens is not None
        return completions * self.completion_tokens if known else None


def run_cost(
    args: GSPOConfig,
    train_rows: int | None,
    eval_rows: int | None = None,
    processes: int | None = None,
    keeps_generation_batch_size: bool = False,
) -> RunCost:
    """
    What a run costs, as TRL's sampler and the Trainer count it.

    Args:
        args (`GSPOConfig`): the configuration.
        train_rows (`int`, *optional*): prompts to train on; `None` if not known.
        eval_rows (`int`, *optional*): prompts to evaluate on; `None` if not known or if there are none.
        processes (`int`, *optional*): number of processes; `args.world_size` if not set.
        keeps_generation_batch_size (`bool`, *optional*, defaults to `False`): whether `generation_batch_size` was
            chosen, and so stays with another number of processes. Otherwise `steps_per_generation` does.

    Raises:
        ValueError: if the batches cannot be divided as asked for, or if there is no whole rollout batch.
    """
    processes = processes or args.world_size
    micro_batch = args.per_device_train_batch_size * processes
    steps_per_generation, rollout = args.steps_per_generation, args.steps_per_generation * micro_batch
    if keeps_generation_batch_size:
        rollout = args.generation_batch_size
        if rollout % micro_batch:
            raise ValueError(
                f"`generation_batch_size={rollout}` must be divisible by {micro_batch} (per_device_train_batch_size "
                f"{args.per_device_train_batch_size} x processes {processes})."
            )
        steps_per_generation = rollout // micro_batch
    if rollout % args.num_generations:
        raise ValueError(
            f"A rollout batch of {rollout} completions (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x processes {processes} x steps_per_generation "
            f"{steps_per_generation}) must be divisible by `num_generations={args.num_generations}`."
        )
    prompts = rollout // args.num_generations
    if train_rows is not None and train_rows < prompts:
        raise ValueError(
            f"The data has {train_rows} prompts to train on, and one rollout batch takes {prompts}. Set a smaller "
            "`steps_per_generation` or `per_device_train_batch_size`, or add prompts."
        )
    micro_batches = steps_per_generation * args.num_iterations
    steps_per_rollout = Fraction(micro_batches, args.gradient_accumulation_steps)

    # TRL's sampler leaves out an incomplete rollout batch; the Trainer takes a step for an incomplete accumulation.
    epoch = None
    if train_rows is not None:
        epoch = math.ceil(train_rows // prompts * micro_batches / args.gradient_accumulation_steps)
    steps = args.max_steps
    if steps <= 0:
        steps = None if epoch is None else math.ceil(args.num_train_epochs * epoch)
    return RunCost(
        processes=processes,
        step_completions=micro_batch * args.gradient_accumulation_steps,
        rollout_completions=rollout,
        rollout_prompts=prompts,
        steps_per_rollout=steps_per_rollout,
        steps=steps,
        rollouts=None if steps is None else math.ceil(steps / steps_per_rollout),
        epochs=None if None in (steps, epoch) else steps / epoch,
        checkpoints=_times(args.save_strategy, args.save_steps, steps, epoch),
        evaluations=_times(args.eval_strategy, args.eval_steps, steps, epoch, args.eval_delay, args.eval_on_start),
        evaluation_completions=None
        if eval_rows is None
        else eval_rows * (args.num_generations_eval or args.num_generations),
        completion_tokens=args.max_completion_length,
    )


def _times(
    strategy: str,
    interval: float | None,
    steps: int | None,
    epoch: int | None,
    delay: float = 0,
    on_start: bool = False,
) -> int | None:
    """How often a run saves or evaluates: the last step is one of the times for each strategy but `"no"`."""
    if strategy == "no":
        return 0
    if steps is None or strategy == "best":  # which depends on what the evaluations find
        return None
    if strategy == "epoch":
        if epoch is None:
            return None
        at = [*range(epoch, steps, epoch), steps]
        delay *= epoch
    else:
        interval = math.ceil(steps * interval) if interval < 1 else int(interval)
        at = [*range(interval, steps, interval), steps]
    return sum(step >= delay for step in at) + on_start


def describe(cost: RunCost, args: GSPOConfig, train_rows: int | None, prompt_tokens: Sequence[int] = ()) -> list[str]:
    """
    The lines that `--dry_run` prints.

    Args:
        cost (`RunCost`): from [`run_cost`].
        args (`GSPOConfig`): the configuration.
        train_rows (`int`, *optional*): prompts to train on; `None` if not known.
        prompt_tokens (`Sequence[int]`, *optional*): lengths of some prompts; empty if they are not known.
    """
    mean = sum(prompt_tokens) / len(prompt_tokens) if prompt_tokens else None

    def work(completions: int | None) -> str:
        if completions is None:
            return "not known"
        tokens = cost.tokens(completions)
        most = (
            f"at most {tokens:,} generated tokens" if tokens is not None else "`max_completion_length` sets no bound"
        )
        prompt = f", about {round(mean * completions):,} of prompts" if mean is not None else ""
        return f"{completions:,} completions; {most}{prompt}"

    share = cost.steps_per_rollout
    lasts = f"{share} optimizer step{'s' * (share != 1)}" if share >= 1 else f"{share} of an optimizer step"
    lines = [
        ("processes", f"{cost.processes}"),
        ("optimizer step", f"{work(cost.step_completions)}, through forward and backward"),
        (
            "rollout batch",
            f"{cost.rollout_prompts:,} prompts x {args.num_generations} = {work(cost.rollout_completions)}; lasts "
            f"{lasts}",
        ),
    ]
    if mean is not None:
        lines.append(
            (
                "prompts",
                f"{mean:.0f} tokens in the mean, {max(prompt_tokens):,} at most, of {len(prompt_tokens):,} drawn",
            )
        )
    if cost.steps is None:
        lines.append(("run", "its length is not known: set `max_steps`, or see why the data was not read"))
    else:
        lines.append(
            (
                "run",
                f"{cost.steps:,} optimizer steps, {cost.rollouts:,} rollout batches: "
                f"{work(cost.rollouts * cost.rollout_completions)}",
            )
        )
    if cost.epochs is not None:
        lines.append(("data", f"{train_rows:,} prompts, gone over {cost.epochs:.2f} times"))
    if cost.checkpoints is not None:
        kept = f", {args.save_total_limit} kept" if args.save_total_limit else ""
        lines.append(("checkpoints", f"{cost.checkpoints}{kept if cost.checkpoints else ''}"))
    if cost.evaluations == 0:
        lines.append(("evaluation", "none (`eval_strategy: no`)"))
    else:
        times = "not known how often" if cost.evaluations is None else f"{cost.evaluations} times"
        lines.append(("evaluation", f"{times}, each {work(cost.evaluation_completions)}"))
    return [f"  {name:16}{text}" for name, text in lines]
