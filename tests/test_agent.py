"""The example of several turns: its environment, what it hands to TRL, and two steps of training with each credit."""

import agent
import pytest
import torch
from agent import DIGITS, TURNS, Environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_gspo.credit import step_kind
from trl_gspo.objective import turn_ids


STEPS, GENERATIONS = 2, 8
REPLY = DIGITS + 2


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("agent")
    agent.prepare(output, seed=0, steps=2)
    return output


@pytest.fixture(scope="module")
def base(output):
    folder = output / "base"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answers(requests):
    return [agent.SKILLS[agent.WANTED[request[0]]](request[1:-1]) for request in requests]


@pytest.mark.parametrize(
    ("request_", "answer"), [("a731=", "731"), ("b731=", "137"), ("c371=", "137"), ("d371=", "731")]
)
def test_environment_judges_the_answer_by_the_kind_of_request(request_, answer):
    right, wrong = Environment(request_), Environment(request_)
    right.step(answer)
    wrong.step("000")
    assert (right.rewards, wrong.rewards) == ([1 / TURNS], [0.0])


def test_episode_makes_a_request_of_each_kind_and_ends():
    environment = Environment("c371=")
    replies = [environment.step(answer) for answer in answers(environment.requests)]
    assert replies == [*environment.requests[1:], None]
    assert sorted(request[0] for request in environment.requests) == list(agent.WANTED)
    assert environment.requests == Environment("c371=").requests != Environment("c372=").requests
    assert sum(environment.rewards) == 1


def test_both_credits_give_the_same_reward():
    turn_rewards = [[0.125, 0.0, 0.125], [0.0, 0.0, 0.0]]
    assert agent.share_right(turn_rewards=turn_rewards) == list(map(sum, agent.right_turns(turn_rewards=turn_rewards)))
    assert step_kind(agent.right_turns) == "turn" and step_kind(agent.share_right) is None


def test_no_held_out_episode_is_trained_on():
    test, train = agent.first_requests(seed=0)
    assert len(test) == agent.TEST_ROWS and not set(test) & set(train)


def test_play_hands_over_what_was_sampled(base):
    model, tokenizer = base
    prompts = agent.first_requests(seed=0)[0][:3] * 2
    torch.manual_seed(0)
    episodes = agent.play(model, tokenizer, prompts, temperature=0.7)
    assert {len(rows) for rows in episodes.values()} == {len(prompts)}

    mask = torch.tensor(episodes["env_mask"]).bool()
    reply_lengths = [REPLY] * (TURNS - 1) + [1]
    assert mask[0].tolist() == [own for n in reply_lengths for own in [True] * DIGITS + [False] * n]
    assert (turn_ids(mask).amax(1) + 1).tolist() == [TURNS] * len(prompts) == list(map(len, episodes["turn_rewards"]))

    for prompt, ids, rewards in zip(prompts, episodes["completion_ids"], episodes["turn_rewards"], strict=True):
        environment, text, replies = Environment(prompt), tokenizer.decode(ids[:-1]), []
        while replies[-1:] != [None]:
            start = len(replies) * (DIGITS + REPLY)
            replies.append(environment.step(tokenizer.decode(ids[start : start + DIGITS])))
        assert ids[-1] == tokenizer.eos_token_id
        assert all(request in text for request in environment.requests[1:])
        assert environment.rewards == rewards

    # The log-probs of the cached rollout against one forward over the whole of it.
    ids = torch.tensor([a + b for a, b in zip(episodes["prompt_ids"], episodes["completion_ids"], strict=True)])
    with torch.no_grad():
        logps = (model(input_ids=ids).logits[:, REPLY - 1 : -1] / 0.7).log_softmax(-1)
    logps = logps.gather(2, ids[:, REPLY:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(episodes["logprobs"])[mask], logps[mask], rtol=1e-4, atol=1e-5)


def test_right_answers_are_rewarded(base, monkeypatch):
    # The sampler is made to answer right, so that a reward at the wrong turn or of the wrong request would show.
    _, tokenizer = base
    prompts = agent.first_requests(seed=0)[0][:2]
    scripts = ["".join(answers(Environment(prompt).requests)) for prompt in prompts]
    columns = iter(torch.tensor([tokenizer.convert_tokens_to_ids(list(script)) for script in scripts]).T)
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, count: next(columns)[:, None])
    assert agent.play(*base, prompts)["turn_rewards"] == [[1 / TURNS] * TURNS] * 2


@pytest.mark.parametrize("credit", agent.CREDITS)
def test_two_steps_of_training(credit, output, monkeypatch):
    trainers, prompts = [], []

    class Kept(agent.GSPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    def rollout(batch, trainer, original=agent.rollout):
        prompts.append(batch)
        return original(batch, trainer)

    monkeypatch.setattr(agent, "GSPOTrainer", Kept)
    monkeypatch.setattr(agent, "rollout", rollout)
    monkeypatch.setattr(agent, "TEST_ROWS", 16)
    summary = agent.train(
        credit, 0, output, max_steps=STEPS, logging_steps=1, steps_per_generation=STEPS, per_device_train_batch_size=16
    )
    assert 0 <= summary["after"] <= 1 and (output / credit / "model.safetensors").is_file()
    (batch,), (trainer,) = prompts, trainers
    # The contract of `rollout_func`: prompts come repeated, and `env_mask` becomes `tool_mask`.
    assert len(batch) == 16 * STEPS
    assert all(len(set(batch[i : i + GENERATIONS])) == 1 for i in range(0, len(batch), GENERATIONS))
    for inputs in trainer._buffered_inputs:
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        assert (turn_ids(mask).amax(1) + 1 == TURNS).all() and (mask.sum(1) == TURNS * DIGITS).all()
        assert inputs["advantages"].dim() == (1 if credit.startswith("outcome") else 2)
    logs = agent.training_logs(output / credit)
    name = agent.CREDITS[credit].reward.__name__
    assert logs[0]["reward"] == pytest.approx(logs[0][f"rewards/{name}/mean"])
    assert all(entry["grad_norm"] >= 0 for entry in logs) and len(logs) == STEPS


def test_steps_to_a_reward_by_hand():
    logs = [{"step": 4 * (i + 1), "reward": reward} for i, reward in enumerate([0.0, 0.6, 0.3, 0.6, 0.9])]
    assert agent.smoothed_rewards(logs) == pytest.approx([0.0, 0.3, 0.3, 0.5, 0.6])
    assert agent.steps_to(0.45, logs) == 16
    assert agent.steps_to(0.61, logs) is None


def test_comparison_is_written_when_a_run_falls_short(tmp_path):
    run = [{"step": 4, "reward": 0.2}, {"step": 8, "reward": 0.4}]
    logs = {credit: [run, run] for credit in agent.CREDITS}
    summaries = {credit: [{"before": 0.2, "after": 0.4}] * 2 for credit in agent.CREDITS}
    steps = {"outcome": [8, 8], "outcome_by_turn": [None, None], "turn": [4, None], "turn_alone": [4, 4]}
    text = agent.table(logs, summaries, steps)
    assert (
        "| 8 | 8, 8 |" in text
        and "| over 8 | -, - |" in text
        and "| over 8 | 4, - |" in text
        and "| 4 | 4, 4 |" in text
    )
    agent.draw(logs, steps, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 10_000
