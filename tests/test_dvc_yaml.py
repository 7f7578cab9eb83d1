"""dvc.yaml against the code: what a stage imports are its deps, what it reads are its params."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.params import Params, all_keys
from pipeline.model.decoder import ModelConfig
from pipeline.report.sweep import OF_A_TEACHER
from tests.helpers import ROOT

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("pipeline", "stages")
    for file in (ROOT / folder).rglob("*.py")
}
"""Every module of the project by its dotted name."""

NO_EFFECT = {
    "pipeline": "empty",
    "pipeline.cli": "flags and exit status",
    **{
        f"pipeline.config.{name}": "checks values, of which each stage names those it reads"
        for name in (
            "params",
            "section",
            "source_params",
            "cache_params",
            "train_params",
            "delivery_params",
        )
    },
    "pipeline.errors": "words",
    "pipeline.io.files": "how bytes get to a disk, not which",
    "pipeline.io.hashes": "of what a stage names among its deps, or looks at itself",
    "pipeline.io.hub_folder": "how bytes get from the hub, not which",
    "pipeline.io.locks": "one process at a time",
    "pipeline.config.params_file": "reads what pipeline.config.params checks",
    "pipeline.model.named_models": "which folders flags name, of which DVC gives one: --run NAME",
    "pipeline.io.address": "where bytes are, not which",
    "pipeline.io.folders": "how bytes get to a disk or an object store, not which",
    "pipeline.io.object_store": "how bytes get to an object store, not which",
    "pipeline.io.ownership": "what a stage may remove",
    "pipeline.io.retries": "how often a request is repeated",
    "pipeline.runtime.batch_sizes": "how much is computed at once",
    "pipeline.runtime.console": "progress bars and messages",
    "pipeline.runtime.launch": "ranks, of which DVC starts one",
    "pipeline.runtime.ranks": "ranks, of which DVC starts one",
    "pipeline.runtime.optional": "imports of packages that may be missing",
    "pipeline.runtime.ray_cluster": "where tasks and actors run",
    "pipeline.runtime.transfer": "copies between host and GPU",
    "pipeline.runtime.triton_probe": "whether a GPU runs Triton kernels",
    "pipeline.runtime.triton_usable": "which of two equal passes a GPU takes",
    "pipeline.teacher.sharded": "ranks, of which DVC starts one",
    "pipeline.teacher.stage_ranks": "ranks, of which DVC starts one",
    "pipeline.capture.ray": "prepare --executor ray, which DVC does not use: the same bytes",
}
"""Modules that no stage need name, since no result depends on them, and why."""
EXECUTION = {"paths", "device", "capture", "run"}
"""Sections that say where and how: outs and deps hold the paths, no result depends on the rest."""
BY_HAND = {"advise", "rollouts", "humaneval", "generate", "study"}
"""Sections of stages that are not in dvc.yaml."""
READ_IN_VAIN = {("verify", "prepare"): "the fingerprint of the cache, a dep, takes its place"}
"""Sections that code of a stage reads without effect on what the stage writes."""


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def parsed(file: Path) -> Iterator[ast.AST]:
    """Every node, in functions too; what stands under `if TYPE_CHECKING:` is not run."""
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


@cache
def imports(module: str) -> set[str]:
    """Modules of the project that a module imports, with the packages above them."""
    names = []
    for node in parsed(FILES[module]):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    above = {".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)}
    return above & FILES.keys()


@cache
def closure(module: str) -> set[str]:
    """The module and all that it imports, directly or not."""
    found: set[str] = set()
    todo = {module}
    while todo:
        found |= todo
        todo = set().union(*map(imports, todo)) - found
    return found


def modules_of(stage: str) -> set[str]:
    """What the stage's command runs."""
    return closure(STAGES[stage]["cmd"].split()[2])


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if not dep.startswith("${")]


def covers(dep: str, module: str) -> bool:
    return (ROOT / dep) in (FILES[module], *FILES[module].parents)


def test_imports_are_found_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "made_up.py"
    file.write_text(
        "import pipeline.targets.topk\n"
        "from pipeline.logit_cache import reader\n"
        "from pipeline.config.params import Params\n"
        "if TYPE_CHECKING:\n    from pipeline.planning.advise import Advice\n"
        "def f():\n    from pipeline.report.page import write_report\n"
    )
    monkeypatch.setitem(FILES, "made_up", file)
    packages = {
        "pipeline",
        "pipeline.config",
        "pipeline.logit_cache",
        "pipeline.report",
        "pipeline.targets",
    }
    assert imports("made_up") == packages | {
        "pipeline.config.params",
        "pipeline.report.page",
        "pipeline.logit_cache.reader",
        "pipeline.targets.topk",
    }


