"""Targets from the live teacher, which computes the same TopK that `prepare` would have stored.

On a GPU it works one batch ahead, in the thread that makes batches and on its own CUDA stream, so
that its kernels use the resources that the student's kernels leave idle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import positions_in_loss
from pipeline.data.row_order import Shard, read_rows
from pipeline.model.attention_mask import documents_apart
from pipeline.target_sources.target_source import Place, rows_at
from pipeline.targets.reduce import row_uniforms
from pipeline.targets.topk import TopK
from pipeline.teacher.teacher import Teacher


class OnlineTargets:
    """A `TargetSource` that runs the teacher.

    Args:
        k: number of ids kept per position.
        teacher: the live model.
        corpus: the split that the rows come from.
        num_sampled, seed: number of ids sampled in addition, and their seed; the same values as in
            the prepare stage give the same ids.
        temperatures: temperatures that training needs.
        top_p, entropy_quantile: as in a cache's fingerprint.
        document_mask: whether teacher and student attend within documents only.
        shard_rows: rows per shard, so that rows come in the same order as from a cache.
    """

    def __init__(
        self,
        teacher: Teacher,
        corpus: CorpusSplit,
        *,
        k: int,
        num_sampled: int,
        seed: int,
        temperatures: tuple[float, ...],
        top_p: float | None = None,
        entropy_quantile: float = 0.0,
        shard_rows: int,
        document_mask: bool,
    ) -> None:
        self.teacher = teacher
        self.corpus = corpus
        self.k = k
        self.num_sampled = num_sampled
        self.seed = seed
        self.temperatures = temperatures
        self.top_p = top_p
        self.entropy_quantile = entropy_quantile
        self.shard_rows = shard_rows
        self.document_mask = document_mask
        self._stream: Any = None
        if teacher.device.type == "cuda":
            self._stream = torch.cuda.Stream(teacher.device)  # type: ignore[no-untyped-call]

    @property
    def in_background(self) -> bool:
        """Whether the teacher is on a GPU.

        On a CPU, both would share the cores anyway, and `matmul_float32` sets the precision of
        matrix products for the whole process, including the student's.
        """
        return self.teacher.device.type != "cpu"

    def shard(self, number: int) -> Shard:
        return read_rows(self.corpus, number, self.shard_rows)

    def targets(self, places: list[Place], tokens: Tensor) -> TopK:
        """Run one teacher forward over `tokens`; the result is complete, for use on any stream."""
        uniforms = row_uniforms(
            (row for _, row in places), tokens.shape[1], self.num_sampled, self.seed
        )
        rows = rows_at(places)
        doc_ids = torch.from_numpy(rows.doc_ids)
        with torch.cuda.stream(self._stream):  # this thread's stream; None changes nothing
            topk = self.teacher.top_k(
                tokens,
                self.k,
                self.temperatures,
                uniforms,
                documents_apart(doc_ids, self.document_mask),
                top_p=self.top_p,
                wanted=positions_in_loss(rows),
                entropy_quantile=self.entropy_quantile,
            )
        if self._stream is not None:
            self._stream.synchronize()
            topk.map(self._keep_for_student)
        return topk

    def _keep_for_student(self, tensor: Tensor) -> Tensor:
        """Prevent reuse of the tensor's memory before the student's stream has read it."""
        tensor.record_stream(torch.cuda.default_stream(self.teacher.device))
        return tensor
