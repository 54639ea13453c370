"""
Evaluation: samples for each problem, their rewards, pass@k with intervals, and two models compared.

A problem is a row of the evaluation data; n samples are drawn for each, of which c pass.
"""

import asyncio
import hashlib
import inspect
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerState,
)
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .credit import step_kind


_SCORED_AT_ONCE = 64


def pass_at_k(n: int, c: int, k: int) -> float:
    """
    Unbiased estimate of the probability that at least one of k samples passes.

        1 - C(n - c, k) / C(n, k)

    Source: Chen et al. (2021), section 2.1, https://huggingface.co/papers/2107.03374

    Args:
        n (`int`): samples that were drawn.
        c (`int`): those that passed.
        k (`int`): at most `n`.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True)
class Interval:
    """A mean over problems with its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], draws: float, confidence: float = 0.95) -> Interval:
    """
    Mean of shares in [0, 1] over problems, with Wilson's score interval.

        center = (p + z^2 / 2N) / (1 + z^2 / N),   half = z sqrt(p (1 - p) / N + z^2 / 4N^2) / (1 + z^2 / N)

    N is the effective number of problems, p (1 - p) / (s^2 / n): as many yes-or-no problems as would spread as these
    do; the number of problems where all values are 0 or all are 1, and at most `draws`. Unlike the normal interval,
    this one stays in [0, 1] and has a width where nothing or everything passed. It is about other problems of this
    kind: the noise of sampling is in it as far as it shows between problems.

    Args:
        values (`Sequence[float]`): one for each problem.
        draws (`float`): samples that went into all of them, a bound for N.
        confidence (`float`, *optional*, defaults to 0.95): of the interval.
    """
    n = len(values)
    p = math.fsum(values) / n
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    effective = float(n)
    if n > 1 and 0 < p < 1:
        variance = statistics.variance(values, p)
        effective = min(n * p * (1 - p) / variance, draws) if variance > 0 else draws
    center = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * math.sqrt(p * (1 - p) / effective + z**2 / (4 * effective**2)) / (1 + z**2 / effective)
    return Interval(p, max(center - half, 0.0), min(center + half, 1.0))


@dataclass(frozen=True)
class Difference:
    """What changed between two models on the same problems; `p_value` of the exact sign test."""

    mean: float
    low: float
    high: float
    improved: int
    worsened: int
    unchanged: int
    p_value: float


def paired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Difference:
    """
    Mean difference over the same problems, with an interval for pairs.

        center = sum d / (n + 2),   half = z sqrt(((sum d^2 + 1) / (n + 2) - center^2) / (n + 2))

    This is Wald's interval with two pairs added, one of them half a win and half a loss: so it has a width where no
    problem, or each, changed. Source: Agresti and Min (2005), "Simple improved confidence intervals for comparing
    matched proportions", Statistics in Medicine 24; here for differences of shares, too.

    Args:
        before (`Sequence[float]`): shares in [0, 1], one for each problem.
        after (`Sequence[float]`): of the same problems in the same order.
        confidence (`float`, *optional*, defaults to 0.95): of the interval.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n, z = len(differences), NormalDist().inv_cdf((1 + confidence) / 2)
    center = math.fsum(differences) / (n + 2)
    half = z * math.sqrt(((math.fsum(d * d for d in differences) + 1) / (n + 2) - center**2) / (n + 2))
    improved, worsened = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    changed = improved + worsened
    tail = sum(math.comb(changed, i) for i in range(min(improved, worsened) + 1)) / 2**changed
    return Difference(
        mean=math.fsum(differences) / n,
        low=max(center - half, -1.0),
        high=min(center + half, 1.0),
        improved=improved,
        worsened=worsened,
        unchanged=n - changed,
        p_value=min(2 * tail, 1.0),
    )


class SeededSampling(LogitsProcessor):
    """
    Adds Gumbel noise of a generator of its own to each row, so that the greatest logit is a sample of the softmax.

    A row's draws depend on its seed and on the number of tokens before, and on nothing else: not on the batch that it
    is in. Two models that are given the same seeds are given the same noise, which makes their difference less noisy.
    Generation has to be greedy (`do_sample=False`).

    Args:
        seeds (`Sequence[int]`): one for each row.
        device (`torch.device` or `str`): where the logits are; another kind of device draws other numbers.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.clamp_min(torch.finfo(torch.float32).tiny).log()


