"""
`GSPOTrainer.train` on every engine against one process: the same loss, gradient norm, weights and metrics after four
optimizer steps on the same rollouts. What is trained, and what may differ, is in engines.py.

All cases of an engine's launch run one after the other in its processes, once a session; each test reads its own.
"""

import itertools
import json
import sys
from collections import Counter, defaultdict

import pytest
import torch
from engines import (
    ENGINES,
    GRAD_NORM,
    LOSS,
    OPTIONS,
    SCRIPT,
    UNITS,
    WEIGHTS,
    Case,
    differences,
    load,
    place,
    run_cases,
)
from filelock import FileLock  # a requirement of torch
from ranks import PATIENCE, run_on_ranks
from tiny import make_model

from trl_gspo.host import HAS_FUSED_HEAD


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_FUSED_HEAD, reason="rows are packed from TRL 1.15"),
]

# What `make test` runs: each engine with each model, and over all of them each unit, rollout and way.
REDUCED = [
    Case("one", "dense", "sequence", "mixed", is_packed=True),
    Case("one", "moe", "turn", "dead", is_packed=True),
    Case("one_accumulating", "dense", "sequence_token", "mixed"),
    Case("one_accumulating", "moe", "sequence", "mixed"),
    Case("ddp", "dense", "turn", "mixed", is_packed=True, option="target"),
    Case("ddp", "moe", "sequence", "dead"),
    Case("zero_1", "dense", "sequence_token", "mixed"),
    Case("zero_1", "moe", "turn", "dead", is_packed=True),
    Case("zero_2", "dense", "turn", "dead"),
    Case("zero_2", "moe", "sequence", "mixed", is_packed=True),
    Case("zero_3", "dense", "sequence", "dead", is_packed=True),
    Case("zero_3", "moe", "sequence_token", "mixed"),
    Case("fsdp_2", "dense", "sequence_token", "mixed"),
    Case("fsdp_2", "moe", "turn", "dead", is_packed=True),
    Case("two_machines", "dense", "sequence", "dead", is_packed=True),
    Case("two_machines_zero_3", "moe", "turn", "dead"),
    Case("ddp", "dense", "sequence", "mixed", is_packed=True, option="twice"),
    Case("ddp", "moe", "sequence", "mixed", is_packed=True, is_adapter=True),
    Case("zero_3", "dense", "turn", "mixed", is_adapter=True),
]
MODELS = ("dense", "moe")
RANKS = ("ddp", "zero_1", "zero_2", "zero_3", "fsdp_2", "two_machines", "two_machines_zero_3")
ADAPTED = ("one", "one_accumulating", "ddp", "zero_2", "zero_3", "two_machines")
OPTED = ("ddp", "zero_2", "zero_3")
BOTH = (False, True)
EVERY = [
    Case(*fields)
    for fields in itertools.chain(
        itertools.product(("one", "one_accumulating", *RANKS), MODELS, UNITS, ("mixed", "dead"), BOTH),
        itertools.product(ADAPTED, MODELS, UNITS, ("mixed",), BOTH, (True,)),
        itertools.product(OPTED, MODELS, UNITS, ("mixed",), BOTH, (False,), ("kl", "target", "twice")),
        itertools.product(OPTED, MODELS, ("sequence",), ("mixed",), BOTH, (True,), ("kl",)),
        itertools.product(OPTED, ("moe",), UNITS, ("mixed",), BOTH, (False,), ("router",)),
    )
]
ON_GPU = [Case("cuda_fsdp_2", model, unit, is_packed=way) for model in MODELS for unit in UNITS for way in BOTH]
CASES = [*REDUCED, *(case for case in EVERY if case not in REDUCED and case != case.reference), *ON_GPU]


def of_cases(wants=lambda case: True):
    """Runs a test for each case that it wants: most of them in the exhaustive run alone."""
    needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    marks = {case: pytest.mark.exhaustive for case in EVERY if case not in REDUCED} | dict.fromkeys(ON_GPU, needs_gpu)
    cases = [pytest.param(case, marks=marks.get(case, ()), id=str(case)) for case in CASES if wants(case)]
    return pytest.mark.parametrize("case", cases)


def is_on_two_ranks(case):
    return ENGINES[case.engine].ranks == 2


@pytest.fixture(scope="session")
def results(request, tokenizer, tmp_path_factory):
    """Gives the results of all ranks for a case. Two workers of pytest share them, and wait for one another."""
    module, folder = sys.modules[__name__], tmp_path_factory.getbasetemp()
    folder = (folder.parent if hasattr(request.config, "workerinput") else folder) / "engines"
    wanted = [item.callspec.params["case"] for item in request.session.items if item.module is module]
    launches = defaultdict(list)
    for one in dict.fromkeys(one for case in wanted for one in (case.reference, case)):
        launches[place(one)].append(one)

    def of(case):
        launch = folder / place(case)
        launch.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (launch / "cases.json").exists():
                _launch(launches[place(case)], launch, folder / "models", tokenizer)
        rank_files = [launch / f"{case}.{rank}.pt" for rank in range(ENGINES[case.engine].ranks)]
        if not all(path.exists() for path in rank_files):
            reached = {path.stem: path.read_text() for path in sorted(launch.glob("at_*.txt"))}
            pytest.fail(f"{place(case)} broke off at {reached}:\n{(launch / 'error.txt').read_text()}", pytrace=False)
        return load(folder, case)

    return of


