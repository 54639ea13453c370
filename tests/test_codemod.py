"""GRPO scripts in Python: what is swapped, what is taken out and kept, and what is listed."""

import ast
import textwrap

import pytest

from trl_gspo import codemod
from trl_gspo.codemod import RULED, decide, migrate_script
from trl_gspo.migration import MigrationError


def migrate(text):
    """The new code, the changes and the points, of code that is written indented."""
    result = migrate_script(textwrap.dedent(text).encode())
    code = result.code.decode()
    ast.parse(code)
    again = migrate_script(result.code)
    assert again.code == result.code, "a second run changes something"
    return code, result.changes, result.points


def swapped(before):
    return migrate(before)[0]


# Imports and references.


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "from trl import GRPOConfig, GRPOTrainer\nGRPOTrainer(args=GRPOConfig('o'))\n",
            "from trl_gspo import GSPOConfig, GSPOTrainer\nGSPOTrainer(args=GSPOConfig('o-gspo'))\n",
        ),
        # Other names stay where they are, in their order.
        (
            "from trl import A, GRPOTrainer, B  # trl\nGRPOTrainer()\n",
            "from trl import A, B  # trl\nfrom trl_gspo import GSPOTrainer\nGSPOTrainer()\n",
        ),
        (
            "from trl import (\n    A,  # a\n    # of it\n    GRPOConfig,  # c\n    GRPOTrainer\n)\nx: GRPOConfig\n",
            "from trl import (\n    A  # a\n)\n# c\nfrom trl_gspo import GSPOConfig, GSPOTrainer\nx: GSPOConfig\n",
        ),
        (
            "from trl import (\n    GRPOTrainer,\n    A,  # a\n    B,\n)\nGRPOTrainer()\n",
            "from trl import (\n    A,  # a\n    B,\n)\nfrom trl_gspo import GSPOTrainer\nGSPOTrainer()\n",
        ),
        # An alias keeps its name.
        ("from trl import GRPOTrainer as T\nT()\n", "from trl_gspo import GSPOTrainer as T\nT()\n"),
        (
            "from trl.trainer import GRPOTrainer\nGRPOTrainer.train\n",
            "from trl_gspo import GSPOTrainer\nGSPOTrainer.train\n",
        ),
        (
            "from trl.trainer.grpo_trainer import GRPOTrainer\n"
            "from trl.trainer.grpo_config import GRPOConfig\nGRPOTrainer()\n",
            "from trl_gspo import GSPOTrainer\nfrom trl_gspo import GSPOConfig\nGSPOTrainer()\n",
        ),
        # A module goes if nothing else uses it.
        ("import trl\ntrl.GRPOTrainer()\n", "import trl_gspo\ntrl_gspo.GSPOTrainer()\n"),
        ("import trl as t\nt.GRPOTrainer()\nt.A\n", "import trl as t\nimport trl_gspo\ntrl_gspo.GSPOTrainer()\nt.A\n"),
        ("import os, trl\ntrl.GRPOTrainer()\n", "import os, trl\nimport trl_gspo\ntrl_gspo.GSPOTrainer()\n"),
        (
            "import trl.trainer.grpo_trainer\ntrl.trainer.grpo_trainer.GRPOTrainer()\n",
            "import trl_gspo\ntrl_gspo.GSPOTrainer()\n",
        ),
        (
            "from trl.trainer import grpo_trainer\ngrpo_trainer.GRPOTrainer()\n",
            "from trl.trainer import grpo_trainer\nimport trl_gspo\ntrl_gspo.GSPOTrainer()\n",
        ),
        # In functions, blocks and one-liners.
        (
            "def main():\n    from trl import GRPOTrainer, A\n\n    return GRPOTrainer(A)\n",
            "def main():\n    from trl import A\n    from trl_gspo import GSPOTrainer\n\n    return GSPOTrainer(A)\n",
        ),
        (
            "if TYPE_CHECKING: from trl import GRPOTrainer, A\n\ndef f(x: 'GRPOTrainer'): ...\n",
            "if TYPE_CHECKING: from trl import A; from trl_gspo import GSPOTrainer\n\ndef f(x: 'GSPOTrainer'): ...\n",
        ),
        (
            "import os; from trl import GRPOTrainer\nGRPOTrainer()\n",
            "import os; from trl_gspo import GSPOTrainer\nGSPOTrainer()\n",
        ),
        (
            "try:\n    from trl import GRPOTrainer\nexcept ImportError:\n    GRPOTrainer = None\nGRPOTrainer()\n",
            "try:\n    from trl_gspo import GSPOTrainer\nexcept ImportError:\n    GSPOTrainer = None\nGSPOTrainer()\n",
        ),
        (
            "from trl import GRPOTrainer\nclass GRPOTrainer(GRPOTrainer): pass\nGRPOTrainer()\n",
            "from trl_gspo import GSPOTrainer\nclass GSPOTrainer(GSPOTrainer): pass\nGSPOTrainer()\n",
        ),
        # Types, in strings too.
        (
            "from trl import GRPOConfig\ndef f(a: GRPOConfig, b: 'list[GRPOConfig]') -> \"GRPOConfig\": ...\n",
            "from trl_gspo import GSPOConfig\ndef f(a: GSPOConfig, b: 'list[GSPOConfig]') -> \"GSPOConfig\": ...\n",
        ),
        (
            "from trl import GRPOTrainer\nisinstance(x, (A, GRPOTrainer))\nclass T(GRPOTrainer): pass\n",
            "from trl_gspo import GSPOTrainer\nisinstance(x, (A, GSPOTrainer))\nclass T(GSPOTrainer): pass\n",
        ),
        # Another's name is none of ours.
        (
            "from trl import GRPOTrainer\nimport other\nother.GRPOTrainer()\nf(GRPOTrainer=1)\nGRPOTrainer()\n",
            "from trl_gspo import GSPOTrainer\nimport other\nother.GRPOTrainer()\nf(GRPOTrainer=1)\nGSPOTrainer()\n",
        ),
        # A class of one's own by our name: ours keeps the old one.
        (
            "from trl import GRPOTrainer\nclass GSPOTrainer(GRPOTrainer): pass\nGSPOTrainer()\n",
            "from trl_gspo import GSPOTrainer as GRPOTrainer\nclass GSPOTrainer(GRPOTrainer): pass\nGSPOTrainer()\n",
        ),
    ],
)  # fmt: skip
def test_imports(before, after):
    code, _, _ = migrate(before)
    assert code == after


