"""
A GRPO script in Python as a GSPO script, on its syntax tree: formatting and comments stay.

What is decided: TRL's two classes, however they are imported, and the literal arguments of a configuration. What
depends on a value that is not in the file is listed with its line and reason.
"""

import ast
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .config import _FOREIGN_LOSS_FIELDS, _LONG_COMPLETION, _LOSS_TYPES, _REFUSED_LOSS_TYPES
from .migration import MINIBATCHES, SMALL_KL, MigrationError, gspo_name, is_token_level
from .objective import EPSILON_HIGH, EPSILON_LOW, LEVELS


try:
    import libcst as cst
    from libcst import matchers as m
    from libcst.metadata import (
        ImportAssignment,
        MetadataWrapper,
        ParentNodeProvider,
        PositionProvider,
        QualifiedNameProvider,
        ScopeProvider,
    )
except ImportError as error:
    raise ImportError("Migrating a script needs libcst: pip install 'trl_gspo[migrate]'.") from error


_NEW = {"GRPOTrainer": "GSPOTrainer", "GRPOConfig": "GSPOConfig"}
_MODULES = {
    "trl": _NEW,
    "trl.trainer": _NEW,
    "trl.trainer.grpo_trainer": _NEW,
    "trl.trainer.grpo_config": _NEW,
}
_QUALIFIED = {f"{module}.{old}": old for module, names in _MODULES.items() for old in names}

# What of a configuration decides whether it trains GSPO.
RULED = (
    "importance_sampling_level",
    "loss_type",
    "epsilon",
    "epsilon_high",
    "beta",
    "delta",
    "steps_per_generation",
    "generation_batch_size",
    "disable_dropout",
    *_FOREIGN_LOSS_FIELDS,
)
# Where a run writes, which its GSPO twin must not overwrite.
_NAMED = ("output_dir", "run_name", "hub_model_id")

_UNKNOWN = object()


class Point(NamedTuple):
    """A remark on a line of the source."""

    line: int
    text: str


class Script(NamedTuple):
    """
    A migrated script.

    Attributes:
        code (`bytes`): in the encoding and with the line ends of the source.
        changes (`list[Point]`): what was changed in the configuration, and why; what was kept on purpose.
        points (`list[Point]`): what was not decided, and why.
    """

    code: bytes
    changes: list[Point]
    points: list[Point]


def migrate_script(source: bytes) -> Script:
    """
    Swaps `GRPOTrainer` and `GRPOConfig` of TRL for `GSPOTrainer` and `GSPOConfig`, and takes out of the configuration
    what they replace.

    Args:
        source (`bytes`): a Python script.

    Returns:
        `Script`: with `source` itself as its code if it is migrated already.

    Raises:
        MigrationError: if it is not Python, or has neither TRL's classes nor ours.
    """
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError as error:
        raise MigrationError(f"line {error.raw_line} is not Python: {error.message}") from error
    except (UnicodeDecodeError, SyntaxError, LookupError, ValueError) as error:
        raise MigrationError(f"it is not a Python script: {error}") from error
    wrapper = MetadataWrapper(module)
    survey = _Survey()
    wrapper.visit(survey)
    if not survey.swaps and not survey.imports:
        if survey.is_migrated:
            return Script(source, [], [])
        if not survey.points:
            raise MigrationError("it has no GRPOTrainer or GRPOConfig of TRL: there is nothing to migrate")
        return Script(source, [], sorted(survey.points))
    rewrite = _Rewrite(survey)
    changed = wrapper.visit(rewrite)
    return Script(changed.bytes, sorted(set(rewrite.changes)), sorted(set(survey.points + rewrite.points)))


