"""`scripts/benchmark.py`: what it measures beside time, and what `--check` finds. No test depends on the clock."""

import dataclasses
import functools
import json

import benchmark
import pytest
import torch
from benchmark import Bench, Case, LiveBytes, Result, Side, broken

from trl_gspo import GSPOTrainer
from trl_gspo.diagnostics import RatioStatistics
from trl_gspo.host import HAS_FUSED_HEAD


needs_packing = pytest.mark.skipif(not HAS_FUSED_HEAD, reason="rows are packed from TRL 1.15")

SMALL = ["--models", "tiny", "--lengths", "40", "--repeats", "1", "--check", "--micro-batches"]


@pytest.fixture
def no_clock(monkeypatch):
    """Bounds on time are never broken, and nothing is imported anew."""
    monkeypatch.setattr(benchmark, "LEAST_SHARE", {})
    monkeypatch.setattr(benchmark, "LEAST_SPEED", 0.0)
    monkeypatch.setattr(benchmark, "import_cost", lambda rounds: (4.0, 0.04))


def tokens_by_hand(case):
    """Tokens of the padded batch, of all rows, and of the live ones without their last."""
    rollout = benchmark.make_rollout(case, 2048, torch.device("cpu"))
    padded = attended = live = 0
    for row in range(case.rows):
        length = 0
        for mask in (rollout["prompt_mask"][row], rollout["completion_mask"][row]):
            padded += len(mask)
            length += sum(mask.tolist())
        attended += length
        live += length - 1 if rollout["advantages"][row].item() != 0 else 0
    return padded, attended, live


# ---- rows


