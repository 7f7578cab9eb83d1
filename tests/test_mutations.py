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
    "the prompt of a rollout in the loss": Mutation(
        "generation/rollouts.py",
        "yield Document(np.array(ids), np.arange(len(ids)) >= len(before))",
        "yield Document(np.array(ids), np.arange(len(ids)) >= 0)",
        "generation/test_rollouts.py::test_documents_are_prompts_and_the_sampled_tokens",
    ),
    "rollouts that depend on the batch": Mutation(
        "generation/rollouts.py",
        "np.random.default_rng([seed, *request])",
        "np.random.default_rng([seed, len(batch)])",
        "generation/test_rollouts.py::test_no_rollout_depends_on_the_batch",
    ),
    "the factor tau^2 forgotten": Mutation(
        "losses/chunked.py",
        "of_divergence = share * objective.target_weight * objective.temperature**2",
        "of_divergence = share * objective.target_weight",
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
        "tail_mass = (1.0 - log_p.exp().sum(-1)).clamp(0.0, 1.0)",
        "tail_mass = torch.zeros_like(self.lse)",
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
    "counts of sampled ids forgotten": Mutation(
        "targets/topk.py",
        "weight = (tail_mass / max(1, self.num_sampled))[..., None] * self.sampled_counts",
        "weight = (tail_mass / max(1, self.num_sampled))[..., None].expand_as(self.sampled_counts)",
        "targets/test_topk.py::test_weights_of_draws_at_a_temperature",
    ),
    "a cut id counted in the student's softmax twice": Mutation(
        "losses/chunked.py",
        "kept = kept.masked_fill(topk.is_repeat, LOG_ZERO)",
        "pass",
        "losses/test_chunked.py::test_cut_ids_and_positions_without_a_target",
    ),
    "the divergence counted without a target": Mutation(
        "losses/chunked.py",
        "return divergence.masked_fill(~topk.has_target, 0.0).sum()",
        "return divergence.sum()",
        "losses/test_chunked.py::test_cut_ids_and_positions_without_a_target",
    ),
    "a short shard taken for the whole": Mutation(
        "capture/capture.py",
        "for first in range(num_stored, stop - start, self._batch_rows):",
        "for first in range(0, stop - start, self._batch_rows):",
        "capture/test_growing_cache.py",
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
