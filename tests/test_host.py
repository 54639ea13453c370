"""Which TRL is accepted, warned of and refused, and what is imported when."""

import ast
import os
import re
import subprocess
import sys
import types
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from trl import GRPOConfig, GRPOTrainer

import trl_gspo
from trl_gspo import config as config_module
from trl_gspo import host


ROOT = Path(host.__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Sets the version of TRL that seems to be installed."""
    return lambda version: monkeypatch.setattr(host, "version", lambda name: {"trl": version}[name])


def run_python(code, *path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_range_is_that_of_the_package():
    # By hand rather than with tomllib, which Python 3.10 lacks.
    (declared,) = re.findall(r'^ +"trl\b(.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert SpecifierSet(declared) == host.SUPPORTED_TRL


def test_every_field_that_the_configuration_reads_is_checked():
    read = {node.attr for node in ast.walk(ast.parse(Path(config_module.__file__).read_text())) if _is_of_self(node)}
    read |= {*trl_gspo.GSPOConfig.__annotations__, *config_module._FOREIGN_LOSS_FIELDS}
    assert read & set(GRPOConfig.__dataclass_fields__) - host._CONFIG_FIELDS == set()


def _is_of_self(node):
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "config")


@pytest.mark.parametrize("version", ["1.14.2", "1.15.0.dev0", "1.16.0rc1", "1.16.0", "1.16.99"])
def test_silent_inside_the_range(installed, monkeypatch, version):
    installed(version)
    monkeypatch.setattr(host, "_missing_from_host", lambda: pytest.fail("what is in the range is not searched"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.check_trl()


def test_the_trl_of_the_tests_lacks_nothing():
    assert host._missing_from_host() == []


@pytest.mark.parametrize("version", ["1.13.9", "1.17.0", "1.17.0.dev0", "2.0"])
def test_warns_once_of_another_that_has_everything(installed, version):
    installed(version)
    with pytest.warns(UserWarning) as caught:
        host.check_trl()
    (warning,) = caught
    message = str(warning.message)
    assert f"TRL {version} is installed" in message and f"tested with TRL {host.SUPPORTED_TRL}" in message
    assert f"pip install 'trl{host.SUPPORTED_TRL}'" in message


def _loss_of_another_signature(self, model, inputs, num_items_in_batch):
    return '"sequence"'


def _loss_at_token_level(self, model, inputs):
    return inputs


def _without_field(monkeypatch, name):
    rest = {key: value for key, value in GRPOConfig.__dataclass_fields__.items() if key != name}
    monkeypatch.setattr(GRPOConfig, "__dataclass_fields__", rest)


LACKS = {
    "GRPOConfig.loss_type": lambda patch: _without_field(patch, "loss_type"),
    "GRPOConfig.disable_dropout": lambda patch: _without_field(patch, "disable_dropout"),
    "GRPOTrainer._get_per_token_logps_and_entropies": lambda patch: patch.delattr(
        GRPOTrainer, "_get_per_token_logps_and_entropies"
    ),
    "GRPOTrainer._compute_loss(self, model, inputs)": lambda patch: patch.setattr(
        GRPOTrainer, "_compute_loss", _loss_of_another_signature
    ),
    "the sequence-level ratio in GRPOTrainer._compute_loss": lambda patch: patch.setattr(
        GRPOTrainer, "_compute_loss", _loss_at_token_level
    ),
}


@pytest.mark.parametrize("version", ["0.17.0", "1.17.0"])
@pytest.mark.parametrize("missing", LACKS)
def test_refuses_another_that_lacks_something(installed, monkeypatch, missing, version):
    installed(version)
    LACKS[missing](monkeypatch)
    with pytest.raises(ImportError) as raised:
        host.check_trl()
    assert str(raised.value) == (
        f"trl_gspo is tested with TRL {host.SUPPORTED_TRL}, and TRL {version} is installed, which lacks {missing}. "
        f"Install a tested one: pip install 'trl{host.SUPPORTED_TRL}'."
    )


def test_names_all_that_is_missing(installed, monkeypatch):
    installed("0.17.0")
    _without_field(monkeypatch, "beta")
    monkeypatch.delattr(GRPOTrainer, "_compute_loss")
    monkeypatch.delattr(GRPOTrainer, "_get_per_token_logps_and_entropies")
    with pytest.raises(ImportError) as raised:
        host.check_trl()
    for name in ("GRPOConfig.beta", "_compute_loss", "_get_per_token_logps_and_entropies"):
        assert name in str(raised.value)


def test_refuses_one_that_cannot_be_imported(installed, monkeypatch):
    """TRL 0.27 and its like turn an import that fails within them into a `RuntimeError`."""

    def fails(name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"Failed to import trl.trainer for {name}: No module named 'gone'")

    broken = types.ModuleType("trl")
    broken.__getattr__ = fails
    monkeypatch.setitem(sys.modules, "trl", broken)
    installed("0.27.0")
    with pytest.raises(ImportError) as raised:
        host.check_trl()
    message = str(raised.value)
    assert "TRL 0.27.0 is installed" in message and f"tested with TRL {host.SUPPORTED_TRL}" in message
    assert "No module named 'gone'" in message


def test_names_the_command_where_trl_is_not_installed(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(host, "version", version)
    with pytest.raises(ImportError) as raised:
        host.check_trl()
    assert f"pip install 'trl{host.SUPPORTED_TRL}'" in str(raised.value)
    assert raised.value.__suppress_context__


def test_an_old_trl_meets_one_clear_error(tmp_path):
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("__version__ = '0.9'\n")
    (tmp_path / "trl-0.9.dist-info").mkdir()
    (tmp_path / "trl-0.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.9\n")
    run = run_python("import trl_gspo; trl_gspo.GSPOTrainer", tmp_path)
    *_, last = run.stderr.strip().splitlines()
    assert run.returncode == 1 and run.stderr.count("Traceback") == 1
    assert last.startswith(f"ImportError: trl_gspo is tested with TRL {host.SUPPORTED_TRL}, and TRL 0.9 is installed")
    assert last.endswith(f"Install a tested one: pip install 'trl{host.SUPPORTED_TRL}'.")
    assert re.search("which lacks .*GRPOConfig", last)
    assert "which lacks cannot" not in last


def test_the_import_is_lazy():
    run = run_python("import sys, trl_gspo; print({'trl', 'transformers', 'accelerate', 'torch'} & set(sys.modules))")
    assert run.stdout.strip() == "set()", run.stderr


def test_public_names():
    names = dir(trl_gspo)
    assert {*trl_gspo.__all__, "__version__"} <= set(names)
    assert names == sorted(set(names))
    assert set(trl_gspo.__all__) == set(trl_gspo._LAZY)
    for name in trl_gspo.__all__:
        assert getattr(trl_gspo, name).__name__ == name
    assert issubclass(trl_gspo.GSPOConfig, GRPOConfig) and issubclass(trl_gspo.GSPOTrainer, GRPOTrainer)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="^module 'trl_gspo' has no attribute 'GSPOTrainr'"):
        trl_gspo.GSPOTrainr  # noqa: B018 - the access is the test
    with pytest.raises(ImportError, match="cannot import name 'GSPOTrainr'"):
        from trl_gspo import GSPOTrainr  # noqa: F401