def test_a_name_that_is_another_thing_in_its_scope_stays():
    before = """
        from trl import GRPOTrainer
        GRPOTrainer()
        def f():
            from mine import GRPOTrainer
            return GRPOTrainer()
        def g(GRPOTrainer):
            return GRPOTrainer()
    """
    first, rest = textwrap.dedent(before).split("def f", 1)
    assert swapped(before) == first.replace("trl ", "trl_gspo ").replace("GRPO", "GSPO") + "def f" + rest


def test_line_ends_encoding_and_layout_stay():
    before = (
        "# -*- coding: latin-1 -*-\r\n'''D\xe9j\xe0'''\r\nfrom trl import GRPOTrainer\r\n\r\n\r\n"
        "x = [ 1,2 ]   # \xe9\r\nif x :\r\n\tGRPOTrainer( 'm' , )\r\n"
    )
    result = migrate_script(before.encode("latin-1"))
    assert result.code == before.replace("from trl ", "from trl_gspo ").replace("GRPO", "GSPO").encode("latin-1")


def test_a_byte_order_mark_stays():
    source = b"\xef\xbb\xbffrom trl import GRPOTrainer\nGRPOTrainer()\n"
    assert migrate_script(source).code == source.replace(b"from trl ", b"from trl_gspo ").replace(b"GRPO", b"GSPO")


# The configuration.


def arguments(call):
    """The arguments of a configuration after its migration, without `output_dir`."""
    code = swapped(f"from trl import GRPOConfig\nGRPOConfig('gspo', {call})\n")
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("importance_sampling_level='token'", {}),
        ("importance_sampling_level='sequence'", {"importance_sampling_level": "sequence"}),
        ("importance_sampling_level='turn'", {"importance_sampling_level": "turn"}),
        ("loss_type='dapo', learning_rate=1e-6", {"learning_rate": 1e-6}),
        ("loss_type='luspo'", {"loss_type": "luspo"}),
        ("loss_type='grpo'", {"loss_type": "grpo"}),
        ("epsilon=0.2", {}),
        ("epsilon=0.2, epsilon_high=0.28", {}),
        ("epsilon=0.05, max_completion_length=8", {"max_completion_length": 8}),
        (
            "epsilon=0.05, max_completion_length=8, importance_sampling_level='sequence'",
            {
                "epsilon": 0.05,
                "max_completion_length": 8,
                "importance_sampling_level": "sequence",
                "epsilon_high": 0.05,
            },
        ),
        ("epsilon=1e-3", {"epsilon": 1e-3, "epsilon_high": 1e-3}),
        ("epsilon=1e-3, epsilon_high=2e-3", {"epsilon": 1e-3, "epsilon_high": 2e-3}),
        ("epsilon=1e-3, epsilon_high=None", {"epsilon": 1e-3, "epsilon_high": None}),
        ("beta=0.04", {}),
        ("beta=0.05", {"beta": 0.05}),
        ("beta=0.0", {"beta": 0.0}),
        ("delta=4.0", {"delta": 4.0}),
        ("sapo_temperature_neg=1.0, vespo_k_pos=1.0", {}),
        ("disable_dropout=False", {}),
        ("disable_dropout=True", {"disable_dropout": True}),
        ("steps_per_generation=1", {}),
        ("steps_per_generation=4, gradient_accumulation_steps=8", {"gradient_accumulation_steps": 8}),
        (
            "steps_per_generation=16, gradient_accumulation_steps=8",
            {"steps_per_generation": 16, "gradient_accumulation_steps": 8},
        ),
        ("steps_per_generation=1, num_iterations=4", {"steps_per_generation": 1, "num_iterations": 4}),
        ("generation_batch_size=64", {"generation_batch_size": 64}),
        ("use_vllm=True", {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}),
        (
            "use_vllm=True, vllm_importance_sampling_correction=False",
            {"use_vllm": True, "vllm_importance_sampling_correction": False},
        ),
    ],
)
def test_literal_arguments(before, after):
    assert arguments(before) == after