def test_deps_are_what_the_stage_imports(stage: str) -> None:
    modules = {m for m in modules_of(stage) - NO_EFFECT.keys() if FILES[m].stat().st_size}
    deps = code_deps(stage)
    missing = {module for module in modules if not any(covers(dep, module) for dep in deps)}
    assert not missing, f"{stage} imports what is not among its deps: {sorted(missing)}"
    idle = [dep for dep in deps if not any(covers(dep, module) for module in modules)]
    assert not idle, f"{stage} has deps that it does not import: {idle}"


def test_a_folder_among_deps_is_mostly_imported(stage: str) -> None:
    """Else a change of code far from the stage would re-run it: name files instead."""
    for dep in code_deps(stage):
        inside = [m for m in FILES if covers(dep, m) and FILES[m].stat().st_size]
        assert 2 * len(modules_of(stage).intersection(inside)) > len(inside), dep


def test_no_exception_is_left_over() -> None:
    used = set().union(*map(modules_of, STAGES))
    assert NO_EFFECT.keys() <= used
    for stage, section in READ_IN_VAIN:
        assert section in sections_read(stage)


@cache
def sections_read_by(module: str) -> set[str]:
    """Sections that a module's functions take of their argument of type Params."""
    found: set[str] = set()
    for function in parsed(FILES[module]):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [*function.args.args, *function.args.kwonlyargs]
        names = {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "Params"}
        found |= {
            node.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
        }
    for template in FILES[module].parent.glob("templates/*.html"):
        found |= set(re.findall(r"\bparams\.(\w+)", template.read_text()))
    return found & Params.model_fields.keys()


def sections_read(stage: str) -> set[str]:
    return set().union(*map(sections_read_by, modules_of(stage)))


def keys_of(section: str) -> set[str]:
    kind: Any = Params.model_fields[section].annotation
    return set(getattr(kind, "model_fields", ()))


def test_params_are_the_sections_that_the_stage_reads(stage: str) -> None:
    named = {name.split(".")[0] for name in STAGES[stage]["params"]}
    in_vain = {section for reader, section in READ_IN_VAIN if reader == stage}
    assert named == sections_read(stage) - EXECUTION - in_vain


def test_every_key_is_read_where_it_is_named() -> None:
    """Of sections named whole, by one of the stages; a key that nothing reads has no effect."""
    readers: dict[str, set[str]] = {section: {f"stages.{section}"} for section in BY_HAND}
    readers |= {"run": {"stages.train"}, "capture": {"stages.prepare"}}
    for name, stage in STAGES.items():
        for named in stage["params"]:
            section, _, key = named.partition(".")
            assert not key or attributes_of({key}, modules_of(name)), (
                f"{name} does not read {named}"
            )
            if not key:
                readers.setdefault(section, set()).add(stage["cmd"].split()[2])
    shape = keys_of("student") & ModelConfig.__dataclass_fields__.keys()  # passed on as one
    for section, stages in readers.items():
        keys = {key.rsplit(".")[-1] for key in all_keys(Params) if key.startswith(f"{section}.")}
        unread = keys - shape - attributes_of(keys, set().union(*map(closure, stages)))
        assert not unread, f"{section}: {sorted(unread)}"


def attributes_of(names: set[str], modules: set[str]) -> set[str]:
    """Those of `names` that stand as an attribute in one of the modules."""
    return names & set().union(*map(attributes, modules))


@cache
def attributes(module: str) -> set[str]:
    if module in NO_EFFECT and module.startswith("pipeline.config."):
        return set()
    nodes = list(parsed(FILES[module]))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    # A table of names that getattr takes, as of the gate's limits.
    return names | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


def test_every_section_belongs_to_a_stage() -> None:
    """Whole, so a change of any key re-runs something, unless no result depends on it."""
    named = {name for stage in STAGES.values() for name in stage["params"]}
    whole = named & Params.model_fields.keys()
    assert whole | EXECUTION | BY_HAND == Params.model_fields.keys()
    assert not {name.split(".")[0] for name in named} & (EXECUTION | BY_HAND)


def test_the_baseline_depends_on_all_of_train_but_the_teacher() -> None:
    """A sweep over what a student is taught by must not repeat it."""
    named = {name for name in STAGES["baseline"]["params"] if name.startswith("train.")}
    assert named == {f"train.{key}" for key in keys_of("train")} - {"train.targets", *OF_A_TEACHER}
