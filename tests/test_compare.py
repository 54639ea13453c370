"""`scripts/compare.py`: its tasks, what each method trains with, what is measured, and which runs are taken over."""

import json
import math
import random

import compare
import pytest
import torch
from compare import METHODS, SETTINGS, GRPORun, GSPORun, Job, MeasuredGRPO, Problem, Setting
from tiny import sorting_rows, write_jsonl
from trl import GRPOConfig, GRPOTrainer

from trl_gspo import GSPOConfig, GSPOTrainer
from trl_gspo.rewards import exact_match_reward


# ---- tasks


def test_computation_by_hand():
    assert compare.next_line("2347") == "2217"
    assert compare.write_out("0347=") == "0217;0187;0057"


def test_a_slip_changes_one_digit_and_the_lines_follow_from_it():
    lines = compare.write_out("2347=", random.Random(1), slips=0.3).split(";")
    previous, slips = "2347", 0
    for line in lines:
        wrong = [one != other for one, other in zip(line, compare.next_line(previous), strict=True)]
        assert sum(wrong) <= 1 and not wrong[0]
        slips, previous = slips + any(wrong), line
    assert 0 < slips < len(lines) and lines[-1][:2] == "00"


def test_no_prompt_is_in_two_sets():
    digits = compare.digits_rows(seed=0)
    prompts = [{row["prompt"] for row in rows} for rows in digits.values()]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    every, short = compare.counting_rows(0), compare.counting_rows(0, compare.MEDIUM)
    held_out, trained = ({row["prompt"] for row in every[name]} for name in ("test", "train"))
    assert not held_out & trained and len(held_out | trained) == len(compare.LINES) * 100
    assert {row["prompt"] for row in short["test"]} == {p for p in held_out if int(p[:2]) in compare.MEDIUM}
    row = short["train"][0]
    assert row["solution"] == compare.write_out(row["prompt"])[-4:]


def test_rewards_by_hand():
    solution = ["0057", "0057", "13479"]
    texts = ["0217;0187;0057", "0217;0187;0058", "13479"]
    assert compare.last_line_reward(completions=texts, solution=solution) == [1.0, 0.0, 1.0]

    # A wrong second line, from which the third follows, and the end of text; then one that was cut off, and nonsense.
    texts = ["0217;0177;0047", "0217;01", "x;;0057"]
    ids = [[0] * 15, [0] * 7, [0] * 8]
    rewards = compare.right_lines(prompts=["0347="] * 3, completions=texts, completion_ids=ids)
    assert [[i for i, reward in enumerate(row) if reward] for row in rewards] == [[4, 14], [4], []]
    assert [len(row) for row in rewards] == [15, 7, 8]


# ---- methods


@pytest.fixture
def made(tmp_path):
    """The configuration that a run of a method is started with."""

    def make(method, setting="dense", **changes):
        problem = compare.small_problem(SETTINGS[setting], 0, tmp_path)
        job = Job("run", setting, method, 0, changes)
        options = compare.options_of(job, SETTINGS[setting], problem.options)
        return METHODS[method].config(output_dir=str(tmp_path), **options)

    return make


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("grpo", ("token", "grpo", 0.2, 0.27, 0.0, 4)),
        ("deepseekmath", ("token", "grpo", 0.2, None, 0.04, 1)),
        ("flag", ("sequence", "dapo", 0.2, None, 0.0, 1)),
        ("gspo", ("sequence", "grpo", 3e-4, 4e-4, 0.0, 4)),
        ("gspo_controlled", ("sequence", "grpo", 3e-4, 4e-4, 0.0, 4)),
        ("gspo_token", ("sequence_token", "grpo", 3e-4, 4e-4, 0.0, 4)),
        ("gspo_token_lines", ("sequence_token", "grpo", 3e-4, 4e-4, 0.0, 4)),
    ],
)
def test_each_method_trains_with_what_its_paper_says(made, method, expected):
    args = made(method)
    names = ("importance_sampling_level", "loss_type", "epsilon", "epsilon_high", "beta", "steps_per_generation")
    assert tuple(getattr(args, name) for name in names) == expected
    assert type(args) is (GSPOConfig if method.startswith("gspo") else GRPOConfig)
    assert getattr(args, "clip_fraction_target", None) == (0.15 if method == "gspo_controlled" else None)


