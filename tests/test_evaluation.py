"""Figures by hand, sampling by a tiny model."""

import itertools
import json
import math

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM

from trl_gspo import turn_reward
from trl_gspo.evaluation import (
    Sample,
    SeededSampling,
    compare,
    generate,
    mean_interval,
    paired_difference,
    pass_at_k,
    pick_examples,
    sample_seed,
    samples_to_jsonl,
    score,
    shares,
    summarize,
    to_markdown,
    to_scorers,
)


# pass@k.


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),
        (4, 2, 2, 5 / 6),
        (4, 4, 3, 1.0),
        (4, 0, 4, 0.0),
        (5, 2, 3, 0.9),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    for n, c, k in [(6, 2, 3), (7, 1, 4), (5, 3, 2)]:
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_is_no_draw(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


# Intervals.


def test_the_interval_of_yes_or_no_problems_is_wilsons():
    # p (1 - p) = 0.16, and the sample's variance is 1.6 / 9: 10 x 0.16 / (1.6 / 9) = 9 effective problems.
    found = mean_interval([1.0] * 8 + [0.0] * 2, draws=math.inf)
    z2 = 1.959964**2
    center = (0.8 + z2 / 18) / (1 + z2 / 9)
    half = 1.959964 * math.sqrt(0.16 / 9 + z2 / 324) / (1 + z2 / 9)
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, center - half, center + half), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.4738, 0.9467), abs=1e-4)


def test_nothing_or_everything_passed_has_a_width():
    none, every = mean_interval([0.0] * 10, 40), mean_interval([1.0] * 10, 40)
    # z^2 / (n + z^2), as Wilson has it: 3.8415 / 13.8415.
    assert (none.low, none.high) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert (every.low, every.high) == pytest.approx((0.72247, 1.0), abs=1e-4)


def test_shares_count_for_more_than_yes_or_no():
    # All problems at one half: as sure as their samples, which are 40.
    equal = mean_interval([0.5] * 10, draws=40)
    assert equal.high - equal.mean == pytest.approx(0.1480, abs=1e-3)  # half of Wilson's for 20 of 40
    # Values of variance 1/36 (sample), p (1 - p) = 1/4: 9 effective problems for each.
    spread = [1 / 3, 2 / 3] * 5
    variance = sum((v - 0.5) ** 2 for v in spread) / 9
    effective = 10 * 0.25 / variance
    assert effective == pytest.approx(81)
    found = mean_interval(spread, draws=1000)
    assert found.high - 0.5 == pytest.approx(
        1.959964 * math.sqrt(0.25 / 81 + 3.8415 / 4 / 81**2) / (1 + 3.8415 / 81), abs=1e-4
    )
    assert mean_interval(spread, draws=20).high > found.high


def test_the_interval_covers():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        truth = torch.rand(60, generator=generator)  # problems of mean difficulty one half
        passed = torch.rand(60, 4, generator=generator) < truth[:, None]
        found = mean_interval(passed.float().mean(1).tolist(), 240)
        covered += found.low <= 0.5 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_paired_difference_by_hand():
    before, after = [0.0] * 6 + [1.0] * 4, [1.0] * 5 + [0.0] + [1.0] * 3 + [0.0]
    found = paired_difference(before, after)
    assert (found.improved, found.worsened, found.unchanged) == (5, 1, 4)
    assert found.mean == pytest.approx(0.4)
    # (5 - 1) / 12 = 1/3; sqrt(((6 + 1) / 12 - 1/9) / 12) = 0.198373.
    assert (found.low, found.high) == pytest.approx(
        (1 / 3 - 1.959964 * 0.198373, 1 / 3 + 1.959964 * 0.198373), abs=1e-5
    )
    assert found.p_value == pytest.approx(2 * (1 + 6) / 64)


def test_a_difference_that_is_none_has_a_width_and_no_significance():
    found = paired_difference([0.5] * 8, [0.5] * 8)
    assert (found.mean, found.p_value, found.unchanged) == (0.0, 1.0, 8)
    assert found.high == -found.low == pytest.approx(1.959964 * math.sqrt(0.01))
    assert paired_difference([1.0], [0.0]).p_value == 1.0
    with pytest.raises(ValueError):
        paired_difference([0.0], [0.0, 1.0])


# Sampling.


def test_noise_makes_the_greatest_logit_a_sample_of_the_softmax():
    rows = 4000
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]]).expand(rows, 4)
    drawn = SeededSampling([sample_seed(0, "p", i) for i in range(rows)], "cpu")(None, logits).argmax(1)
    found = torch.bincount(drawn, minlength=4) / rows
    assert torch.allclose(found, logits[0].softmax(0), atol=0.025) and found[3] == 0


def test_a_row_has_the_same_noise_in_any_batch():
    logits = torch.zeros(3, 50)
    several = SeededSampling([5, 6, 7], "cpu")
    alone = SeededSampling([6], "cpu")
    for _ in range(3):
        assert torch.equal(several(None, logits)[1], alone(None, logits[:1])[0])
    assert sample_seed(0, "p", 0) != sample_seed(0, "p", 1) != sample_seed(1, "p", 1) != sample_seed(1, "q", 1)


