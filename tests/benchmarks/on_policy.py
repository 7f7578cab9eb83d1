"""On-policy distillation offline: what each way to learn from the same rollouts is worth.

    python tests/benchmarks/on_policy.py [--work FOLDER] [--model FOLDER] [--seeds 1] [--steps 64]

Needs the demo's teacher, corpus, cache and student (`dvc repro train`), which `--model` replaces.
What lies finished in FOLDER, rollouts, cache and runs, is not made again, so it may be stopped and
started.

The student writes rollouts of prompts, which are beginnings of the corpus's documents; the teacher
scores them. Students that all start from that student then take the same steps at the same learning
rate: by reverse KL, forward KL or cross-entropy on the rollouts, and by forward KL on the corpus,
which is what distillation was before. The table has

    text        held-out documents of the corpus: cross-entropy, and KL(teacher || student)
    rollouts    the held-out rollouts of the student that all start from: KL in both directions
    own         fresh rollouts of the held-out prompts by each student itself: KL(student ||
                teacher), which on-policy distillation minimises, and the share that ended

in nats per token, over the whole vocabulary. Prompts may be beginnings of held-out documents; what
follows in these documents is never among the training rollouts.

The lines on gradients say why there is no loss on the sampled token alone: for several numbers of
rollouts, the cosine between the gradient of reverse KL over the whole vocabulary, on all of these
tokens, and two estimates of it on the same tokens: that of `reverse_kl` with the top K and the
bucket, and that of the sampled tokens, log q(y) times log q(y) - log p(y), as in policy gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from quality import spread
from torch import Tensor

from pipeline.capture.local import capture_locally
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.evaluation.compare import compare
from pipeline.evaluation.models import open_models
from pipeline.evaluation.results import Scores
from pipeline.generation.rollout_models import open_rollout_model
from pipeline.generation.rollout_prompts import RolloutPrompts, read_rollout_prompts
from pipeline.generation.rollouts import CORPUS, end_ids, make_rollouts, rollout_uniforms
from pipeline.generation.sampling import GenerationSettings
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.losses.reference import transformed
from pipeline.model.folder import teacher_folder
from pipeline.model.student import Student
from pipeline.model.tokenizer import load_tokenizer
from pipeline.model.weights import open_student
from pipeline.targets.reduce import top_k_from_logits
from pipeline.teacher.engines import teacher_dtype
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.run import run_training

CPU = torch.device("cpu")
START = "the student at its start"
VARIANTS = {  # what differs from one to the other, and whether it learns from the rollouts
    "reverse KL": (["train.divergence=reverse_kl", "train.alpha=1"], True),
    "forward KL": (["train.divergence=forward_kl", "train.alpha=1"], True),
    "cross-entropy": (["train.targets=none"], True),
    "forward KL on text": (["train.divergence=forward_kl", "train.alpha=1"], False),
}

Document = tuple[list[int], int]  # tokens, and how many of them are the prompt


@dataclass(frozen=True)
class Work:
    """What all variants share."""

    params: Params
    folder: Path
    start: Path
    overrides: list[str]

    def of(self, variant: str, seed: int) -> Params:
        """The parameters of one run."""
        sets, on_rollouts = VARIANTS[variant]
        return load_params(
            Path("params.yaml"), [*self.overrides, *(self.rollouts if on_rollouts else []), *sets]
        ).model_copy(update={"seed": seed})

    @property
    def teacher(self) -> Path:
        """The teacher's model folder."""
        return teacher_folder(self.params.paths.teacher)

    @property
    def rollouts(self) -> list[str]:
        """What makes the stages work on the rollouts."""
        corpus = self.folder / "rollouts" / CORPUS
        return [f"paths.corpus={corpus}", f"paths.logits={self.folder / 'logits.zarr'}"]

    def model(self, variant: str, seed: int) -> Path:
        """The folder of a trained student."""
        return self.folder / "runs" / run_name(variant, seed) / "model"


def run_name(variant: str, seed: int) -> str:
    return f"{variant.replace(' ', '-')}-{seed}"


def log_probs(model: Student, document: Document, num_ids: int) -> Tensor:
    """Log-probabilities of the next token at the positions before each sampled one, [n, V]."""
    tokens, prompt = document
    hidden = model.hidden_states(torch.tensor([tokens]))[0, prompt - 1 : -1]
    logits = transformed(hidden @ model.head_weight.T, model.logit_transform)
    return logits[:, :num_ids].log_softmax(-1)