def _launch(cases, launch, models, tokenizer):
    if not models.exists():
        for name in MODELS:
            torch.manual_seed(0)
            make_model(tokenizer, moe=name == "moe").save_pretrained(models / name)
            tokenizer.save_pretrained(models / name)
    (launch / "cases.json").write_text(json.dumps(cases))
    engine = ENGINES[cases[0].engine]
    script = launch / "script"
    script.mkdir()
    size = dict(ranks=engine.launched, machines=engine.machines)
    try:
        run_on_ranks(run_cases, script, launch, models, **size, patience=PATIENCE + 15 * len(cases))
    except AssertionError as error:
        (launch / "error.txt").write_text(str(error))


# ---- each training against one process


@of_cases()
def test_loss_gradient_norm_and_weights_are_those_of_one_process(case, results):
    found, references = results(case), results(case.reference)
    assert all(torch.equal(one["start"], references[0]["start"]) for one in found)
    assert all(torch.equal(one["moved"], found[0]["moved"]) for one in found)
    measured = differences(case, found, references)
    assert measured["weights"] < WEIGHTS and measured["loss"] < LOSS and measured["grad_norm"] < GRAD_NORM, measured


@of_cases()
def test_metrics_are_those_of_one_process(case, results):
    found, references = results(case), results(case.reference)
    measured = differences(case, found, references)
    assert {key: value for key, value in measured.items() if "/" in key or key == "reward"}  # some are compared
    too_far = {key: value for key, value in measured.items() if key not in ("weights", "loss", "grad_norm")}
    assert not {key: value for key, value in too_far.items() if not value <= 1}
    # Of other micro-batches, see engines.py.
    for entry, expected in zip(found[0]["logs"], references[0]["logs"], strict=True):
        assert entry["entropy"] == pytest.approx(expected["entropy"], rel=1e-3)


@of_cases()
def test_rows_of_each_step_are_those_of_one_process(case, results):
    def rows(case):
        return Counter(row for one in results(case) for row in one["rows"])

    found, references = rows(case), rows(case.reference)
    assert found == references and found.total() == 4 * 12


@of_cases()
def test_the_engine_is_what_it_says(case, results):
    for one in results(case):
        expected = case.engine.removeprefix("cuda_").removeprefix("two_machines_").replace("two_machines", "ddp")
        assert one["engine"] == expected.replace("one_accumulating", "one")
        assert one["way"] == ("packed" if case.is_packed else "whole")


@of_cases(lambda case: case.rollout == "mixed" and is_on_two_ranks(case))
def test_rows_move_between_ranks_where_the_loss_lets_them(case, results):
    for one in results(case):
        is_moved = {row[:2] for _, _, row in one["rows"]} != set(one["sampled"])
        assert is_moved == (case.is_packed and case.option != "router")


@of_cases(lambda case: case.is_packed and case.rollout == "mixed" and is_on_two_ranks(case))
def test_ranks_score_about_as_many_tokens(case, results):
    tokens = [one["tokens"] for one in results(case)]
    (whole,) = results(case.reference)
    # One forward for each micro-batch: ranks that run more would wait for the others for ever.
    assert [len(one) for one in tokens] == [8, 8]
    assert sum(map(sum, tokens)) < 0.6 * sum(whole["tokens"])
    if case.option in ("", "target", "twice"):  # where rows may move between micro-batches, and only live ones score
        # The fullest first, and beside one another: the two parts of a step of each rank, as they run.
        for start in range(0, 8, 2):
            parts = [one[place] for place in (start, start + 1) for one in tokens]
            assert parts == sorted(parts, reverse=True)
        first, second = map(sum, tokens)
        assert max(first, second) < 1.2 * min(first, second)
        if case.unit != "turn":  # at which a row ends with its last live turn
            assert first + second == sum(one["needed"] for one in results(case))


# ---- what makes the comparison worth something


@of_cases()
def test_the_trainings_are_what_they_say(case, results):
    (reference,) = results(case.reference)
    live = Counter(step for step, is_live, _ in reference["rows"] if is_live)
    if case.rollout == "dead":
        assert [live[step] for step in range(3)] == [1, 0, 0] and live[3] >= 3
    else:
        assert all(4 <= live[step] < 12 for step in range(4))
        assert any(not trained for _, _, (_, trained, _) in reference["rows"])
        assert max(entry["gspo/clip_fraction/sequences"] for entry in reference["logs"]) > 0.1
        script = SCRIPT | OPTIONS[case.option]
        is_clipped = [entry["grad_norm"] > script["max_grad_norm"] for entry in reference["logs"]]
        assert any(is_clipped) or case.is_adapter
    if case.rollout == "dead" and not case.is_packed and is_on_two_ranks(case):
        ranks = results(case)
        assert [{step for step, is_live, _ in one["rows"] if is_live} for one in ranks] == [{0}, {3}]
        assert case.unit != "turn" or [one["most_turns"] for one in ranks] == [4, 2]
    assert reference["moved"].norm() > 0.1