@pytest.fixture(scope="module")
def model(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path).eval()


PROMPTS = ["ab", "What is 1 + 1?", [{"role": "user", "content": "Hello"}], "z"]


def texts(samples):
    return [[sample.text for sample in group] for group in samples]


def test_samples_do_not_depend_on_the_batch(model, tokenizer):
    options = {"seed": 3, "max_new_tokens": 12}
    whole = generate(model, tokenizer, PROMPTS, 3, batch_size=64, **options)
    assert texts(generate(model, tokenizer, PROMPTS, 3, batch_size=2, **options)) == texts(whole)
    assert texts(generate(model, tokenizer, PROMPTS, 3, batch_size=1, **options)) == texts(whole)
    # Nor on how many samples there are, nor on the other prompts.
    assert (
        texts(generate(model, tokenizer, PROMPTS[::-1], 2, **options)) == [group[:2] for group in texts(whole)][::-1]
    )
    assert len({text for group in texts(whole) for text in group}) == 12
    assert texts(generate(model, tokenizer, PROMPTS, 3, seed=4, max_new_tokens=12)) != texts(whole)


def test_samples_follow_the_model(model, tokenizer):
    """The first token of each sample, against the model's own probabilities for a padded prompt."""
    (group,) = generate(model, tokenizer, ["ab"], 600, batch_size=200, max_new_tokens=1, temperature=0.25)
    logits = model(**tokenizer("ab", return_tensors="pt", return_token_type_ids=False)).logits[0, -1] / 0.25
    found = torch.bincount(torch.tensor([sample.ids[0] for sample in group]), minlength=len(tokenizer)) / 600
    assert (found - logits.softmax(0)).abs().sum() / 2 < 0.2 < (found - found.flip(0)).abs().sum() / 2


def test_temperature_top_k_top_p_and_greedy(model, tokenizer):
    greedy = texts(generate(model, tokenizer, PROMPTS, 1, temperature=0, max_new_tokens=6))
    inputs = tokenizer("ab", return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 2:]
    assert greedy[0][0] == tokenizer.decode(ids, skip_special_tokens=True)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert texts(generate(model, tokenizer, PROMPTS, 1, max_new_tokens=6, **options)) == greedy
    assert texts(generate(model, tokenizer, PROMPTS, 1, max_new_tokens=6)) != greedy
    with pytest.raises(ValueError, match="`temperature=0` is greedy, so that `num_samples=2`"):
        generate(model, tokenizer, PROMPTS, 2, temperature=0)


def test_a_sample_ends_with_the_end_of_text(tokenizer):
    torch.manual_seed(0)
    model = make_model(tokenizer).eval()
    model.lm_head.weight.data[tokenizer.eos_token_id] += 0.3
    groups = generate(model, tokenizer, PROMPTS, 8, batch_size=8, max_new_tokens=20)
    samples = [sample for group in groups for sample in group]
    ended = [sample for sample in samples if not sample.is_truncated]
    assert ended and all(sample.ids.index(tokenizer.eos_token_id) == len(sample.ids) - 1 for sample in ended)
    assert all("<eos>" not in sample.text for sample in samples)
    assert all(len(sample.ids) == 20 for sample in samples if sample.is_truncated)
    # A model may have more ends than its tokenizer.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")]
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids("a")] += 1.0
    samples = [s for group in generate(model, tokenizer, PROMPTS, 8, max_new_tokens=20) for s in group]
    assert any(sample.text.endswith("a") and not sample.is_truncated for sample in samples)
    assert all("a" not in sample.text[:-1] for sample in samples)


# Scores.


def sample(text, passed=False, truncated=False, reward=None):
    return Sample(text, list(range(len(text) + 1)), truncated, {"r": reward}, reward, passed)


def test_rewards_are_called_as_the_trainer_calls_them():
    seen = []

    def length(prompts, completions, completion_ids, tag, trainer_state, log_metric, **kwargs):
        log_metric("x", 1.0)
        seen.append((prompts, completions, completion_ids, tag, trainer_state.global_step))
        return [0.5, None, float("nan")]

    async def late(completions, **kwargs):
        return [1.0, 2.0, None]

    chat = [{"role": "user", "content": "q"}]
    groups = [[sample("a"), sample("bb")], [sample("c")]]
    rows = [{"prompt": "p", "tag": 1}, {"prompt": chat, "tag": 2}]
    score(groups, rows, {"length": length, "late": late}, weights=[1.0, 0.5], threshold=1.0)
    assert seen == [
        (
            ["p", "p", chat],
            ["a", "bb", [{"role": "assistant", "content": "c"}]],
            [[0, 1], [0, 1, 2], [0, 1]],
            [1, 1, 2],
            0,
        )
    ]
    first, second, third = groups[0] + groups[1]
    assert (first.rewards, first.score, first.passed) == ({"length": 0.5, "late": 1.0}, 1.0, True)
    assert (second.rewards, second.score, second.passed) == ({"length": None, "late": 2.0}, 1.0, True)
    assert (third.rewards, third.score, third.passed) == ({"length": None, "late": None}, None, False)
    score(groups, rows, {"length": length, "late": late}, threshold=2.0)
    assert [s.passed for s in groups[0]] == [False, True]