def test_what_is_taken_out_and_kept_is_said():
    _, changes, points = migrate("from trl import GRPOConfig\nGRPOConfig('gspo',\n  beta=0.04,\n  delta=2.0)\n")
    assert [(change.line, change.text.split(":")[0]) for change in changes] == [
        (3, "`beta=0.04` is taken out"),
        (4, "`delta=2.0` is kept"),
    ]
    assert points == []


def test_the_layout_of_a_call_stays():
    before = """
        from trl import GRPOConfig
        c = GRPOConfig(
            output_dir="o",  # where
            # how wide
            epsilon=0.2,
            learning_rate=1e-6,  # slow
            use_vllm=True,
            beta=0.04,  # KL
        )
        d = GRPOConfig(output_dir="o", beta=0.04)
        e = GRPOConfig(
            "grpo",  # here
            loss_type="dapo"
        )
    """
    after = """
        from trl_gspo import GSPOConfig
        c = GSPOConfig(
            output_dir="o-gspo",  # where
            # how wide
            learning_rate=1e-6,  # slow
            use_vllm=True,
            vllm_importance_sampling_mode="token_truncate",
        )
        d = GSPOConfig(output_dir="o-gspo")
        e = GSPOConfig(
            "gspo"  # here
        )
    """
    assert swapped(before) == textwrap.dedent(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("output_dir='runs/GRPO-1'", "output_dir='runs/GSPO-1'"),
        ('output_dir=f"{name}-grpo"', 'output_dir=f"{name}-gspo"'),
        ('output_dir=f"runs/{name}"', 'output_dir=f"runs/{name}-gspo"'),
        ("output_dir=r'a\\b'", "output_dir=r'a\\b-gspo'"),
        ("output_dir='gspo', run_name='my-grpo'", "output_dir='gspo', run_name='my-gspo'"),
        ("output_dir='gspo', run_name='mine'", "output_dir='gspo', run_name='mine'"),
        ("output_dir='gspo', hub_model_id='me/m'", "output_dir='gspo', hub_model_id='me/m-gspo'"),
        ("output_dir=where", "output_dir=where"),
        ("learning_rate=1e-6", 'learning_rate=1e-6, output_dir="gspo_output"'),
        ("", 'output_dir="gspo_output"'),
    ],
)
def test_names_of_the_run(before, after):
    assert f"GSPOConfig({after})" in swapped(f"from trl import GRPOConfig\nGRPOConfig({before})\n")


def test_a_subclass_is_a_configuration_too():
    before = """
        from trl import GRPOConfig
        class Mine(GRPOConfig):
            epsilon: float = 0.2  # TRL's
            beta: float = 0.1
            mine: int = 3
        Mine(output_dir="gspo", loss_type="dapo")
    """
    code, changes, _ = migrate(before)
    assert "epsilon" not in code and "beta: float = 0.1" in code and "mine: int = 3" in code
    assert 'Mine(output_dir="gspo")' in code
    assert any("the default of `epsilon` is taken out" in change.text for change in changes)


def test_a_subclass_left_without_a_body_passes():
    code = swapped("from trl import GRPOConfig\nclass Mine(GRPOConfig):\n    epsilon: float = 0.2\n")
    assert code.endswith("class Mine(GSPOConfig):\n    pass\n")


def test_every_argument_with_a_rule_is_decided_or_listed():
    """A value that nobody can see is listed, whatever the argument."""
    for name in RULED:
        _, _, points = migrate(f"from trl import GRPOConfig\nGRPOConfig('gspo', {name}=unseen)\n")
        assert [point.line for point in points] == [2] and f"`{name}=unseen`" in points[0].text
    assert decide({}) == ({}, {}, {})


