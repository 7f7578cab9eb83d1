"""Central lines of the project, each changed for the worse: a test that is named here must fail.

A test that cannot fail proves nothing. `DECANT_TEST_SLOW=1 pytest tests/test_mutations.py` changes
one line in a copy of pipeline/ and runs the test against the copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import ROOT


@dataclass(frozen=True)
class Mutation:
    """A line of a file, what replaces it, and the test that must notice."""

    file: str
    line: str
    wrong: str
    test: str


MUTATIONS = {
    "labels shifted the other way": Mutation(
        "data/packing.py",
        "labels[:, :-1] = torch.where(follows & in_loss[:, 1:], tokens[:, 1:], IGNORE)",
        "labels[:, 1:] = torch.where(follows & in_loss[:, 1:], tokens[:, :-1], IGNORE)",
        "data/test_packing.py::test_a_shift_either_way_is_noticed",
    ),
    "the factor tau^2 forgotten": Mutation(
        "losses/chunked.py",
        "return share * objective.temperature**2 * divergence + (1.0 - share) * ce",
        "return share * divergence + (1.0 - share) * ce",
        "losses/test_chunked.py::test_every_divergence_equals_its_plain_form",
    ),
    "the slope of the soft cap forgotten": Mutation(
        "losses/chunked.py",
        "logits *= slope",
        "logits *= 1.0",
        "losses/test_chunked.py::test_scaled_and_capped_logits",
    ),
    "the teacher's logits not scaled": Mutation(
        "teacher/teacher.py",
        "yield rows, self._transform.apply_(logits)",
        "yield rows, logits",
        "model/test_architectures.py::test_the_page_says_what_works[cohere]",
    ),
    "the mass of the tail forgotten": Mutation(
        "targets/topk.py",
        "return log_p, (1.0 - log_p.exp().sum(-1)).clamp(0.0, 1.0)",
        "return log_p, torch.zeros_like(self.lse)",
        "losses/test_reference.py::test_worked_by_hand",
    ),
    "checksums of chunks not compared": Mutation(
        "io/zarr_shards.py",
        'if crc32c(body) != int.from_bytes(chunk[-_CRC_BYTES:], "little"):',
        "if False:",
        "io/test_zarr_shards.py::test_any_flipped_bit_is_found",
    ),
    "a shard committed before its objects": Mutation(
        "logit_cache/writer.py",
        "objects = {}",
        "objects = {}; self._folder.write(marker_key(shard), b'{}')",
        "logit_cache/test_crash.py::test_a_write_that_fails_at_any_object_leaves_no_shard",
    ),
    "tokens out of the loss trained on": Mutation(
        "data/packing.py",
        "labels[:, :-1] = torch.where(follows & in_loss[:, 1:], tokens[:, 1:], IGNORE)",
        "labels[:, :-1] = torch.where(follows, tokens[:, 1:], IGNORE)",
        "data/test_packing.py::test_labels_are_of_tokens_in_the_loss",
    ),
    "the same order of rows in every epoch": Mutation(
        "data/row_order.py",
        "np.random.default_rng([self._seed, epoch]).shuffle(shards)",
        "np.random.default_rng([self._seed]).shuffle(shards); epoch = 0",
        "data/test_row_order.py",
    ),
    "targets paired with a neighbouring row": Mutation(
        "logit_cache/reader.py",
        "parts = [shard.arrays[name][row - shard.first] for shard, row in places]",
        "parts = [shard.arrays[name][row - shard.first - 1] for shard, row in places]",
        "logit_cache/test_reader.py::test_rows_in_any_order_are_what_the_teacher_said",
    ),
    "repeated sampled ids counted twice": Mutation(
        "verify/agreement.py",
        "repeats[:, 1:] = by_id[:, 1:] == by_id[:, :-1]",
        "pass",
        "verify/test_gate.py::test_a_repeated_sampled_id_counts_once",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_line_is_there(name: str) -> None:
    mutation = MUTATIONS[name]
    assert (ROOT / "pipeline" / mutation.file).read_text().count(mutation.line) == 1
    assert (ROOT / "tests" / mutation.test.partition("::")[0]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_test_fails(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    for folder in ("pipeline", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("pyproject.toml", "params.yaml"):
        shutil.copy(ROOT / file, tmp_path)

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{mutation.test}"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert run().returncode == 0
    file = tmp_path / "pipeline" / mutation.file
    file.write_text(file.read_text().replace(mutation.line, mutation.wrong))
    done = run()
    assert done.returncode == 1, done.stdout
    assert " failed" in done.stdout