def test_flag_is_flipped_and_nothing_else(made):
    flag, grpo = made("flag"), made("grpo")
    common = compare.small_problem(SETTINGS["dense"], 0, compare.OUTPUT).options
    own = set(common) | {"importance_sampling_level", "seed", "output_dir", "save_strategy", "report_to"}
    plain = GRPOConfig(
        **{name: getattr(flag, name) for name in own - {"importance_sampling_level"}}, disable_tqdm=True
    )
    for name in GRPOConfig.__dataclass_fields__:
        if name not in ("importance_sampling_level", "logging_dir", "run_name"):
            assert getattr(flag, name) == getattr(plain, name), name
    budget = ("max_steps", "per_device_train_batch_size", "num_generations", "learning_rate", "lr_scheduler_type")
    assert [getattr(flag, name) for name in budget] == [getattr(grpo, name) for name in budget]


@pytest.mark.parametrize("method", ["grpo", "flag", "gspo"])
def test_stale_setting_holds_for_every_method(made, method):
    args = made(method, "stale_16")
    assert (args.steps_per_generation, args.num_iterations, args.logging_steps) == (16, 4, 64)


def test_every_setting_has_methods_and_a_search_that_exist():
    for name, setting in SETTINGS.items():
        assert set(setting.methods) <= set(METHODS)
        assert (setting.tuned_on or name) in SETTINGS and SETTINGS[setting.tuned_on or name].tuned_on is None
        # As many rollouts as the steps say, and no half one at the end.
        assert setting.steps % ((setting.minibatches or compare.MINIBATCHES) * setting.iterations) == 0


# ---- trainers