# What is listed.


@pytest.mark.parametrize(
    ("code", "line", "text"),
    [
        ("from trl import GRPOConfig\nGRPOConfig(**options)\n", 2, "takes ** or *"),
        ("from trl import GRPOConfig\nGRPOConfig('gspo', epsilon=args.epsilon)\n", 2, "`epsilon=args.epsilon`"),
        ("from trl import GRPOConfig\nGRPOConfig(output_dir=args.out)\n", 2, "`output_dir=args.out`"),
        ("from trl import GRPOConfig\np = TrlParser((A, GRPOConfig))\n", 2, "leave --loss_type"),
        ("from trl import GRPOConfig\nkinds = (A, GRPOConfig)\n", 2, "leave --loss_type"),
        ("from trl import GRPOTrainer\nrun(GRPOTrainer)\n", 2, "it is handed on from here"),
        ("from trl import GRPOTrainer\nT = GRPOTrainer\n", 2, "it is handed on from here"),
        ("from trl import GRPOConfig\nc = GRPOConfig('gspo')\nc.loss_type = 'dapo'\n", 3, "is set to 'dapo'"),
        ("from trl import GRPOConfig\nc = GRPOConfig('gspo')\nsetattr(c, 'beta', 1)\n", 3, "`beta` is set here"),
        (
            "from trl import GRPOConfig\np.add_argument('--epsilon-high', default=0.28)\n",
            2,
            "`--epsilon_high` has a default of its own, 0.28",
        ),
        (
            "from trl import GRPOTrainer\nclass T(GRPOTrainer):\n    def _compute_loss(self, m, i): ...\n",
            3,
            "`_compute_loss` is GSPOTrainer's own too",
        ),
        ("from trl import GRPOTrainer\nclass T(GRPOTrainer):\n    _name = 'GRPO'\n", 3, "the model card"),
        ("from trl import GRPOTrainer\nx = getattr(trl, 'GRPOTrainer')\n", 2, "names a class of TRL's"),
        ("from trl import GRPOTrainer\n__all__ = ['GRPOTrainer']\n", 2, "names a class of TRL's"),
        ("from trl import *\nGRPOTrainer()\n", 1, "import GRPOTrainer and GRPOConfig by name"),
        ("from trl.experimental.x import GRPOWithReplay\n", 1, "a trainer of its own"),
        ("import unsloth\nfrom trl import GRPOTrainer\n", 1, "Unsloth"),
        ("# /// script\n# dependencies = ['trl']\n# ///\nfrom trl import GRPOTrainer\n", 1, "PEP 723"),
        (
            "from trl import GRPOConfig\nclass C(GRPOConfig):\n    beta: float = field(default=0.1)\n",
            3,
            "`beta`: its default is not a literal",
        ),
    ],
)
def test_what_cannot_be_decided_is_listed_with_its_line(code, line, text):
    _, _, points = migrate(code)
    assert any(point.line == line and text in point.text for point in points), points


def test_what_is_plain_is_not_listed():
    _, _, points = migrate("""
        import trl
        from trl import GRPOConfig, GRPOTrainer

        class Mine(GRPOTrainer):
            def evaluate(self): return super().evaluate()

        def make(config: GRPOConfig | None = None) -> type[GRPOTrainer]:
            assert isinstance(config, GRPOConfig), "GRPO wants a configuration"
            return Mine(args=trl.GRPOConfig(output_dir="gspo", epsilon=3e-4, epsilon_high=4e-4))
    """)
    assert points == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"def f(:\n", "is not Python"),
        (b"\x00\x01\xff\xfe", "it is not a Python script"),
        (b"import torch\n", "it has no GRPOTrainer or GRPOConfig of TRL"),
        (b"from trl import SFTTrainer\n", "it has no GRPOTrainer or GRPOConfig of TRL"),
        (b"", "it has no GRPOTrainer or GRPOConfig of TRL"),
    ],
)
def test_what_is_no_grpo_script(source, message):
    with pytest.raises(MigrationError, match=message):
        migrate_script(source)


def test_a_migrated_script_needs_nothing():
    source = b"from trl_gspo import GSPOTrainer\nGSPOTrainer()\n"
    assert migrate_script(source) == codemod.Script(source, [], [])


def test_the_methods_that_a_subclass_would_replace():
    assert {"_compute_loss", "_generate_and_score_completions", "training_step"} <= codemod.overridden()
    # Theirs alone, and ours alone.
    assert not {"evaluate", "create_optimizer", "_clip_range", "__init__"} & codemod.overridden()
