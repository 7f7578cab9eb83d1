"""How far from the full KL's gradient do sparse targets point, and why does the gate scatter by id?

    python tests/benchmarks/gradient_angle.py      (after `dvc repro`)

For validation positions, the angle between the gradient of the full KL with respect to the
student's logits and that of (a) the tail-bucket KL and (b) the KL to the renormalised top K; the
student as it starts and as it ends. Then the cosine of
sorted top-K logits between unrelated positions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import load_params
from pipeline.data.rows import CorpusSplit
from pipeline.losses.reference import full_kl, tail_bucket_kl
from pipeline.model.weights import load_student
from pipeline.teacher.hf import HuggingFaceTeacher
from pipeline.topk import TopK, top_k_from_logits
from pipeline.training.run import build_student

ROWS = 4


def renormalised_kl(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """KL once both sides are cut to the kept ids and renormalised: what many tools minimise."""
    log_p, _ = topk.target(temperature)
    log_p = log_p.log_softmax(-1)
    log_q = (logits / temperature).gather(-1, topk.ids).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def degrees(one: Tensor, two: Tensor) -> float:
    """Mean angle between rows."""
    cosine = torch.nn.functional.cosine_similarity(one, two).clamp(-1, 1)
    return float(cosine.arccos().rad2deg().mean())


def main() -> None:
    """Print the angles."""
    params = load_params(Path("params.yaml"))
    corpus = CorpusSplit(params.paths.corpus, "validation")
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=corpus.info.vocab_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tokens = torch.from_numpy(corpus.rows(0, ROWS).tokens)
    teacher_logits = torch.cat([z.clone() for _, z in teacher.logits_by_chunk(tokens)])[::4]
    students = {
        "at the start": build_student(params.student, params.paths.teacher),
        "at the end": load_student(params.paths.runs / "student" / "model"),
    }
    for name, student in students.items():
        with torch.no_grad():
            start = student(tokens).flatten(0, 1)[::4, : corpus.info.vocab_size].float()
        for tau in (1.0, 2.0):
            for k in (16, params.prepare.k):
                topk = top_k_from_logits(teacher_logits.clone(), k, (1.0, 2.0))

                def gradient(loss: object, logits: Tensor = start) -> Tensor:
                    z = logits.clone().requires_grad_()
                    (grad,) = torch.autograd.grad(loss(z).sum(), z)  # type: ignore[operator]
                    return grad

                full = gradient(lambda z, tau=tau: full_kl(teacher_logits, z, tau))
                bucket = gradient(lambda z, t=topk, tau=tau: tail_bucket_kl(z, t, tau))
                cut = gradient(lambda z, t=topk, tau=tau: renormalised_kl(z, t, tau))
                print(
                    f"student {name}, tau {tau:g}, K {k}: tail bucket {degrees(bucket, full):.1f}, "
                    f"renormalised {degrees(cut, full):.1f} degrees from the full gradient"
                )
    values = teacher_logits.topk(params.prepare.k).values
    moved = values[torch.randperm(len(values))]
    cosine = torch.nn.functional.cosine_similarity(values, moved)
    print(f"cosine of sorted top-K logits between unrelated positions: {float(cosine.mean()):.4f}")


if __name__ == "__main__":
    main()