class _Survey(cst.CSTVisitor):
    """Finds what to swap, and what cannot be decided."""

    METADATA_DEPENDENCIES = (ParentNodeProvider, PositionProvider, QualifiedNameProvider, ScopeProvider)

    def __init__(self) -> None:
        super().__init__()
        self.swaps: dict[cst.CSTNode, str] = {}  # references: a Name, or the whole Attribute
        self.imports: dict[cst.CSTNode, list[cst.ImportAlias]] = {}  # `from trl import`: the aliases of ours
        self.modules: dict[cst.CSTNode, bool] = {}  # `import trl`: whether nothing else uses it
        self.config_classes: set[str] = set()
        self.points: list[Point] = []
        self.is_migrated = False
        self.taken: set[str] = set()

    def _line(self, node: cst.CSTNode) -> int:
        return self.get_metadata(PositionProvider, node).start.line

    def _point(self, node: cst.CSTNode, text: str) -> None:
        self.points.append(Point(self._line(node), text))

    def _names(self, node: cst.CSTNode) -> set[str]:
        return {found.name for found in self.get_metadata(QualifiedNameProvider, node, set()) or ()}

    def _parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        return self.get_metadata(ParentNodeProvider, node, None)

    def visit_Module(self, node: cst.Module) -> None:
        for scope in set(self.get_metadata(ScopeProvider, child, None) for child in _walk(node)) - {None}:
            for assignment in scope.assignments:
                if assignment.name in _NEW.values():
                    imported = isinstance(assignment, ImportAssignment) and m.matches(
                        assignment.node, m.ImportFrom(module=m.Name("trl_gspo"))
                    )
                    if not imported:
                        self.taken.add(assignment.name)
        for line in [line.comment for line in [*node.header, *(node.body[0].leading_lines if node.body else ())]]:
            if line is not None and re.match(r"# /// script", line.value):
                self._point(line, "the script's own dependencies (PEP 723) stand here: add trl_gspo to them.")

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        module = _dotted(node.module) if not node.relative else ""
        if module == "unsloth" or module.startswith("unsloth."):
            self._point(
                node, "Unsloth puts a compiled GRPOTrainer in the place of TRL's; GSPOTrainer is not tested with it."
            )
        if module.startswith("trl_gspo"):
            self.is_migrated = True
        if isinstance(node.names, cst.ImportStar):
            if module in _MODULES:
                self._point(
                    node, f"`from {module} import *`: import GRPOTrainer and GRPOConfig by name, and migrate again."
                )
            return
        for alias in node.names:
            name = _dotted(alias.name)
            if module.startswith("trl.experimental") and "GRPO" in name:
                self._point(node, f"`{name}` of {module} is a trainer of its own, which has no twin here.")
        found = [alias for alias in node.names if _dotted(alias.name) in _MODULES.get(module, ())]
        if found:
            self.imports[node] = found

    def visit_Import(self, node: cst.Import) -> None:
        for alias in node.names:
            root = _dotted(alias.name).split(".")[0]
            if root == "unsloth":
                self._point(
                    node,
                    "Unsloth puts a compiled GRPOTrainer in the place of TRL's; GSPOTrainer is not tested with it.",
                )
            if root == "trl_gspo":
                self.is_migrated = True

    def visit_Name(self, node: cst.Name) -> None:
        parent = self._parent(node)
        if isinstance(parent, cst.Attribute) and parent.attr is node:
            return
        if isinstance(parent, (cst.ImportAlias, cst.ImportFrom, cst.AsName)) or (
            isinstance(parent, cst.Arg) and parent.keyword is node
        ):
            return
        self._reference(node)

    def visit_Attribute(self, node: cst.Attribute) -> None:
        if not isinstance(self._parent(node), (cst.ImportAlias, cst.ImportFrom)):
            self._reference(node)

    def _reference(self, node: cst.Name | cst.Attribute) -> None:
        old = next((_QUALIFIED[name] for name in self._names(node) if name in _QUALIFIED), None)
        if old is None and isinstance(node, cst.Name) and node.value in _NEW:
            # A second binding of the name in the scope of the import: `except ImportError: GRPOTrainer = None`.
            scope = self.get_metadata(ScopeProvider, node, None) or self.get_metadata(
                ScopeProvider, self._parent(node), None
            )
            for assignment in scope[node.value] if scope is not None else ():
                if isinstance(assignment, ImportAssignment):
                    found = {name.name for name in assignment.get_qualified_names_for(node.value)}
                    old = next((_QUALIFIED[name] for name in found if name in _QUALIFIED), old)
            if old is not None:
                self.swaps[node] = old
            return
        if old is None:
            return
        self.swaps[node] = old
        if isinstance(node, cst.Attribute):
            root = node
            while isinstance(root, cst.Attribute):
                root = root.value
            for assignment in self.get_metadata(ScopeProvider, node)[root.value]:
                if isinstance(assignment, ImportAssignment):
                    self.modules.setdefault(assignment.node, True)
        self._where(node, old)

    def _where(self, node: cst.CSTNode, old: str) -> None:
        """A remark where the class is neither called nor derived from nor a type."""
        inner, outer = node, self._parent(node)
        while isinstance(
            outer,
            (
                cst.Arg,
                cst.Element,
                cst.Tuple,
                cst.List,
                cst.BinaryOperation,
                cst.Index,
                cst.SubscriptElement,
                cst.Subscript,
            ),
        ):
            inner, outer = outer, self._parent(outer)
        if isinstance(outer, cst.Call) and (
            outer.func is inner or _dotted(outer.func) in ("isinstance", "issubclass", "super", "cast", "typing.cast")
        ):
            return
        if isinstance(outer, (cst.ClassDef, cst.Annotation, cst.Attribute, cst.ExceptHandler)):
            return
        if (
            isinstance(outer, cst.Call)
            and _dotted(outer.func).endswith("Parser")
            or (old == "GRPOConfig" and not isinstance(outer, cst.Call))
        ):
            why = (
                "it is handed on from here, so that its values come from elsewhere: leave --loss_type, "
                "--importance_sampling_level, --epsilon and small --beta out of the command line, and migrate a "
                "YAML file too."
            )
        else:
            why = "it is handed on from here: see that what gets it means GSPO's."
        self._point(node, f"`{old}`: {why}")

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        bases = {_QUALIFIED.get(name, name) for arg in node.bases for name in self._names(arg.value)}
        if "GRPOConfig" in bases or bases & self.config_classes:
            self.config_classes.add(node.name.value)
        if "GRPOTrainer" not in bases:
            return
        for statement in node.body.body:
            if isinstance(statement, cst.FunctionDef) and statement.name.value in overridden():
                self._point(
                    statement,
                    f"`{statement.name.value}` is GSPOTrainer's own too: this one replaces it. Where it does not call "
                    "super(), what GSPO does there is lost.",
                )
            for small in statement.body if isinstance(statement, cst.SimpleStatementLine) else ():
                if m.matches(
                    small,
                    m.Assign(targets=[m.AssignTarget(m.Name("_name") | m.Name("_tag_names") | m.Name("_paper"))]),
                ):
                    self._point(small, "the model card will name what stands here, not GSPO.")

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        if isinstance(value, str) and value.split(".")[-1] in _NEW and not self._in_annotation(node):
            self._point(node, f"the string {node.value} names a class of TRL's: see what it is for.")

    def _in_annotation(self, node: cst.CSTNode) -> bool:
        while node is not None and not isinstance(node, cst.Annotation):
            node = self._parent(node)
        return node is not None

    def visit_Assign(self, node: cst.Assign) -> None:
        for target in node.targets:
            self._attribute(target.target, node.value)

    def visit_AugAssign(self, node: cst.AugAssign) -> None:
        self._attribute(node.target, node.value)

    def _attribute(self, target: cst.BaseExpression, value: cst.BaseExpression) -> None:
        if isinstance(target, cst.Attribute) and target.attr.value in RULED and _dotted(target.value) != "self":
            code = cst.Module([]).code_for_node(value)
            self._point(
                target,
                f"`{target.attr.value}` is set to {code} after the configuration was made: see that it is GSPO's.",
            )

    def visit_Call(self, node: cst.Call) -> None:
        function = _dotted(node.func)
        first = node.args[0].value if node.args else None
        if function.endswith("add_argument") and isinstance(first, cst.SimpleString):
            name = str(first.evaluated_value).lstrip("-").replace("-", "_")
            default = next((arg.value for arg in node.args if arg.keyword and arg.keyword.value == "default"), None)
            if name in RULED and default is not None:
                self._point(
                    node,
                    f"`--{name}` has a default of its own, {cst.Module([]).code_for_node(default)}: see that it is "
                    "GSPO's.",
                )
        if function == "setattr" and len(node.args) > 1 and _literal(node.args[1].value) in RULED:
            self._point(node, f"`{_literal(node.args[1].value)}` is set here: see that it is GSPO's.")