@torch.no_grad()
def divergences(
    student: Student, teacher: Student, documents: Sequence[Document], num_ids: int
) -> tuple[float, float]:
    """Mean KL(teacher || student) and KL(student || teacher) over the sampled tokens."""
    forward, reverse, count = 0.0, 0.0, 0
    for document in documents:
        log_q, log_p = (log_probs(model, document, num_ids) for model in (student, teacher))
        forward += float((log_p.exp() * (log_p - log_q)).sum())
        reverse += float((log_q.exp() * (log_q - log_p)).sum())
        count += len(log_q)
    return forward / count, reverse / count


def continue_prompts(
    work: Work, folder: Path, prompts: Sequence[list[int]], *, seed: int, num_ids: int
) -> tuple[list[Document], float]:
    """Rollouts of a model, and the share of them that ended."""
    chosen = work.params.rollouts
    ends = end_ids(folder, load_tokenizer(work.teacher), num_ids)
    settings = GenerationSettings(
        max_new_tokens=chosen.max_new_tokens, temperature=1.0, eos_ids=ends, num_ids=num_ids
    )
    model = open_rollout_model(folder, torch.float32, CPU, dequantize=False)
    found: list[Document] = []
    for first in range(0, len(prompts), chosen.batch_rows):
        batch = prompts[first : first + chosen.batch_rows]
        requests = [(first + n, 0) for n in range(len(batch))]
        new = model(batch, settings, rollout_uniforms(requests, chosen.max_new_tokens, seed))
        found += [([*old, *ids], len(old)) for old, ids in zip(batch, new, strict=True)]
    ended = sum(tokens[-1] in ends for tokens, _ in found)
    return found, ended / len(found)


def flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def compare_gradients(
    student: Student, teacher: Student, documents: Sequence[Document], num_ids: int, k: int
) -> list[tuple[int, int, float, float]]:
    """For growing numbers of rollouts: rollouts, tokens, cosine of top K, of sampled tokens."""
    weights = list(student.parameters())
    sums = [torch.zeros(sum(w.numel() for w in weights)) for _ in range(3)]
    found, tokens = [], 0
    for number, document in enumerate(documents, 1):
        ids, prompt = document
        new = torch.tensor(ids[prompt:])
        log_q = log_probs(student, document, num_ids)
        with torch.no_grad():
            log_p = log_probs(teacher, document, num_ids)
        full = (log_q.exp() * (log_q - log_p)).sum()
        at_new = log_q.gather(1, new[:, None])
        advantage = (log_p.gather(1, new[:, None]) - at_new).detach()
        sampled = -(advantage * at_new).sum()
        topk = top_k_from_logits(log_p, k, ())
        bucket = distillation_loss_sums(
            student.hidden_states(torch.tensor([ids]))[0, prompt - 1 : -1],
            student.head_weight,
            new,
            topk,
            alpha=1.0,
            temperature=1.0,
            divergence="reverse_kl",
            transform=student.logit_transform,
        ).total
        for total, loss in zip(sums, (full, bucket, sampled), strict=True):
            grads = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            total += flat(grads)
        tokens += len(new)
        if number & (number - 1) == 0 or number == len(documents):
            near, far = (
                float(torch.cosine_similarity(sums[0], other, dim=0)) for other in sums[1:]
            )
            found.append((number, tokens, near, far))
    return found


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("cache/on-policy-benchmark"))
@click.option("--model", type=click.Path(path_type=Path), help="[default: the run student]")
@click.option("--seeds", default=1)
@click.option("--steps", default=64)
@click.option("--learning-rate", default=1e-4)
@click.option("--prompts", default=192)
@click.option("--prompt-tokens", default=64)
@click.option("--new-tokens", default=128)
@click.option("--gradient-rollouts", default=32)
def main(
    work: Path,
    model: Path | None,
    seeds: int,
    steps: int,
    learning_rate: float,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    gradient_rollouts: int,
) -> None:
    """Write rollouts, capture, train every variant, print the lines on gradients and the table."""
    params = load_params(Path("params.yaml"))
    start = model or params.paths.runs / "student" / "model"
    values = params.model_dump(mode="json")
    of_corpus = {name: values["corpus"][name] for name in ("source", "files", "hub")}
    values["rollouts"] |= of_corpus | {
        "num_prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": new_tokens,
        "row_length": values["corpus"]["row_length"],
        "dtype": "float32",
    }
    values["paths"]["rollouts"] = str(work / "rollouts")
    params = Params.model_validate(values)
    overrides = [
        f"paths.runs={work / 'runs'}",
        "student.init=checkpoint",
        f"student.checkpoint={start}",
        f"train.steps={steps}",
        "train.epochs=null",
        "train.temperature=1",
        f"train.learning_rate={learning_rate}",
        f"train.min_learning_rate={learning_rate / 10}",
        f"train.warmup_steps={min(6, steps)}",
        "train.eval_every=100000",  # at the end alone
    ]
    here = Work(params, work, start, overrides)
    make_rollouts(params, start, dtype=torch.float32, device=CPU)
    capture_locally(here.of("reverse KL", 0))
    for seed in range(seeds):
        for variant in VARIANTS:
            run_training(here.of(variant, seed), run_name(variant, seed))
    corpus = CorpusSplit(params.paths.corpus, "validation")
    num_ids = corpus.info.vocab_size
    tokenizer = load_tokenizer(here.teacher)
    found = read_rollout_prompts(params.rollouts, tokenizer, params.rollouts.row_length)
    show_gradients(here, found, gradient_rollouts, num_ids)
    show_table(here, found, corpus, seeds, num_ids)


