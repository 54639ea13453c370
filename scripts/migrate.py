"""
Migrates a GRPO script, or a configuration of GRPO or of another system's GSPO, to trl_gspo.

    python scripts/migrate.py train_grpo.py                     # prints a diff
    python scripts/migrate.py train_grpo.py --write             # applies it
    python scripts/migrate.py grpo.yaml                         # prints a configuration of scripts/train.py
    python scripts/migrate.py grpo.yaml --write                 # writes it, as grpo_gspo.yaml
    python scripts/migrate.py run_verl.sh --num_processes 16    # the options of a command line in a file
    python scripts/migrate.py --command "swift rlhf --rlhf_type grpo --model ..."

Configurations are YAML, JSON or command lines, of TRL, stateset-agents, stand-alone GSPO scripts, verl or ms-swift.
Which it is, is told from the fields; `--from` says it. What was changed and why stands in the result; what is left for
you to decide is listed with its line on the error output.

Exit codes: 0 done, or nothing to do; 1 done, with points left for you to decide; 2 bad input, named in one line.
"""

import argparse
import difflib
import os
import sys
import tempfile
import warnings
from pathlib import Path


_COMMANDS = {".sh", ".bash", ".txt", ".slurm"}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("path", nargs="?", type=Path, help="script in Python, YAML, JSON, or file with a command line")
    result.add_argument("--command", help="a command line, in place of a file")
    result.add_argument(
        "--from", dest="system", help="the system of a configuration: trl, stateset, standalone, verl, ms-swift"
    )
    result.add_argument("--num_processes", type=int, help="that will train; they divide the batch of a configuration")
    result.add_argument(
        "--write", action="store_true", help="apply the diff, or write NAME_gspo.yaml beside a configuration"
    )
    result.add_argument("--output", type=Path, help="where to write the configuration")
    result.add_argument(
        "--docs", type=Path, help="write the tables of fields into docs/migration.md, and nothing else"
    )
    result.add_argument("--overwrite", action="store_true", help="whether a configuration may replace a file")
    return result


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.docs is not None:
        write_tables(args.docs)
        return 0
    where = "--command" if args.command else str(args.path)
    try:
        if (args.path is None) == (args.command is None):
            raise ValueError("give a file, or --command with a command line")
        if args.num_processes is not None and args.num_processes < 1:
            raise ValueError(f"`--num_processes` must be at least 1, got {args.num_processes}")
        if args.command is None and args.path.suffix == ".py":
            for option in ("system", "num_processes", "output"):
                if getattr(args, option) is not None:
                    raise ValueError(
                        f"`--{option.replace('system', 'from')}` is for configurations, and this is a script"
                    )
            return migrate_script(args.path, args.write)
        return migrate_config(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"migrate.py: {where}: {error}", file=sys.stderr)
        return 2


def migrate_script(path: Path, write: bool) -> int:
    from trl_gspo import codemod

    source = path.read_bytes()
    result = codemod.migrate_script(source)
    if result.code == source and not result.points:
        print(f"{path}: nothing to do.")
        return 0
    old, new = source.decode(errors="replace"), result.code.decode(errors="replace")
    sys.stdout.writelines(
        line if line.endswith("\n") else f"{line}\n"
        for line in difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(path), str(path))
    )
    if write and result.code != source:
        replace(path, result.code)
    for title, points in (("Changed or kept:", result.changes), ("For you to decide:", result.points)):
        if points:
            print(f"\n{title}", file=sys.stderr)
            print(*(f"  {path}:{point.line}: {point.text}" for point in points), sep="\n", file=sys.stderr)
    return 1 if result.points else 0


def migrate_config(args: argparse.Namespace) -> int:
    from trl_gspo import migration

    if args.command is not None:
        fields = migration.read_command(args.command)
    else:
        try:
            text = args.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("it is no text; read are scripts in Python, YAML, JSON and command lines") from None
        if args.path.suffix == ".ipynb":
            raise ValueError("it is a notebook: export it with `jupyter nbconvert --to script`, and migrate that")
        fields = migration.read_command(text) if args.path.suffix in _COMMANDS else migration.read_config(text)
    result = migration.migrate_config(fields, args.system, args.num_processes)
    target = args.output or (args.path.with_name(f"{args.path.stem}_gspo.yaml") if args.path and args.write else None)
    source = "a command line" if args.command else args.path.name
    text = migration.to_yaml(result, source, str(target or "CONFIG.yaml"))
    refusal = check(text)
    if target is None:
        print(text, end="")
    elif target.exists() and target.read_text() == text:
        print(f"{target}: nothing to do.")
    elif target.exists() and not args.overwrite:
        raise FileExistsError(f"`{target}` exists: choose another --output, or give --overwrite")
    else:
        replace(target, text.encode())
        print(f"Written to {target}.")
    points = [*result.questions, *(f"`{name}` was not understood" for name in result.unknown)]
    points += [f"scripts/train.py refuses the result: {refusal}"] if refusal else []
    if points:
        print("\nFor you to decide:", file=sys.stderr)
        print(*(f"  {point}" for point in points), sep="\n", file=sys.stderr)
    return 1 if points else 0


def write_tables(path: Path) -> None:
    """The tables of fields, between their marks in the guide."""
    from trl_gspo import migration

    text = path.read_text()
    for system in migration.SYSTEMS:
        begin = f"<!-- table: {system} -->\n"
        head, rest = text.split(begin)
        text = f"{head}{begin}{migration.table(system)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    path.write_text(text)


def check(text: str) -> str | None:
    """What `scripts/train.py` has to say against a configuration, where its machine and its gaps do not matter."""
    import train

    from trl_gspo import migration

    fields = migration.read_config(text)
    gaps = {name: "x" for name in migration.REQUIRED if name not in fields}
    machine = {"use_cpu": "true", "bf16": "false", "fp16": "false", "tf32": "false"}
    options = [part for name, value in (gaps | machine).items() for part in (f"--{name}", value)]
    # DeepSpeed's file is looked for at once, and the environment is the run's.
    for name in ("deepspeed", "env", "output_dir"):
        fields.pop(name, None)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "config.yaml"
        path.write_text(migration.yaml.safe_dump(fields))
        try:
            train.parse(["--config", str(path), *options])
        except ValueError as error:
            return str(error)
    return None


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, with the mode of the one it replaces."""
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