class _Rewrite(cst.CSTTransformer):
    """Swaps what the survey found, and applies the rules to literal arguments."""

    METADATA_DEPENDENCIES = (PositionProvider, QualifiedNameProvider, ScopeProvider)

    def __init__(self, survey: _Survey) -> None:
        super().__init__()
        self.survey = survey
        self.changes: list[Point] = []
        self.points: list[Point] = []
        self.annotations = 0
        # Where the script has a class of its own by our name, ours keeps the old name.
        self.local = {old: old if new in survey.taken else new for old, new in _NEW.items()}

    def _change(self, node: cst.CSTNode, text: str) -> None:
        self.changes.append(Point(self.get_metadata(PositionProvider, node).start.line, text))

    def _point(self, node: cst.CSTNode, text: str) -> None:
        self.points.append(Point(self.get_metadata(PositionProvider, node).start.line, text))

    # References.

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        old = self.survey.swaps.get(original_node)
        return updated_node.with_changes(value=self.local[old]) if old == updated_node.value else updated_node

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        old = self.survey.swaps.get(original_node)
        if old is None:
            return updated_node
        return updated_node.with_changes(value=cst.Name("trl_gspo"), attr=cst.Name(_NEW[old]))

    def visit_Annotation(self, node: cst.Annotation) -> None:
        self.annotations += 1

    def leave_Annotation(self, original_node: cst.Annotation, updated_node: cst.Annotation) -> cst.Annotation:
        self.annotations -= 1
        return updated_node

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString) -> cst.SimpleString:
        value = original_node.evaluated_value
        if not self.annotations or not isinstance(value, str) or "GRPO" not in value:
            return updated_node
        scope = self.get_metadata(ScopeProvider, original_node, None)
        try:
            expression = cst.parse_expression(value)
        except cst.ParserSyntaxError:
            return updated_node
        local = self.local

        class Names(cst.CSTTransformer):
            def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
                found = {name.name for name in scope.get_qualified_names_for(original_node.value)} if scope else set()
                is_ours = original_node.value in local and found & set(_QUALIFIED)
                return updated_node.with_changes(value=local[original_node.value]) if is_ours else updated_node

        inner = cst.Module([]).code_for_node(expression.visit(Names()))
        return updated_node.with_changes(value=f"{updated_node.prefix}{updated_node.quote}{inner}{updated_node.quote}")

    # Imports.

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel:
        body, after = self._import(original_node.body, updated_node.body, alone=len(original_node.body) == 1)
        line = updated_node.with_changes(body=body)
        return cst.FlattenSentinel(
            [line, *(cst.SimpleStatementLine([statement], leading_lines=comments) for statement, comments in after)]
        )

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> cst.SimpleStatementSuite:
        body, _ = self._import(original_node.body, updated_node.body, alone=False)
        return updated_node.with_changes(body=body)

    def _import(self, originals: Sequence, updated: Sequence, alone: bool) -> tuple[list, list]:
        body: list[cst.BaseSmallStatement] = []
        after: list[tuple[cst.BaseSmallStatement, list[cst.EmptyLine]]] = []
        for original, statement in zip(originals, updated, strict=True):
            new = None
            comments: list[cst.EmptyLine] = []
            if original in self.survey.imports:
                moved = self.survey.imports[original]
                kept = [alias for alias in original.names if alias not in moved]
                aliases = [self._alias(alias) for alias in moved]
                new = cst.ImportFrom(cst.Name("trl_gspo"), sorted(aliases, key=lambda alias: alias.name.value))
                if kept:
                    statement = statement.with_changes(names=_without(original.names, moved))
                    comment = _comments(kept[-1])
                    if kept[-1] is not original.names[-1] and comment and not _comments(statement.names[-1]):
                        # The list ended without a comma: what is its last name now has its comment before the end.
                        space = statement.rpar.whitespace_before
                        line = kept[-1].comma.whitespace_after.first_line
                        if isinstance(space, cst.ParenthesizedWhitespace):
                            rpar = statement.rpar.with_changes(whitespace_before=space.with_changes(first_line=line))
                            statement = statement.with_changes(rpar=rpar)
                    comments = [cst.EmptyLine(comment=comment) for alias in moved for comment in _comments(alias)]
                else:
                    # In its place: the comments of the line stay where they are.
                    statement, new = new.with_changes(semicolon=statement.semicolon), None
            elif original in self.survey.modules:
                new = cst.Import([cst.ImportAlias(cst.Name("trl_gspo"))])
                if self._is_unused(original):
                    statement, new = new.with_changes(semicolon=statement.semicolon), None
            body.append(statement)
            if new is not None and alone:
                after.append((new, comments))
            elif new is not None:
                body[-1] = statement.with_changes(semicolon=cst.Semicolon(whitespace_after=cst.SimpleWhitespace(" ")))
                body.append(new.with_changes(semicolon=statement.semicolon))
        return body, after

    def _alias(self, alias: cst.ImportAlias) -> cst.ImportAlias:
        old = alias.name.value
        asname = alias.asname
        if asname is None and self.local[old] == old:
            asname = cst.AsName(cst.Name(old))
        return cst.ImportAlias(cst.Name(_NEW[old]), asname=asname)

    def _is_unused(self, node: cst.CSTNode) -> bool:
        """Whether an `import trl` served nothing but what was swapped."""
        if not isinstance(node, cst.Import) or len(node.names) != 1:
            return False
        scope = self.get_metadata(ScopeProvider, node)
        alias = node.names[0]
        bound = alias.asname.name.value if alias.asname else _dotted(alias.name).split(".")[0]
        uses = [access.node for assignment in scope[bound] for access in assignment.references]
        swapped = set(self.survey.swaps)
        roots = {id(root) for swap in swapped for root in _roots(swap)}
        return all(use in swapped or id(use) in roots for use in uses)

    # The configuration.

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        old = self.survey.swaps.get(original_node.func)
        if old != "GRPOConfig" and _dotted(original_node.func) not in self.survey.config_classes:
            return updated_node
        return updated_node.with_changes(args=self._arguments(original_node, list(updated_node.args)))

    def _arguments(self, call: cst.Call, args: list[cst.Arg]) -> list[cst.Arg]:
        originals = list(call.args)
        given = {arg.keyword.value: _literal(arg.value) for arg in originals if arg.keyword}
        nodes = {arg.keyword.value: arg for arg in originals if arg.keyword}
        is_open = any(arg.star for arg in originals)
        if is_open:
            self._point(
                call,
                "the configuration takes ** or *: what they hold is not seen. It must not set "
                "`loss_type`, a token-level `epsilon` or the level `token`, and needs an `output_dir` of its own.",
            )
        drop: set[int] = set()
        add: dict[str, str] = {}

        for name in RULED:
            if name in nodes and given[name] is _UNKNOWN:
                code = cst.Module([]).code_for_node(nodes[name].value)
                self._point(
                    nodes[name], f"`{name}={code}`: its value is not in this call. {_ADVICE.get(name, _FOREIGN)}"
                )
        removed, kept, add = decide(given)
        for name, why in removed.items():
            drop.add(originals.index(nodes[name]))
            self._change(nodes[name], f"`{name}={_code(nodes[name].value)}` is taken out: {why}")
        for name, why in kept.items():
            self._change(nodes[name], f"`{name}={_code(nodes[name].value)}` is kept: {why}")
        for name, (_, why) in add.items():
            if not is_open:
                self._change(call, f"`{name}={add[name][0]}` is added: {why}")

        place = 0 if originals and originals[0].keyword is None and not originals[0].star else None
        for index, arg in enumerate(originals):
            name = "output_dir" if index == place else arg.keyword.value if arg.keyword else None
            if name in _NAMED:
                args[index] = args[index].with_changes(value=self._renamed(name, arg.value, args[index].value))
        additions = {} if is_open else {name: code for name, (code, _) in add.items()}
        if place is None and "output_dir" not in given and not is_open:
            additions["output_dir"] = '"gspo_output"'
            self._change(
                call, '`output_dir="gspo_output"` is added: by default GRPO and GSPO write to the same folder.'
            )
        args = list(_without(args, [args[index] for index in sorted(drop)]))
        for name, code in additions.items():
            args = _with(
                args,
                cst.Arg(
                    cst.parse_expression(code),
                    keyword=cst.Name(name),
                    equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
                ),
            )
        return args

    def _renamed(self, name: str, original: cst.BaseExpression, value: cst.BaseExpression) -> cst.BaseExpression:
        """A folder, run or hub repository by a name of its own."""
        new: cst.BaseExpression | None = None
        if isinstance(value, cst.SimpleString):
            new = value.with_changes(value=f"{value.prefix}{value.quote}{gspo_name(value.raw_value)}{value.quote}")
            if name == "run_name" and not re.search("grpo", value.raw_value, re.IGNORECASE):
                new = value
        elif isinstance(value, cst.FormattedString):
            text = "".join(part.value for part in value.parts if isinstance(part, cst.FormattedStringText))
            if re.search("grpo", text, re.IGNORECASE):
                parts = [
                    part.with_changes(value=gspo_name(part.value))
                    if isinstance(part, cst.FormattedStringText) and re.search("grpo", part.value, re.IGNORECASE)
                    else part
                    for part in value.parts
                ]
                new = value.with_changes(parts=parts)
            elif re.search("gspo", text, re.IGNORECASE) or name == "run_name":
                new = value
            else:
                new = value.with_changes(parts=[*value.parts, cst.FormattedStringText("-gspo")])
        elif _literal(original) is None:
            return value
        if new is None:
            if name != "run_name":
                self._point(
                    original,
                    f"`{name}={_code(original)}`: give the GSPO run another one, so that nothing is overwritten.",
                )
            return value
        if not new.deep_equals(value):
            self._change(original, f"`{name}` is {_code(new)}, so that nothing of the other run is overwritten.")
        return new

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        if original_node.name.value not in self.survey.config_classes or not isinstance(
            updated_node.body, cst.IndentedBlock
        ):
            return updated_node
        given = {}
        for statement in original_node.body.body:
            for small in statement.body if isinstance(statement, cst.SimpleStatementLine) else ():
                if (
                    m.matches(small, m.AnnAssign(target=m.Name()))
                    and small.value is not None
                    and small.target.value in RULED
                ):
                    given[small.target.value] = (statement, small)
        removed, kept, _ = decide({name: _literal(small.value) for name, (_, small) in given.items()})
        for name, (_, small) in given.items():
            if _literal(small.value) is _UNKNOWN:
                self._point(small, f"`{name}`: its default is not a literal. {_ADVICE.get(name, _FOREIGN)}")
        for name, why in kept.items():
            self._change(given[name][1], f"`{name}` is kept: {why}")
        gone = [given[name][0] for name in removed]
        for name, why in removed.items():
            self._change(given[name][1], f"the default of `{name}` is taken out: {why}")
        body = [
            new for old, new in zip(original_node.body.body, updated_node.body.body, strict=False) if old not in gone
        ]
        if not gone or len(original_node.body.body) != len(updated_node.body.body):
            return updated_node
        return updated_node.with_changes(
            body=updated_node.body.with_changes(body=body or [cst.SimpleStatementLine([cst.Pass()])])
        )