def sample_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one sample of one prompt, the same whatever else is sampled."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}/{prompt}".encode()).digest()[:8], "big") >> 1


@dataclass
class Sample:
    """
    A completion with its rewards.

    Parameters:
        text (`str`):
            The completion without special tokens.
        ids (`list[int]`):
            Its tokens, with the end of text if it has one.
        is_truncated (`bool`):
            Whether it ran into the length limit.
        rewards (`dict[str, float | None]`):
            By reward; `None` where one does not apply.
        score (`float`, *optional*):
            Weighted sum of the rewards that apply; `None` where none does.
        passed (`bool`):
            Whether `score` reaches the threshold.
    """

    text: str
    ids: list[int] = field(repr=False)
    is_truncated: bool
    rewards: dict[str, float | None] = field(default_factory=dict)
    score: float | None = None
    passed: bool = False


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: Sequence[str | list[dict[str, str]]],
    num_samples: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    chat_template_kwargs: dict[str, Any] | None = None,
    description: str | None = None,
) -> list[list[Sample]]:
    """
    Draws samples of each prompt.

    What a sample is depends on `seed`, its prompt and its number, and not on `batch_size` or on other prompts, but for
    the rounding that the shape of a batch changes. In our tests, on CPU in float32, that changes nothing; in bf16 it
    may.

    Args:
        model (`PreTrainedModel`): in evaluation mode, on the device to use.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template, if the prompts are messages.
        prompts (`Sequence`): strings, or lists of messages.
        num_samples (`int`): for each prompt.
        seed (`int`, *optional*, defaults to `0`): of all samples.
        batch_size (`int`, *optional*, defaults to `8`): completions that are generated at once.
        max_new_tokens (`int`, *optional*, defaults to `256`): for each completion.
        temperature (`float`, *optional*, defaults to `1.0`): 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`): nucleus; 1 keeps all.
        top_k (`int`, *optional*, defaults to `0`): tokens to choose from; 0 keeps all.
        min_p (`float`, *optional*): least probability, as a share of the greatest.
        repetition_penalty (`float`, *optional*, defaults to `1.0`): 1 is none.
        chat_template_kwargs (`dict`, *optional*): for the chat template.
        description (`str`, *optional*): of the progress bar; without one there is none.

    Returns:
        `list[list[Sample]]`: `num_samples` for each prompt, in the order of `prompts`; not scored yet.

    Raises:
        ValueError: if several greedy samples are asked for, which would all be equal.
    """
    if temperature == 0 and num_samples > 1:
        raise ValueError(
            f"`temperature=0` is greedy, so that `num_samples={num_samples}` samples are equal: set it to 1."
        )
    chats = [not isinstance(prompt, str) for prompt in prompts]
    options = {"tokenize": False, "add_generation_prompt": True} | (chat_template_kwargs or {})
    texts = [
        tokenizer.apply_chat_template(prompt, **options) if is_chat else prompt
        for prompt, is_chat in zip(prompts, chats, strict=True)
    ]
    # A template writes the special tokens itself.
    encoded = [
        tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        for text, is_chat in zip(texts, chats, strict=True)
    ]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    ends = sorted({*ends, tokenizer.eos_token_id})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    # The model's own configuration would sample in its own way.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=repetition_penalty,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )
    warpers = []
    if temperature > 0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))

    samples: list[list[Sample | None]] = [[None] * num_samples for _ in prompts]
    # Rows of like length go together, which saves padding.
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    jobs = [(index, number) for index in order for number in range(num_samples)]
    starts = range(0, len(jobs), batch_size)
    for start in tqdm(starts, desc=description, disable=description is None):
        batch = jobs[start : start + batch_size]
        width = max(len(encoded[index]) for index, _ in batch)
        input_ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i, _ in batch])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i, _ in batch])
        processors = LogitsProcessorList(warpers)
        if temperature > 0:
            seeds = [sample_seed(seed, texts[index], number) for index, number in batch]
            processors.append(SeededSampling(seeds, model.device))
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=processors,
        )
        for (index, number), row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((position for position, token in enumerate(row) if token in ends), None)
            ids = row if end is None else row[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            samples[index][number] = Sample(text=text, ids=ids, is_truncated=end is None)
    return samples


def score(
    samples: Sequence[Sequence[Sample]],
    rows: Sequence[dict[str, Any]],
    rewards: dict[str, Callable],
    weights: Sequence[float] | None = None,
    threshold: float = 1.0,
) -> None:
    """
    Gives each sample its rewards, score and verdict, in place. Rewards are called as the trainer calls them.

    Args:
        samples (`Sequence[Sequence[Sample]]`): those of each row.
        rows (`Sequence[dict]`): with `prompt` and the columns that the rewards read.
        rewards (`dict[str, Callable]`): by name.
        weights (`Sequence[float]`, *optional*): one for each reward; all 1 if not set.
        threshold (`float`, *optional*, defaults to `1.0`): the score from which a sample passes.
    """
    weights = [1.0] * len(rewards) if weights is None else weights
    pairs = [(sample, row) for group, row in zip(samples, rows, strict=True) for sample in group]
    for sample, _ in pairs:
        sample.rewards = {}
    for start in range(0, len(pairs), _SCORED_AT_ONCE):
        chunk = pairs[start : start + _SCORED_AT_ONCE]
        prompts = [row["prompt"] for _, row in chunk]
        completions = [
            sample.text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": sample.text}]
            for sample, row in chunk
        ]
        columns = {
            name: [row[name] for _, row in chunk] for name in chunk[0][1] if name not in ("prompt", "completion")
        }
        for name, reward in rewards.items():
            values = reward(
                prompts=prompts,
                completions=completions,
                completion_ids=[sample.ids for sample, _ in chunk],
                trainer_state=TrainerState(),
                log_extra=_nothing,
                log_metric=_nothing,
                **columns,
            )
            values = asyncio.run(_finish(values)) if inspect.isawaitable(values) else values
            for (sample, _), value in zip(chunk, values, strict=True):
                sample.rewards[name] = None if value is None or math.isnan(value) else float(value)
    for sample, _ in pairs:
        weighted = zip(weights, sample.rewards.values(), strict=True)
        values = [weight * value for weight, value in weighted if value is not None]
        sample.score = math.fsum(values) if values else None
        # Sums of weighted rewards may miss the threshold by rounding.
        sample.passed = sample.score is not None and sample.score >= threshold - 1e-6


async def _finish(values: Any) -> Any:
    return await values


def _nothing(*args: Any) -> None:
    """Stands in for what the trainer would log."""


def to_scorers(names: Sequence[str], rewards: Sequence[Callable | str], device: torch.device, **options: Any) -> dict:
    """
    Rewards by name, with a reward model as a function like the others.

    Args:
        names (`Sequence[str]`): of `reward_funcs`.
        rewards (`Sequence[Callable | str]`): as [`~trl_gspo.rewards.load_reward`] returns them.
        device (`torch.device`): for reward models.
        **options (`Any`): for the chat template of reward models.

    Raises:
        ValueError: if a reward gives several numbers for a completion, which makes no verdict.
    """
    scorers = {}
    for name, reward in zip(names, rewards, strict=True):
        if not isinstance(reward, str) and step_kind(reward) is not None:
            raise ValueError(
                f"`reward_funcs` names {name!r}, which rewards {step_kind(reward)}s: it gives no verdict."
            )
        scorers[name] = _reward_model(reward, device, options) if isinstance(reward, str) else reward
    return scorers


def _reward_model(path: str, device: torch.device, options: dict[str, Any]) -> Callable:
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    @torch.inference_mode()
    def reward(prompts, completions, **kwargs):
        texts = [
            prompt + completion
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt + completion, tokenize=False, **options)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        return model(**inputs.to(device)).logits[:, 0].tolist()

    return reward


def summarize(samples: Sequence[Sequence[Sample]], ks: Sequence[int]) -> dict[str, Any]:
    """
    The figures of one model.

    Args:
        samples (`Sequence[Sequence[Sample]]`): scored, those of each problem.
        ks (`Sequence[int]`): for pass@k, each at most the number of samples of a problem.

    Returns:
        `dict`: `pass_at` by k, mean `rewards` by name, mean `length` in tokens, shares `truncated` and `unscored`.
    """
    every = [sample for group in samples for sample in group]
    rewards = {name: [s.rewards[name] for s in every if s.rewards[name] is not None] for name in every[0].rewards}
    return {
        "pass_at": {str(k): asdict(mean_interval(shares(samples, k), len(every) / k)) for k in ks},
        "rewards": {name: math.fsum(values) / len(values) if values else None for name, values in rewards.items()},
        "length": sum(len(sample.ids) for sample in every) / len(every),
        "truncated": sum(sample.is_truncated for sample in every) / len(every),
        "unscored": sum(sample.score is None for sample in every) / len(every),
    }


def shares(samples: Sequence[Sequence[Sample]], k: int) -> list[float]:
    """pass@k of each problem."""
    return [pass_at_k(len(group), sum(sample.passed for sample in group), k) for group in samples]


def compare(
    before: Sequence[Sequence[Sample]], after: Sequence[Sequence[Sample]], ks: Sequence[int]
) -> dict[str, Any]:
    """The paired difference of pass@k between two models on the same problems, by k."""
    return {str(k): asdict(paired_difference(shares(before, k), shares(after, k))) for k in ks}


def pick_examples(samples: dict[str, Sequence[Sequence[Sample]]], count: int) -> list[int]:
    """
    Problems to show: in turn the first that got better, that got worse, and that stayed; of one model, the first ones.

    Args:
        samples (`dict[str, Sequence]`): by model, the last against the first.
        count (`int`): how many, at most.
    """
    models = list(samples.values())
    changes = [b - a for a, b in zip(shares(models[0], 1), shares(models[-1], 1), strict=True)]
    kinds = [
        [i for i, change in enumerate(changes) if change > 0],
        [i for i, change in enumerate(changes) if change < 0],
        [i for i, change in enumerate(changes) if change == 0],
    ]
    picked: list[int] = []
    while len(picked) < min(count, len(changes)):
        picked += [kind.pop(0) for kind in kinds if kind]
    return sorted(picked[:count])


def to_markdown(report: dict[str, Any], rows: Sequence[dict], samples: dict[str, Sequence[Sequence[Sample]]]) -> str:
    """
    The report as Markdown.

    Args:
        report (`dict`): as `scripts/evaluate.py` writes it to JSON.
        rows (`Sequence[dict]`): the problems.
        samples (`dict[str, Sequence]`): by model, scored.
    """
    models = report["models"]
    ks = list(next(iter(models.values()))["pass_at"])
    confidence = "95% confidence interval over problems"
    lines = [
        f"# Evaluation: {report['data']}",
        "",
        f"{report['problems']} problems, {report['num_samples']} samples each, seed {report['seed']}, "
        f"{report['sampling']}. A sample passes with a score of at least {report['pass_threshold']:g}.",
        "",
        f"| | {' | '.join(f'pass@{k}' for k in ks)} | tokens | truncated |",
        f"| --- | {' | '.join('---' for _ in ks)} | --- | --- |",
    ]
    for name, figures in models.items():
        cells = [_interval(figures["pass_at"][k]) for k in ks]
        cells += [f"{figures['length']:.1f}", f"{figures['truncated']:.1%}"]
        lines.append(f"| {name}: {figures['model']} | {' | '.join(cells)} |")
    lines += ["", f"In brackets: {confidence} (Wilson's, by the effective number of problems)."]
    unscored = {name: figures["unscored"] for name, figures in models.items() if figures["unscored"]}
    if unscored:
        lines += [
            "",
            f"No reward applied to {', '.join(f'{s:.1%} ({n})' for n, s in unscored.items())}: counted as failed.",
        ]
    if report["difference"]:
        lines += ["", "| after - before | difference | better | worse | same | sign test |", "| --- |" + " --- |" * 5]
        for k, change in report["difference"].items():
            lines.append(
                f"| pass@{k} | {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] | "
                f"{change['improved']} | {change['worsened']} | {change['unchanged']} | p = {change['p_value']:.2g} |"
            )
        lines += ["", f"On the same problems with the same seeds; {confidence} for pairs (Agresti and Min)."]
    lines += ["", f"| reward | {' | '.join(models)} |", "| --- |" + " --- |" * len(models)]
    for reward in next(iter(models.values()))["rewards"]:
        values = [figures["rewards"][reward] for figures in models.values()]
        lines.append(f"| {reward} | {' | '.join('-' if v is None else f'{v:.4f}' for v in values)} |")
    lines += [
        "",
        "## Samples",
        "",
        "The first sample of some problems; of two models, in turn of problems that got better, worse, and stayed.",
    ]
    for index in report["shown"]:
        lines += ["", f"### Problem {index}", "", *_fenced(_prompt_text(rows[index]["prompt"]))]
        answer = next((rows[index][c] for c in ("solution", "answer", "tests") if rows[index].get(c)), None)
        if answer is not None:
            lines += ["", f"Reference: {_cell(str(answer))}"]
        lines += ["", f"| {' | '.join(models)} |", f"|{' --- |' * len(models)}"]
        firsts = [samples[name][index][0] for name in models]
        lines.append(f"| {' | '.join(_cell(sample.text) for sample in firsts)} |")
        verdicts = [
            f"{'passed' if s.passed else 'failed'}, score {'-' if s.score is None else f'{s.score:g}'}" for s in firsts
        ]
        passed = [
            f"{sum(s.passed for s in samples[name][index])} of {len(samples[name][index])} pass" for name in models
        ]
        lines.append(f"| {' | '.join(f'{v}; {p}' for v, p in zip(verdicts, passed, strict=True))} |")
    return "\n".join(lines) + "\n"


def _interval(figures: dict[str, float]) -> str:
    return f"{figures['mean']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _prompt_text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _fenced(text: str) -> list[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}text", text, fence]


def _cell(text: str, limit: int = 800) -> str:
    """Text for a cell of a table: shown as it is, whatever a model wrote."""
    text = text if len(text) <= limit else f"{text[:limit]} ..."
    for character, entity in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "&#124;"),
        ("`", "&#96;"),
        ("*", "&#42;"),
        ("_", "&#95;"),
        ("[", "&#91;"),
        ("]", "&#93;"),
        ("\\", "&#92;"),
        ("!", "&#33;"),
        ("$", "&#36;"),
    ):
        text = text.replace(character, entity)
    return text.replace("\r", "").replace("\n", "<br>") or "(nothing)"


def samples_to_jsonl(rows: Sequence[dict], samples: dict[str, Sequence[Sequence[Sample]]]) -> str:
    """One line for each problem: its row, and the samples by model without their token ids."""
    lines = []
    for index, row in enumerate(rows):
        groups = {
            name: [
                {k: v for k, v in asdict(sample).items() if k != "ids"} | {"tokens": len(sample.ids)}
                for sample in groups[index]
            ]
            for name, groups in samples.items()
        }
        lines.append(json.dumps({"problem": index, "row": row, "samples": groups}, default=str))
    return "\n".join(lines) + "\n"