def options(tmp_path, **changes):
    return (
        dict(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            num_generations=8,
            steps_per_generation=2,
            max_completion_length=6,
            max_steps=4,
            logging_steps=2,
            learning_rate=1e-2,
            importance_sampling_level="sequence",
            loss_type="grpo",
            epsilon=1e-3,
            epsilon_high=1e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        | changes
    )


def letters(completions, **_):
    return [float(len(set(text))) for text in completions]


def trained(trainer_class, model_path, dataset, args, **kwargs):
    trainer = trainer_class(model=model_path, reward_funcs=letters, args=args, train_dataset=dataset, **kwargs)
    trainer.train()
    return trainer


def assert_same_weights(one, other):
    for (name, weight), (_, expected) in zip(
        one.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_measured_trainer_trains_the_weights_of_trls(level, moe_path, dataset, tmp_path):
    args = GRPOConfig(**options(tmp_path, importance_sampling_level=level, beta=0.04))
    stock = trained(GRPOTrainer, moe_path, dataset, args)
    ours = trained(GRPORun, moe_path, dataset, args)
    assert_same_weights(ours, stock)
    rewards = [[log.get("reward") for log in trainer.state.log_history] for trainer in (ours, stock)]
    assert rewards[0] == rewards[1]


def test_metrics_are_those_of_our_trainer(moe_path, dataset, tmp_path):
    stock = trained(MeasuredGRPO, moe_path, dataset, GRPOConfig(**options(tmp_path, disable_dropout=True)))
    args = GSPOConfig(**options(tmp_path, pack_live_tokens=False, log_expert_change=True))
    ours = trained(GSPOTrainer, moe_path, dataset, args)
    assert_same_weights(stock, ours)
    for found, expected in zip(stock.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        shared = {key for key in found if key.startswith("gspo/")}
        assert {"gspo/clip_fraction/tokens", "gspo/ratio/noise", "gspo/expert_change_fraction"} <= shared
        assert {key: found[key] for key in shared} == {key: expected[key] for key in shared}
    assert any(log["gspo/expert_change_fraction"] > 0 for log in ours.state.log_history[:-1])


def test_clipped_tokens_of_grpo_by_hand(model_path, dataset, tmp_path):
    seen = []

    class Watched(MeasuredGRPO):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            ratio = (self._logps - inputs["old_per_token_logps"]).exp()
            advantages = inputs["advantages"].unsqueeze(1)
            is_clipped = ((ratio < 1 - 1e-3) & (advantages < 0)) | ((ratio > 1 + 1e-3) & (advantages > 0))
            is_live = inputs["completion_mask"].bool() & (advantages != 0)
            seen.append(((is_clipped & is_live).sum().item(), is_live.sum().item()))
            return loss

    args = GRPOConfig(**options(tmp_path, importance_sampling_level="token"))
    logs = trained(Watched, model_path, dataset, args).state.log_history[:-1]
    for log, window in zip(logs, (seen[:2], seen[2:]), strict=True):
        clipped, live = map(sum, zip(*window, strict=True))
        assert log["gspo/clip_fraction/tokens"] == pytest.approx(clipped / live) and clipped > 0
        # A token's clip is no sequence's.
        assert [key for key in log if "clip_fraction" in key] == ["gspo/clip_fraction/tokens"]


@pytest.mark.parametrize(("trainer_class", "config"), [(GRPORun, GRPOConfig), (GSPORun, GSPOConfig)])
def test_noise_reaches_the_old_log_probs_and_nothing_else(trainer_class, config, model_path, dataset, tmp_path):
    ours = dict(pack_live_tokens=False) if config is GSPOConfig else {}
    args = config(**options(tmp_path, max_steps=1, disable_dropout=True, **ours))
    with_noise, without = (trained(trainer_class, model_path, dataset, args, noise=noise) for noise in (0.3, 0.0))
    added = []
    for noisy, plain in zip(with_noise._buffered_inputs, without._buffered_inputs, strict=True):
        assert noisy.keys() == plain.keys()
        for name, value in plain.items():
            if name == "old_per_token_logps":
                added.append((noisy[name] - value).flatten())
            elif torch.is_tensor(value):
                assert torch.equal(noisy[name], value), name
    added = torch.cat(added)
    assert abs(added.mean()) < 0.1 and added.std() == pytest.approx(0.3, rel=0.15)
    assert without.state.log_history[0]["gspo/ratio/noise"] < 1e-5
    assert with_noise.state.log_history[0]["gspo/ratio/noise"] > 0.05


def test_weights_that_are_not_finite_are_a_result(model_path, dataset, tmp_path):
    rows = list(dataset)
    changes = options(tmp_path, learning_rate=math.inf, max_steps=6)
    for name in ("output_dir", "importance_sampling_level", "loss_type", "epsilon", "epsilon_high"):
        changes.pop(name)
    problem = Problem(model_path, [exact_match_reward], None, dataset, rows, changes)
    job = Job("broken", "x", "gspo", 0)
    compare.train(job, Setting("x", "dense", 6, ("gspo",)), problem, tmp_path)
    run = compare.read_run(job, tmp_path)
    assert "not finite at step" in run["broken"] and run["after"] == 0.0
    assert run["measures"]["broken"] == 1.0 and run["measures"]["accuracy"] == 0.0


# ---- all runs


class InThisProcess:
    """Stands in for the pool of processes."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    map = staticmethod(map)


@pytest.fixture
def small(monkeypatch):
    """Everything as small as it runs."""
    monkeypatch.setattr(compare, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(compare, "SORT_STEPS", 2)
    monkeypatch.setattr(compare, "SORT_ROWS", {"test": 32, "train": 256})
    monkeypatch.setattr(compare, "TEST_COMPLETIONS", 32)
    monkeypatch.setattr(compare, "LEARNING_RATES", {"dense": (1e-3,)})

    def last_line_reward(completions, **_):  # a model of two steps gets nothing right
        return [len(set(text)) / 5 for text in completions]

    monkeypatch.setattr(compare, "last_line_reward", last_line_reward)


def test_a_miniature_of_two_methods_is_taken_over_where_it_was_cut_off(small, monkeypatch, tmp_path, capsys):
    output, page = tmp_path / "out", tmp_path / "evidence.md"
    page.write_text("# Page\n" + "".join("{}\nof before\n{}\n".format(*compare.markers(b)) for b in compare.BLOCKS))
    words = ["all", "--settings", "dense", "--methods", "grpo", "gspo", "--steps", "4", "--seeds", "2"]
    words += ["--output", str(output), "--docs", str(page)]
    assert compare.main(words) == 0
    names = {str(path.parent.relative_to(output)) for path in output.glob("*/*/**/summary.json")}
    assert names == {
        *(f"tuning/dense/{family}_0.001" for family in ("grpo", "gspo")),
        *(f"dense/{method}/seed_{seed}" for method in ("grpo", "gspo") for seed in (0, 1)),
    }
    runs = {run["method"]: run for run in json.loads((output / "results.json").read_text())["runs"]}
    # What the search found is what the runs were made with.
    for method in ("grpo", "gspo"):
        assert runs[method]["options"]["learning_rate"] == 1e-3
    assert 0 < runs["gspo"]["options"]["epsilon"] != 3e-4
    assert runs["gspo"]["measures"]["noise"] < 1e-5 and runs["grpo"]["measures"]["clipped"] is not None
    text = page.read_text()
    assert "of before" not in text and (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")
    assert "| dense, 6 tokens | GSPO | " in text and "| dense, 6 tokens | base models | " in text

    started = []
    monkeypatch.setattr(
        compare, "train", lambda job, *args, original=compare.train: (started.append(job.folder), original(job, *args))
    )
    monkeypatch.setattr(compare, "prepare", None)
    (output / "dense" / "gspo" / "seed_1" / "summary.json").unlink()
    assert compare.main(words) == 0 and started == ["dense/gspo/seed_1"]
    report = ["report", *words[1:]]
    del report[report.index("--steps") : report.index("--steps") + 2]
    capsys.readouterr()
    assert compare.main(report) == 0 and len(started) == 1
    assert capsys.readouterr().out.strip() == (output / "compare.md").read_text().strip()
    # The page names the command that trained, not the one that wrote.
    command = json.loads((output / "results.json").read_text())["command"]
    assert command == f"python scripts/compare.py {' '.join(words)}"


@pytest.mark.exhaustive
def test_a_miniature_in_processes_of_its_own(tmp_path):
    words = ["--settings", "moe", "long", "stale_8", "noise_0.1", "medium", "--seeds", "1", "--steps", "4"]
    assert compare.main(["all", *words, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {(run["setting"], run["method"]) for run in results["runs"]} == {
        (name, method) for name in words[1:6] for method in SETTINGS[name].methods
    }
    for run in results["runs"]:
        has_routing = run["setting"] == "moe" and run["method"] not in ("deepseekmath", "flag")
        assert (run["measures"]["experts"] is not None) == has_routing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all", "--settings", "dens"], "`--settings dens` is not known: dense, moe,"),
        (["all", "--seeds", "0"], "`--seeds 0` must be at least 1"),
        (["all", "--seeds", "1001"], "would evaluate on the seed of the search"),
        (["all", "--learning_rate", "1e-3"], "`--learning_rate` is no option here"),
        (["all", "--scale", "large", "--config", "configs/gsm8k_0.5b.yaml"], "needs a GPU"),
        (["report", "--output", "nowhere"], "`--output nowhere` holds no finished run"),
        (["all", "--docs", "nowhere.md"], "nowhere.md does not hold the two lines"),
    ],
)
def test_bad_input_is_named_before_anything_runs(words, message, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_all", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compare.main(words) == 2
    assert message in capsys.readouterr().err


# ---- a real model


def test_large_scale_takes_model_task_and_budget_of_a_configuration(model_path, monkeypatch, tmp_path):
    rows = [{"question": row["prompt"], "answer": f"#### {row['solution']}"} for row in sorting_rows(80, 0)]
    data = [str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in (("a", rows[:64]), ("b", rows[64:]))]
    words = ["--config", "configs/gsm8k_0.5b.yaml", "--model_name_or_path", model_path]
    words += ["--dataset_name", data[0], "--eval_dataset_name", data[1], "--dataset_test_split", "train"]
    words += ["--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--max_completion_length", "8"]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--logging_steps", "1"]
    words += ["--gradient_checkpointing", "false"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scale = compare.large_scale(words)
    monkeypatch.undo()
    (name,) = scale.settings
    assert name == "gsm8k" and scale.settings[name].label == f"{model_path} on gsm8k"

    problem = scale.problem(scale.settings[name], 0, tmp_path)
    # The configuration's, the command line's, and nothing of what a method decides.
    assert problem.options["lr_scheduler_type"] == "constant_with_warmup" and problem.options["max_steps"] == 2
    assert not problem.options.keys() & {"epsilon", "steps_per_generation", "output_dir", "eval_strategy"}
    assert len(problem.train_rows) == 64 and len(problem.test_rows) == 16

    monkeypatch.setattr(compare, "TEST_COMPLETIONS", 16)
    (job,) = compare.setting_jobs(scale.settings, ["gspo"], 1, {}, {})
    made = compare.options_of(job, scale.settings[name], problem.options)
    assert (made["steps_per_generation"], made["learning_rate"]) == (16, 1e-6) and "epsilon" not in made
    (flag,) = compare.setting_jobs(scale.settings, ["flag"], 1, {}, {})
    assert compare.options_of(flag, scale.settings[name], problem.options)["steps_per_generation"] == 4
    compare.train_missing(job, scale, tmp_path)
    assert compare.read_run(job, tmp_path)["measures"]["reward"] is not None


def test_a_run_of_other_options_is_not_taken_over(tmp_path, monkeypatch):
    setting, made = SETTINGS["noise_0.1"], {"learning_rate": 1e-3}
    path = tmp_path / "summary.json"
    assert not compare.is_finished(path, made, setting)
    path.write_text(json.dumps({"options": compare.fingerprint(made, setting)}))
    assert compare.is_finished(path, made, setting)
    assert not compare.is_finished(path, {"learning_rate": 2e-3}, setting)
    assert not compare.is_finished(path, made, setting._replace(noise=0.2))

    started = []
    monkeypatch.setattr(compare, "train", lambda job, *args: started.append(job))
    job = Job("run", "noise_0.1", "gspo", 0, made)
    path = tmp_path / "run" / "summary.json"
    path.parent.mkdir()
    options = compare.options_of(job, setting, compare.small_problem(setting, 0, tmp_path).options)
    for changes, count in (({}, 0), ({"max_steps": 7}, 1)):
        facts = dict(before=0.0, after=0.0, broken=None, seconds=1.0)
        path.write_text(json.dumps(facts | dict(options=compare.fingerprint(options | changes, setting))))
        compare.train_missing(job, compare.SMALL, tmp_path)
        assert len(started) == count


def test_search_takes_the_best_accuracy_and_where_the_controller_stood(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "LEARNING_RATES", {"dense": (1e-4, 2e-4)})
    jobs = compare.tuning_jobs(["dense"], {})
    for job, after in zip(jobs, (0.5, 0.6, 0.7, 0.7), strict=True):
        folder = tmp_path / job.folder
        folder.mkdir(parents=True)
        facts = dict(before=0.1, after=after, broken=None, seconds=1.0, options={"steps_per_generation": 4})
        (folder / "summary.json").write_text(json.dumps(facts))
        logs = [
            {"step": step, "reward": 0.5, "grad_norm": 1.0, "gspo/epsilon_low": low, "gspo/epsilon_high": 2 * low}
            for step, low in ((4, 0.02), (8, 0.01), (12, 0.001))
        ]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert compare.tuned(tmp_path, jobs) == {
        "dense": {
            "grpo": {"learning_rate": 2e-4},
            # The lower of two that are as good.
            "gspo": {"learning_rate": 1e-4, "epsilon": 0.01, "epsilon_high": 0.02},
        }
    }
    choices = compare.tuned(tmp_path, jobs)
    jobs = compare.setting_jobs({"dense": SETTINGS["dense"]}, METHODS, 1, choices, {})
    changes = {job.method: job.changes for job in jobs}
    assert changes["deepseekmath"] == changes["flag"] == {"learning_rate": 2e-4}
    assert changes["gspo"] == changes["gspo_token"] == choices["dense"]["gspo"]
    assert changes["gspo_controlled"] == {"learning_rate": 1e-4}
    (job,) = compare.setting_jobs({"stale_8": SETTINGS["stale_8"]}, ["flag"], 1, {"stale_16": choices["dense"]}, {})
    assert job.changes == {"learning_rate": 2e-4}


def test_the_longest_answer_fits(tmp_path):
    problem = compare.small_problem(SETTINGS["long"], 0, tmp_path)
    assert problem.options["max_completion_length"] == 280
    longest = max(len(compare.write_out(row["prompt"])) + 1 for row in problem.test_rows)
    assert longest == 250 < problem.options["max_completion_length"]