_FOREIGN = "Only a loss that is not GSPO's reads it: take it out."
_ADVICE = {
    "importance_sampling_level": "It has to be sequence, sequence_token or turn.",
    "loss_type": "It has to be grpo, or luspo.",
    "epsilon": f"A sequence's is about {EPSILON_LOW}; TRL's 0.2 is for single tokens, and never clips.",
    "epsilon_high": f"A sequence's is about {EPSILON_HIGH}; TRL's 0.2 is for single tokens, and never clips.",
    "beta": f"GSPO has no KL term; below {SMALL_KL} leave it out.",
    "delta": "It bounds the ratio of a whole completion now.",
    "steps_per_generation": (
        f"Left out it is {MINIBATCHES} x gradient_accumulation_steps; at one optimizer step a rollout the ratio is 1."
    ),
    "generation_batch_size": "With one optimizer step a rollout the ratio is exactly 1; left out, a rollout has four.",
    "disable_dropout": "Dropout moves the ratio past the clip range: leave it out.",
}


def decide(given: dict[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, tuple[str, str]]]:
    """
    What becomes of the literal arguments of a `GRPOConfig`.

    Args:
        given (`dict[str, Any]`): all of its arguments by name, with what is not a literal as a marker.

    Returns:
        `tuple`: what to take out, what to say of what is kept, both with the reason, and what to add, as code with its
        reason.
    """
    removed: dict[str, str] = {}
    kept: dict[str, str] = {}
    add: dict[str, tuple[str, str]] = {}

    def literal(name: str, default: Any) -> Any:
        return given.get(name, default)

    level = literal("importance_sampling_level", "token")
    if level is not _UNKNOWN and "importance_sampling_level" in given and level not in LEVELS:
        removed["importance_sampling_level"] = "`sequence` is the default."
    loss = literal("loss_type", "dapo")
    if "loss_type" in given and loss is not _UNKNOWN:
        if loss not in _LOSS_TYPES:
            removed["loss_type"] = f"it {_REFUSED_LOSS_TYPES.get(loss, 'is not known')}; `grpo` is the default."
        elif loss == "luspo":
            kept["loss_type"] = "it weights each sequence by its length on purpose."

    length = literal("max_completion_length", 512)
    length = length if _is_number(length) else _LONG_COMPLETION + 1
    epsilons = {name: given[name] for name in ("epsilon", "epsilon_high") if _is_number(given.get(name))}
    if any(is_token_level(value, level in LEVELS, length) for value in epsilons.values()):
        for name in epsilons:
            removed[name] = (
                "a clip range for single tokens never clips a sequence's ratio; the paper's is the default."
            )
    elif "epsilon" in epsilons and "epsilon_high" not in given:
        kept["epsilon"] = "it is of the size of a sequence's ratio."
        add["epsilon_high"] = (repr(epsilons["epsilon"]), "in TRL `epsilon` alone is the width on both sides.")

    beta = given.get("beta")
    if _is_number(beta) and 0 < beta < SMALL_KL:
        removed["beta"] = f"below {SMALL_KL} the guides switch it off, and GSPO's objective has no KL term."
    elif _is_number(beta) and beta > 0:
        kept["beta"] = "it is not small; a reference model is loaded, and every row goes through the model."
    if _is_number(given.get("delta")):
        kept["delta"] = "it bounds the ratio of a whole completion from above."
    for name in _FOREIGN_LOSS_FIELDS:
        if name in given:
            removed[name] = f"only `loss_type={name.split('_')[0]!r}` reads it."
    if given.get("disable_dropout") is False:
        removed["disable_dropout"] = "dropout alone moves the ratio past the clip range."

    steps, accumulation, iterations = (
        literal("steps_per_generation", None),
        literal("gradient_accumulation_steps", 1),
        literal("num_iterations", 1),
    )
    if _is_number(steps) and all(map(_is_number, (accumulation, iterations))) and steps * iterations > 0:
        if accumulation % (steps * iterations) == 0:
            removed["steps_per_generation"] = (
                f"with gradient_accumulation_steps={accumulation} it is one optimizer step a rollout, and the ratio "
                f"exactly 1; {MINIBATCHES} times that is the default."
            )
        else:
            kept["steps_per_generation"] = f"it makes {steps * iterations / accumulation:g} optimizer steps a rollout."
    if _is_number(given.get("generation_batch_size")):
        kept["generation_batch_size"] = (
            "how many optimizer steps it makes depends on the number of processes; with one the ratio is exactly 1. "
            f"Left out, a rollout has {MINIBATCHES}."
        )
    if given.get("use_vllm") is True and not {
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_correction",
    } & set(given):
        add["vllm_importance_sampling_mode"] = (
            '"token_truncate"',
            "TRL's sequence_mask multiplies the ratios of all tokens, so that long completions fall out.",
        )
    return removed, kept, add


