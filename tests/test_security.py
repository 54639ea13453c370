"""What of others is run, loaded or written down: code of a model's folder, pickles, and secrets."""

import copy
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train
from test_bad_input import TINY, arguments, signals_restored
from tiny import sorting_rows, write_jsonl
from transformers import AutoConfig

from trl_gspo import GSPOConfig
from trl_gspo.checks import check_deepspeed_checkpoint
from trl_gspo.secrets import is_secret, without_secret_words, without_secrets


ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(model_path, tmp_path):
    """A command line of `train.py`, of good options and those given."""

    def made(**options):
        given = TINY | {"reward_funcs": "tests.varied_reward.share_of_digits"}
        given |= {"dataset_name": str(write_jsonl(tmp_path / "rows.jsonl", sorting_rows(32, seed=0)))}
        return arguments(given | {"model_name_or_path": model_path, "output_dir": tmp_path / "run"} | options)

    return made


@pytest.fixture
def ran(tmp_path):
    """What the code that must not run leaves behind."""
    return tmp_path / "RAN"


# ---- code that comes with a model


def with_code(model_path, folder, ran, model_type="not_known_yet", **auto_map):
    """A copy of a model's folder whose `config.json` and `tokenizer_config.json` name code of its own."""
    shutil.copytree(model_path, folder)
    (folder / "own.py").write_text(
        f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\n"
        "from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config): pass\n"
        "class OwnModel(Qwen3ForCausalLM): pass\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {name: f"own.{value}" for name, value in auto_map.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


MODEL_CODE = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnModel", "AutoModel": "OwnModel"}


def test_code_of_a_model_is_refused_unless_asked_for(model_path, command, ran, tmp_path, capsys, monkeypatch):
    folder = with_code(model_path, tmp_path / "model", ran, **MODEL_CODE)
    for option in ({}, {"trust_remote_code": False}):
        assert train.main(command(model_name_or_path=folder, **option)) == 2
        assert "contains custom code which must be executed" in capsys.readouterr().err
        assert not ran.exists()
    # The code would have run.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


def test_code_of_a_model_that_transformers_knows_is_passed_over(model_path, command, ran, tmp_path):
    folder = with_code(model_path, tmp_path / "model", ran, model_type="qwen3", **MODEL_CODE)
    with signals_restored():
        assert train.main(command(model_name_or_path=folder, max_steps=1)) == 0
    assert not ran.exists()


def test_code_of_a_reward_model_is_refused_unless_asked_for(model_path, command, ran, tmp_path, capsys):
    folder = with_code(model_path, tmp_path / "judge", ran, AutoConfig="OwnConfig")
    assert train.main(command(reward_funcs=folder)) == 2
    assert "contains custom code which must be executed" in capsys.readouterr().err
    assert not ran.exists()


def test_code_of_a_tokenizer_is_not_run(model_path, command, ran, tmp_path):
    folder = with_code(model_path, tmp_path / "model", ran, model_type="qwen3")
    path = Path(folder, "tokenizer_config.json")
    kept = json.loads(path.read_text()) | {"tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps(kept | {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}}))
    with signals_restored():
        train.main(command(model_name_or_path=folder, max_steps=1))
    assert not ran.exists()


def test_code_of_a_data_set_is_not_run(command, ran, tmp_path, capsys):
    folder = tmp_path / "data"
    write_jsonl(folder / "rows.jsonl", sorting_rows(32, seed=0))
    (folder / "data.py").write_text(f"import os\nos.makedirs({str(ran)!r})\n")
    assert train.main(command(dataset_name=folder, model_name_or_path="no/such")) == 2
    assert "Dataset scripts are no longer supported" in capsys.readouterr().err
    assert train.main(command(dataset_name=folder / "data.py", model_name_or_path="no/such")) == 2
    assert "data.py` ends in '.py'" in capsys.readouterr().err
    assert not ran.exists()


# ---- pickles


class Evil:
    def __init__(self, ran):
        self.ran = str(ran)

    def __reduce__(self):
        return os.mkdir, (self.ran,)


def test_what_these_pickles_would_do(ran, tmp_path):
    torch.save({"a": Evil(ran)}, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert ran.exists()


def test_weights_that_are_a_pickle_run_nothing(model_path, command, ran, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(ran)}, folder / "pytorch_model.bin")
    assert train.main(command(model_name_or_path=folder)) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not ran.exists()


@pytest.fixture(scope="module")
def checkpoint(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_jsonl(folder / "rows.jsonl", sorting_rows(32, seed=0))
    options = TINY | {"reward_funcs": "tests.varied_reward.share_of_digits", "dataset_name": data, "save_steps": 4}
    with signals_restored():
        assert train.main(arguments(options | {"model_name_or_path": model_path, "output_dir": folder / "run"})) == 0
    return folder / "run" / "checkpoint-4"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_with_a_strange_pickle_runs_nothing(name, checkpoint, command, ran, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-4")
    assert (tmp_path / "run" / "checkpoint-4" / name).is_file()
    torch.save({"a": Evil(ran)}, tmp_path / "run" / "checkpoint-4" / name)
    with signals_restored():
        returned = train.main([*command(max_steps=5), "--resume"])
    assert not ran.exists()
    printed = capsys.readouterr()
    # The arguments are those of the command: the Trainer never reads the file. A checkpoint that cannot be read as
    # weights is no checkpoint to go on from, or torch refuses it.
    if name != "training_args.bin":
        assert "passed over" in printed.out or (returned and "nsupported" in printed.err), printed
    else:
        assert returned == 0


@pytest.fixture
def of_deepspeed(tmp_path):
    """A folder as DeepSpeed writes it, with what its ZeRO optimizers keep."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    folder = tmp_path / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    (folder / "latest").write_text("global_step4")
    kept = {"loss_scaler": LossScaler(1.0), "zero_stage": ZeroStageEnum(2), "slice": fragment_address(1, 2)}
    torch.save(kept | {"weight": torch.ones(3)}, folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def test_a_checkpoint_of_deepspeed_is_read_before_deepspeed_unpickles_it(of_deepspeed, ran):
    check_deepspeed_checkpoint(of_deepspeed)
    evil = of_deepspeed / "global_step4" / "mp_rank_00_model_states.pt"
    for name in ("module", "loss_scaler"):
        torch.save({name: Evil(ran), "weight": torch.ones(3)}, evil)
        with pytest.raises(
            ValueError, match="mp_rank_00_model_states.pt is damaged, or holds something that would be"
        ):
            check_deepspeed_checkpoint(of_deepspeed)
        assert not ran.exists()
    whole = evil.read_bytes()
    evil.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        check_deepspeed_checkpoint(of_deepspeed)


class Opening:
    """Makes a file when it is unpickled, by a class where `Evil` has a function: torch allows classes by name."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return logging.FileHandler, (self.path,)


def test_train_py_reads_a_checkpoint_of_deepspeed_before_the_trainer_does(
    of_deepspeed, command, ran, monkeypatch, capsys
):
    torch.save({"a": Evil(ran)}, of_deepspeed / "global_step4" / "mp_rank_00_model_states.pt")
    (of_deepspeed / "trainer_state.json").write_text(json.dumps({"global_step": 4, "max_steps": 8}))

    def load(resume_from_checkpoint):
        torch.load(of_deepspeed / "global_step4" / "mp_rank_00_model_states.pt", weights_only=False)

    trainer = SimpleNamespace(is_deepspeed_enabled=True, train=load)
    monkeypatch.setattr(train, "make_trainer", lambda *args: trainer)
    with signals_restored():
        assert train.main([*command(max_steps=8), "--resume_from_checkpoint", str(of_deepspeed)]) == 2
    assert "mp_rank_00_model_states.pt is damaged, or holds something" in capsys.readouterr().err
    assert not ran.exists()


def test_a_class_of_another_package_is_not_deepspeeds(of_deepspeed, ran):
    torch.save({"a": Opening(ran)}, of_deepspeed / "global_step4" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="mp_rank_00_model_states.pt is damaged, or holds something"):
        check_deepspeed_checkpoint(of_deepspeed)
    assert not ran.exists()


def test_what_a_module_of_deepspeed_imported_is_not_deepspeeds(of_deepspeed, ran, monkeypatch):
    module = "deepspeed.runtime.zero.config"
    named = type("FileHandler", (), {"__module__": module, "__qualname__": "FileHandler"})
    monkeypatch.setattr(f"{module}.FileHandler", named, raising=False)
    torch.save({"a": Opening(ran), "b": named}, of_deepspeed / "global_step4" / "sneaky.pt")
    monkeypatch.setattr(f"{module}.FileHandler", logging.FileHandler)
    with pytest.raises(ValueError, match="sneaky.pt is damaged, or holds something"):
        check_deepspeed_checkpoint(of_deepspeed)
    assert not ran.exists()


def test_a_checkpoint_of_deepspeed_stays_in_its_folder(of_deepspeed):
    (of_deepspeed / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match="names '../elsewhere', which is not a folder beside it"):
        check_deepspeed_checkpoint(of_deepspeed)


# ---- secrets


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("hub_token", True),
        ("--hub-token", True),
        ("push_to_hub_token", False),
        ("token", True),
        ("api_key", True),
        ("OPENAI_API_KEY", True),
        ("password", True),
        ("pad_token", False),
        ("max_tokens", False),
        ("key", False),
        ("importance_sampling_level", False),
    ],
)
def test_what_is_secret(name, secret):
    assert is_secret(name) == (secret or name == "push_to_hub_token")


def test_secrets_inside():
    assert without_secrets(({"password": "p"}, ["secret"])) == ({"password": "<PASSWORD>"}, ["secret"])
    given = {"a": [{"api_key": "sk-1", "n": 1}], "token": "hf_1", "eos_token": "</s>", "hub_token": None}
    assert without_secrets(given) == {
        "a": [{"api_key": "<API_KEY>", "n": 1}],
        "token": "<TOKEN>",
        "eos_token": "</s>",
        "hub_token": None,
    }
    assert without_secrets(given, hide=False)["a"][0] == {"api_key": None, "n": 1}
    assert given["token"] == "hf_1"


def test_command_lines():
    words = [
        "--hub_token",
        "hf_1",
        "--hub-token=hf_1",
        "--reward_kwargs",
        '{"get_x": {"api_key": "sk-1"}}',
        "--a",
        "1",
    ]
    assert without_secret_words(words) == [
        "--hub_token",
        "<HUB_TOKEN>",
        "--hub-token=<HUB_TOKEN>",
        "--reward_kwargs",
        '{"get_x": {"api_key": "<API_KEY>"}}',
        "--a",
        "1",
    ]


def test_a_config_is_written_down_without_its_secrets(tmp_path):
    config = GSPOConfig(
        str(tmp_path),
        hub_token="hf_secret",
        model_init_kwargs={"token": "hf_secret", "revision": "main"},
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    written = (config.to_json_string(), repr(config.to_sanitized_dict()), pickle.dumps(config).decode("latin-1"))
    for shown in (*written, repr(config), str(config)):
        assert "hf_secret" not in shown and "revision" in shown
    restored = pickle.loads(pickle.dumps(config))
    assert (restored.hub_token, restored.model_init_kwargs) == (None, {"token": None, "revision": "main"})
    for copied in (copy.copy(config), copy.deepcopy(config)):
        assert (copied.hub_token, copied.model_init_kwargs) == ("hf_secret", config.model_init_kwargs)
    assert copy.deepcopy(config).model_init_kwargs is not config.model_init_kwargs


def test_the_command_that_goes_on_has_no_secret(command, monkeypatch):
    argv = command(hub_token="hf_secret", reward_kwargs={"tests.varied_reward.share_of_digits": {"api_key": "sk-1"}})
    line = train.resume_command(argv, train.parse(argv)[1])
    assert "hf_secret" not in line and "sk-1" not in line and "'<HUB_TOKEN>'" in line
    with pytest.raises(ValueError, match="`hub_token='<HUB_TOKEN>'` is what logs show in place of a token"):
        train.parse(shlex.split(line)[3:])


@pytest.mark.parametrize("text", ["hub_token: [hf_secret]", "hub_tokn: hf_secret", "hub_token: hf_secret\n\tx: 1"])
def test_errors_do_not_repeat_a_secret_of_the_config(text, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    printed = capsys.readouterr().err
    assert "hf_secret" not in printed and printed.startswith("train.py: ")


@pytest.mark.parametrize("words", [["--hub_tokn=hf_secret"], ["--hub_tokn", "hf_secret"]])
def test_errors_do_not_repeat_a_secret_of_the_command_line(words, capsys):
    assert train.main(words) == 2
    printed = capsys.readouterr().err
    assert "hf_secret" not in printed and "did you mean `hub_token`?" in printed


@pytest.mark.slow
def test_no_file_and_no_output_of_a_run_holds_a_secret(command, tmp_path):
    pytest.importorskip("wandb")
    secrets = {"HF_TOKEN": "hf_" + "e" * 34, "WANDB_API_KEY": "f" * 40}
    environment = {f"WANDB_{name}": str(tmp_path / "wandb") for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
    environment |= secrets | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    (tmp_path / "wandb").mkdir()
    argv = command(hub_token="hf_" + "g" * 34, model_init_kwargs={"token": "hf_" + "h" * 34}, report_to="wandb")
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *argv, "--save_steps", "2"],
        capture_output=True,
        text=True,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"training_args.bin", "trainer_state.json", "summary.json", "README.md"} <= names
    assert any(path.suffix == ".wandb" for path in written)
    secret = re.compile(rb"hf_([egh])\1{33}|f{40}")
    assert [str(path) for path in written if secret.search(path.read_bytes())] == []
    assert not secret.search((run.stdout + run.stderr).encode())
    # The run's own configuration is there all the same.
    (log,) = [path for path in written if path.suffix == ".wandb"]
    assert b"<HUB_TOKEN>" in log.read_bytes()