def show_gradients(work: Work, prompts: RolloutPrompts, number: int, num_ids: int) -> None:
    """Fresh rollouts of the student at its start, and the two estimates on them."""
    some = prompts.ids[:number]
    documents, _ = continue_prompts(work, work.start, some, seed=1, num_ids=num_ids)
    student, teacher = (open_student(f).eval() for f in (work.start, work.teacher))
    k = work.params.prepare.k
    lines = compare_gradients(student, teacher, documents, num_ids, k)
    print("cosine with the gradient of reverse KL over the whole vocabulary")
    for count, tokens, near, far in lines:
        print(
            f"  {count:4} rollouts, {tokens:6,} tokens: top {k} and bucket {near:.4f}, "
            f"sampled tokens {far:.4f}"
        )


def show_table(
    work: Work, prompts: RolloutPrompts, corpus: CorpusSplit, seeds: int, num_ids: int
) -> None:
    """Every student against the teacher; means over seeds with standard deviations."""
    params = work.params
    folders = {START: [work.start]} | {
        variant: [work.model(variant, seed) for seed in range(seeds)] for variant in VARIANTS
    }
    held_out = [
        ids for ids, split in zip(prompts.ids, prompts.splits, strict=True) if split != "train"
    ]
    by_start, _ = continue_prompts(work, work.start, held_out, seed=params.seed, num_ids=num_ids)
    teacher = open_student(work.teacher).eval()
    print(
        "| | text: loss | text: KL(p, q) | rollouts: KL(p, q) | rollouts: KL(q, p) "
        "| own: KL(q, p) | own: ended |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    on_text = judge_on_text(params, folders, corpus)
    for name, models in folders.items():
        of_start, own = [], []
        for folder in models:
            student = open_student(folder).eval()
            of_start.append(divergences(student, teacher, by_start, num_ids))
            documents, ended = continue_prompts(work, folder, held_out, seed=2, num_ids=num_ids)
            own.append((divergences(student, teacher, documents, num_ids)[1], ended))
        scores = on_text[name]
        print(
            f"| {name} | {spread([s.loss for s in scores], 4)} "
            f"| {spread([s.kl_to_teacher for s in scores], 4)} "
            f"| {spread([forward for forward, _ in of_start], 4)} "
            f"| {spread([reverse for _, reverse in of_start], 4)} "
            f"| {spread([reverse for reverse, _ in own], 4)} "
            f"| {statistics.mean(ended for _, ended in own):.0%} |",
            flush=True,
        )


def judge_on_text(
    params: Params, folders: dict[str, list[Path]], corpus: CorpusSplit
) -> dict[str, list[Scores]]:
    """Every student on the held-out documents, by the stage `evaluate`'s own code."""
    folder = teacher_folder(params.paths.teacher)
    teacher = HuggingFaceTeacher(
        folder,
        vocab_size=corpus.info.vocab_size,
        dtype=teacher_dtype(params, CPU),
        device=CPU,
    )
    named = {f"{name} {n}": f for name, models in folders.items() for n, f in enumerate(models)}
    models = open_models(
        named, corpus, folder, dtypes=dict.fromkeys(named, teacher.dtype), device=CPU
    )
    found = compare(teacher, models, corpus, params.evaluate, params.prepare.document_mask).scores
    return {
        name: [found[f"{name} {n}"] for n in range(len(models))] for name, models in folders.items()
    }


if __name__ == "__main__":
    main()