@functools.cache
def overridden() -> set[str]:
    """What `GSPOTrainer` does in methods of its own that TRL's trainer has too."""
    from .trainer import GSPOTrainer

    inherited = {name for kind in GSPOTrainer.__mro__[1:] for name in vars(kind)}
    own = {name for name, value in vars(GSPOTrainer).items() if callable(value) and not name.startswith("__")}
    return own & inherited


# ---- syntax


def _walk(node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _roots(node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    yield node
    while isinstance(node, cst.Attribute):
        node = node.value
        yield node


def _dotted(node: cst.CSTNode | None) -> str:
    if isinstance(node, cst.Name):
        return node.value
    return f"{_dotted(node.value)}.{node.attr.value}" if isinstance(node, cst.Attribute) else ""


def _code(node: cst.CSTNode) -> str:
    return " ".join(cst.Module([]).code_for_node(node).split())


def _literal(node: cst.BaseExpression) -> Any:
    try:
        return ast.literal_eval(cst.Module([]).code_for_node(node).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError):
        return _UNKNOWN


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _comments(item: cst.ImportAlias | cst.Arg) -> list[cst.Comment]:
    space = item.comma.whitespace_after if isinstance(item.comma, cst.Comma) else None
    first = space.first_line.comment if isinstance(space, cst.ParenthesizedWhitespace) else None
    return [first] if first is not None else []


def _without(items: Sequence, drop: Sequence) -> list:
    """Items of a list in parentheses without some of them; the whitespace before its end stays."""
    kept = [item for item in items if item not in drop]
    if not kept or kept[-1] is items[-1]:
        return kept
    last, end = kept[-1], items[-1]
    comma = end.comma
    own = last.comma.whitespace_after if isinstance(last.comma, cst.Comma) else None
    if isinstance(comma, cst.Comma) and isinstance(comma.whitespace_after, cst.ParenthesizedWhitespace):
        space = comma.whitespace_after
        if isinstance(own, cst.ParenthesizedWhitespace):
            space = space.with_changes(first_line=own.first_line)
        comma = comma.with_changes(whitespace_after=space)
    if not isinstance(last, cst.Arg):
        return [*kept[:-1], last.with_changes(comma=comma)]
    space = end.whitespace_after_arg
    if not isinstance(comma, cst.Comma) and isinstance(own, cst.ParenthesizedWhitespace):
        if isinstance(space, cst.ParenthesizedWhitespace):
            space = space.with_changes(first_line=own.first_line)
    return [*kept[:-1], last.with_changes(comma=comma, whitespace_after_arg=space)]


def _with(args: list[cst.Arg], new: cst.Arg) -> list[cst.Arg]:
    """Arguments with one more at their end, laid out like the others."""
    if not args:
        return [new]
    last = args[-1]
    between = args[-2].comma if len(args) > 1 else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    if isinstance(between, cst.Comma) and isinstance(between.whitespace_after, cst.ParenthesizedWhitespace):
        space = between.whitespace_after
        own = last.comma.whitespace_after if isinstance(last.comma, cst.Comma) else None
        line = own.first_line if isinstance(own, cst.ParenthesizedWhitespace) else cst.TrailingWhitespace()
        between = between.with_changes(whitespace_after=space.with_changes(first_line=line, empty_lines=[]))
        comma = last.comma
        if isinstance(own, cst.ParenthesizedWhitespace):
            comma = comma.with_changes(whitespace_after=own.with_changes(first_line=cst.TrailingWhitespace()))
    else:
        comma = last.comma
    return [
        *args[:-1],
        last.with_changes(comma=between, whitespace_after_arg=cst.SimpleWhitespace("")),
        new.with_changes(comma=comma, whitespace_after_arg=last.whitespace_after_arg),
    ]