def test_step_rewards_give_no_verdict():
    with pytest.raises(ValueError, match="`reward_funcs` names 'r', which rewards turns"):
        to_scorers(["r"], [turn_reward(lambda completions, **kwargs: [])], torch.device("cpu"))


def test_a_reward_model_scores_as_in_the_trainer(tokenizer, tmp_path, dataset, model_path):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from trl_gspo import GSPOConfig, GSPOTrainer

    torch.manual_seed(1)
    base = make_model(tokenizer).config.to_dict() | {"num_labels": 1}
    path = str(tmp_path / "reward")
    Qwen3ForSequenceClassification(Qwen3Config(**base)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    args = GSPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = GSPOTrainer(model_path, reward_funcs=path, args=args, train_dataset=dataset)
    (reward,) = to_scorers([path], [path], torch.device("cpu")).values()
    chat = [[{"role": "user", "content": text}] for text in ("Hello", "Where?")]
    for prompts, completions in (
        (["ab", "long prompt"], ["c", "d"]),
        (chat, [[{"role": "assistant", "content": text}] for text in ("Hi", "There it is")]),
    ):
        inputs = [{"prompt": prompt} for prompt in prompts]
        theirs = trainer._calculate_rewards(inputs, prompts, completions, [[1], [1]])[:, 0].tolist()
        assert reward(prompts=prompts, completions=completions) == pytest.approx(theirs, abs=1e-6)
        assert abs(theirs[0] - theirs[1]) > 1e-4


# Reports.


@pytest.fixture
def models():
    before = [
        [sample("a", True, reward=1.0), sample("bb", False, True, 0.0)],
        [sample("c"), sample("d")],
        [sample("e")] * 2,
    ]
    after = [[sample("a", False, reward=0.0)] * 2, [sample("c", True, reward=1.0)] * 2, [sample("e")] * 2]
    return {"before": before, "after": after}


def test_figures_of_a_model(models):
    figures = summarize(models["before"], [1, 2])
    assert figures["pass_at"]["1"]["mean"] == pytest.approx(1 / 6)
    assert figures["pass_at"]["2"]["mean"] == pytest.approx(1 / 3)
    assert figures["rewards"] == {"r": 0.5}  # of the two that it applied to
    assert figures["length"] == pytest.approx(13 / 6)
    assert (figures["truncated"], figures["unscored"]) == (pytest.approx(1 / 6), pytest.approx(4 / 6))
    assert shares(models["before"], 1) == [0.5, 0.0, 0.0]
    change = compare(models["before"], models["after"], [1])["1"]
    assert (change["improved"], change["worsened"], change["unchanged"]) == (1, 1, 1)
    assert change["mean"] == pytest.approx(1 / 6)


def test_examples_are_of_each_kind(models):
    assert pick_examples(models, 2) == [0, 1]
    assert pick_examples(models, 3) == [0, 1, 2] == pick_examples(models, 9)
    assert pick_examples({"model": models["after"]}, 2) == [0, 1]
    assert pick_examples(models, 0) == []


def test_the_report_shows_what_a_model_wrote_as_it_is(models):
    hostile = "<script>alert(1)</script> | a\n\n# b ``` ![x](http://x) $y$"
    models["after"][0] = [sample(hostile)] * 2
    rows = [
        {"prompt": "1 ```\n+ 1?", "solution": "a|b"},
        {"prompt": [{"role": "user", "content": "q"}]},
        {"prompt": "p"},
    ]
    report = {
        "data": "sort",
        "problems": 3,
        "num_samples": 2,
        "seed": 0,
        "sampling": "temperature 1",
        "pass_threshold": 1.0,
        "models": {name: {"model": f"m/{name}"} | summarize(groups, [1, 2]) for name, groups in models.items()},
        "difference": compare(models["before"], models["after"], [1, 2]),
        "shown": [0, 1],
    }
    text = to_markdown(report, rows, models)
    assert "| before: m/before | 0.167 [" in text and "| pass@1 | +0.167 [" in text
    assert "| &lt;script&gt;alert(1)&lt;/script&gt; &#124; a<br><br># b &#96;" in text.replace("| a |", "|")
    assert "<script>" not in text and "](http" not in text
    assert "````text\n1 ```\n+ 1?\n````" in text and "Reference: a&#124;b" in text and "user: q" in text
    assert "No reward applied to 66.7% (before)" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    (first, *_), lines = samples_to_jsonl(rows, models).splitlines(), 3
    first = json.loads(first)
    assert first["samples"]["before"][0] == {
        "text": "a",
        "tokens": 2,
        "is_truncated": False,
        "rewards": {"r": 1.0},
        "score": 1.0,
        "passed": True,
    }
    assert len(samples_to_jsonl(rows, models).splitlines()) == lines and first["row"] == rows[0]