@needs_packing
def test_rows_hold_tokens_memory_and_gradients(no_clock, tmp_path, capsys):
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n\n{benchmark.BEGIN}\nof before\n{benchmark.END}\n\nThe end.\n")
    options = ["--dead", "0", "0.5", "--output", str(tmp_path / "out"), "--docs", str(page)]
    assert benchmark.main([*SMALL, "1", "4", *options]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["case"]["micro_batch"], row["case"]["dead"]) for row in found["rows"]] == [
        (1, 0.0), (1, 0.5), (4, 0.0), (4, 0.5),
    ]  # fmt: skip
    for row in found["rows"]:
        stock, _, live = tokens_by_hand(Case(**row["case"]))
        assert row["stock_tokens"] == stock and row["tokens_with_gradient"] == live
        assert row["bound"] == stock / live > 1.5
        assert row["our_tokens"] == live + row["stub_tokens"] and row["stub_tokens"] == 0
        assert 0 < row["gradient_difference"] < 1e-5
        assert 0 < row["our_peak_bytes"] <= row["stock_peak_bytes"]
        assert row["our_noise"] == 0.0 <= row["stock_noise"] < 1e-6
        assert len(row["speed_by_wall"]) == len(row["speed_by_cpu"]) == 1 and row["scoring_speed_by_cpu"] > 0
    assert found["broken"] == []
    table = (tmp_path / "out" / "table.md").read_text()
    assert sum(line.startswith("| tiny | lognormal, 40 |") for line in table.splitlines()) == 4
    for picture in (tmp_path / "out" / "speed.png", tmp_path / "speed.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith(f"# Speed\n\n{benchmark.BEGIN}\n") and text.endswith(f"{benchmark.END}\n\nThe end.\n")
    assert table in text and "of before" not in text and "(speed.png)" in text


@needs_packing
def test_routers_see_all_tokens_and_no_padding(tmp_path):
    case = Case("moe", longest=24, micro_batch=4, rows=8, router_loss=True)
    result = benchmark.measure(Bench(case, tmp_path), case, rounds=1)
    stock, attended, _ = tokens_by_hand(case)
    assert (result.stock_tokens, result.our_tokens, result.tokens_with_gradient) == (stock, attended, attended)
    assert [message for message in broken(result) if "speed-up" not in message] == []


def test_default_rows_hold_each_value_of_each_axis():
    cases = benchmark.default_cases()
    assert {case.micro_batch for case in cases} >= {1, 4, 8, 16}
    assert {case.dead for case in cases} >= {0.0, 0.5, 0.9}
    assert {case.lengths for case in cases} == {"equal", "lognormal"}
    assert {case.longest for case in cases} >= {512, 2048, 8192}
    assert {(case.model, case.router_loss) for case in cases} >= {("dense", False), ("moe", False), ("moe", True)}
    assert len(set(cases)) == len(cases)
    for case in [*cases, *benchmark.quick_cases()]:
        # Each optimizer step of a rollout batch has a micro-batch, and each group all of its rows.
        assert case.rows % (benchmark.STEPS * case.micro_batch) == 0
        assert case.rows % min(benchmark.GROUP, case.rows) == 0
        advantages = benchmark.make_rollout(dataclasses.replace(case, longest=8), 2048, torch.device("cpu"))[
            "advantages"
        ]
        assert (advantages != 0).any()


def test_a_model_for_a_gpu_is_refused_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--models", "qwen2.5-7b"]) == 2
    assert "qwen2.5-7b needs a GPU" in capsys.readouterr().err


def test_a_page_without_markers_is_refused_before_anything_runs(tmp_path, capsys):
    page = tmp_path / "speed.md"
    page.write_text("# Speed\n")
    assert benchmark.main(["--docs", str(page)]) == 2
    assert benchmark.BEGIN in capsys.readouterr().err and page.read_text() == "# Speed\n"


# ---- check


@needs_packing
def test_check_finds_a_trainer_that_does_not_pack(no_clock, monkeypatch, tmp_path, capsys):
    config = functools.partial(benchmark.GSPOConfig, pack_live_tokens=False)
    monkeypatch.setattr(benchmark, "GSPOConfig", config)
    assert benchmark.main([*SMALL, "4", "--output", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    name = "BROKEN tiny, lognormal 40, micro-batch 4, dead 0.5: tokens through the model"
    assert sum(line.startswith(name) for line in lines) == 1


@needs_packing
def test_check_finds_a_wrong_gradient(no_clock, monkeypatch, tmp_path, capsys):
    compute_loss = GSPOTrainer._compute_loss
    monkeypatch.setattr(GSPOTrainer, "_compute_loss", lambda *args: 1.001 * compute_loss(*args))
    assert benchmark.main([*SMALL, "4", "--output", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    assert len(lines) == 1 and "gradient differs by 1.0e-03" in lines[0]


def result(**changes):
    """A row that is just within its bounds."""
    case = Case(**{name: changes.pop(name) for name in list(changes) if name in Case.__dataclass_fields__})
    values = dict(
        stock_tokens=5000,
        our_tokens=1020,
        stub_tokens=0,
        tokens_with_gradient=1000,
        speed_by_wall=[0.1],
        speed_by_cpu=[4.4, 4.5, 5.0],
        scoring_speed_by_wall=1.0,
        scoring_speed_by_cpu=1.0,
        stock_peak_bytes=100,
        our_peak_bytes=2404,  # 72 for each of 32 rows
        stock_noise=1e-8,
        our_noise=1e-8,
        gradient_difference=1e-5,
    )
    return Result(case, **values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"our_tokens": 1024, "stub_tokens": 4},
        {"dead": 0.0, "speed_by_cpu": [4.0]},
        {"micro_batch": 4, "speed_by_cpu": [1.0]},
        {"dead": 0.9, "speed_by_cpu": [1.0]},
        {"lengths": "equal", "dead": 0.0, "stock_tokens": 1000, "speed_by_cpu": [0.98]},
        {"dtype": "bfloat16", "gradient_difference": 1e-2},
        {"model": "qwen2.5-7b", "speed_by_cpu": [0.1], "speed_by_wall": [4.5]},
    ],
)
def test_a_row_at_its_bounds_is_not_broken(changes):
    assert broken(result(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_difference": 1.1e-5}, "gradient differs by 1.1e-05, more than 1e-05"),
        ({"gradient_difference": float("nan")}, "gradient differs by nan, more than 1e-05"),
        ({"our_tokens": 1021}, "tokens through the model: 1021, more than 1020"),
        ({"speed_by_cpu": [9.0, 4.4, 1.0]}, "speed-up 0.88 of the bound, less than 0.9"),
        ({"micro_batch": 1, "dead": 0.0, "speed_by_cpu": [3.9]}, "speed-up 0.78 of the bound, less than 0.8"),
        (
            {"lengths": "equal", "dead": 0.0, "speed_by_cpu": [0.97]},
            "speed-up 0.970, less than 0.98, where there is nothing to save",
        ),
        ({"model": "qwen2.5-7b"}, "speed-up 0.02 of the bound, less than 0.9"),
        ({"our_peak_bytes": 2405}, "memory: 2405 bytes at the peak, stock 100"),
        ({"our_noise": 2e-8}, "noise 2.0e-08 nats, stock 1.0e-08"),
    ],
)
def test_a_row_beyond_a_bound_is_named(changes, message):
    assert broken(result(**changes)) == [message]


def test_check_finds_slow_metrics_and_a_slow_import(no_clock, monkeypatch, tmp_path, capsys):
    side = Side(1000, 0, 100, 0.0, [])
    monkeypatch.setattr(benchmark, "Bench", lambda case, folder: side)
    monkeypatch.setattr(benchmark, "measure", lambda bench, case, rounds: result(our_tokens=1000))
    monkeypatch.setattr(benchmark, "import_cost", lambda rounds: (4.0, 0.051))
    monkeypatch.setattr(benchmark, "metrics_cost", lambda bench, case, rounds: [1.0, 1.03, 1.04])
    assert benchmark.main([*SMALL, "4", "--metrics", "--output", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    assert len(lines) == 3
    assert all("1.030 of the time without, most 1.02" in line for line in lines[:2])
    assert lines[2] == "BROKEN import: 51 ms beside TRL's trainer, most 50"


# ---- how it measures


def test_live_bytes_are_the_most_that_were_there_at_once():
    before = torch.ones(1000)
    with LiveBytes() as live:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + before  # 8000
        view = second.view(10, 100)  # the same bytes
        transposed = before.view(10, 100).t()  # was there
        assert live.most == 8000
        del first, second  # 4000: the view keeps the second
        third = torch.zeros(750)  # 7000
        assert live.most == 8000
        third.add_(1.0)
        fourth = torch.zeros(500)  # 9000
    assert live.most == 9000 and len(view) == 10 and len(transposed) == 100 and len(fourth) == 500


def test_a_round_is_the_ratio_of_sums(monkeypatch):
    order = []

    def timed(action, device):
        order.append(action())
        return {"a": (1.0, 2.0), "b": (3.0, 4.0), "c": (0.5, 1.0), "d": (1.5, 0.5)}[order[-1]]

    monkeypatch.setattr(benchmark, "timed", timed)
    first, second = [lambda: "a", lambda: "b"], [lambda: "c", lambda: "d"]
    # (1 + 3) / (0.5 + 1.5) and (2 + 4) / (1 + 0.5)
    assert benchmark.ratios_of_a_round(first, second, torch.device("cpu")) == (2.0, 4.0)
    assert order == ["a", "c", "d", "b"]


def test_metrics_are_there_on_one_side_only(monkeypatch, tmp_path):
    calls, update = [], RatioStatistics.update

    def counted(self, *args, **kwargs):
        calls.append(1)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(RatioStatistics, "update", counted)
    case = Case("tiny", longest=16, micro_batch=4, rows=8)
    costs = benchmark.metrics_cost(Bench(case, tmp_path), case, rounds=2)
    assert len(costs) == 2 and min(costs) > 0
    assert len(calls) == 3 * 2  # one round to warm up and two, of two micro-batches


def test_import_cost_is_of_fresh_processes():
    stock, ours = benchmark.import_cost(1)
    assert stock > ours > 0
