"""The work of stages/evaluate.py: judge a set of models and write the results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.vocabulary import require_tokenizer
from pipeline.evaluation.compare import Comparison, compare
from pipeline.evaluation.harness import Harness
from pipeline.evaluation.models import open_models
from pipeline.evaluation.passage import view_passage
from pipeline.evaluation.results import TEACHER, HarnessResults, ModelScores, Samples
from pipeline.evaluation.samples import Run, sample
from pipeline.evaluation.tables import harness_lines
from pipeline.io.files import write_json, write_text
from pipeline.model.folder import hash_weights
from pipeline.model.model_dtype import model_dtype
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.batch_sizes import compared_at_once, gpu_memory
from pipeline.runtime.console import say
from pipeline.runtime.device import inference_dtype
from pipeline.teacher.engines import open_teacher
from pipeline.teacher.sharded import led_ranks


def choose_dtypes(
    params: Params, folders: Mapping[str, Path], device: torch.device
) -> dict[str, torch.dtype]:
    """Return the dtype of each model: evaluate.dtype, or for `auto` on a GPU a dtype of its own.

    That is the dtype of the capture for the teacher, and that of its training for a run's model.

    Args:
        folders: model folders by name, including the teacher's.

    Raises:
        ParamsError: bfloat16 is requested on a GPU without bfloat16 units.
    """
    key = "evaluate.dtype"
    wanted = params.evaluate.dtype
    dtypes = {
        name: model_dtype(wanted, folder, device, key=key) for name, folder in folders.items()
    }
    if wanted == "auto" and device.type == "cuda":
        dtypes[TEACHER] = inference_dtype(
            params.prepare.dtype, device, key="prepare.dtype", remedy=f"set {key}=float32"
        )
    return dtypes


def judge(
    params: Params,
    folders: Mapping[str, Path],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> Comparison:
    """Compare models with the teacher, view a passage, sample texts, and write all results.

    Args:
        folders: model folders by name, including the teacher's.
        dtypes: the dtype of each, as `choose_dtypes` returns them.
    """
    corpus = CorpusSplit(params.paths.corpus, "validation")
    require_tokenizer(folders[TEACHER], corpus)
    others = {name: folder for name, folder in folders.items() if name != TEACHER}
    # The teacher first, since vLLM takes its share of a GPU's memory when it starts.
    num_ids = corpus.info.vocab_size
    head_chunk = compared_at_once(num_ids, gpu_memory(device))
    teacher = open_teacher(params, num_ids, dtypes[TEACHER], device, head_chunk=head_chunk)
    models = open_models(others, corpus, folders[TEACHER], dtypes=dtypes, device=device)
    comparison = compare(teacher, models, corpus, params.evaluate, params.prepare.document_mask)
    tokenizer = load_tokenizer(folders[TEACHER])
    length = params.evaluate.passage_tokens
    passage = view_passage(teacher, models, corpus, tokenizer, length)
    del teacher, models  # sampling loads its own models and may need the memory
    continuations = {
        name: sample(
            folder,
            params.evaluate.prompts,
            params.evaluate.max_new_tokens,
            Run(dtypes[name], device, dequantize=name == TEACHER and params.prepare.dequantize),
        )
        for name, folder in _opened_whole(folders, params, "writes no sample texts").items()
    }
    metrics = {
        name: ModelScores(
            **vars(scores),
            parameters=comparison.parameters[name],
            model_sha256=hash_weights(folders[name]),
        )
        for name, scores in comparison.scores.items()
    }
    samples = Samples(list(params.evaluate.prompts), continuations)
    target = params.paths.evaluate
    write_json(target / "metrics.json", metrics)
    write_json(target / "calibration.json", comparison.calibration)
    write_json(target / "samples.json", samples)
    write_text(target / "passage.json", json.dumps(asdict(passage), ensure_ascii=False) + "\n")
    return comparison


def _opened_whole(folders: Mapping[str, Path], params: Params, what: str) -> dict[str, Path]:
    """Return the models that transformers can open in this process: not a divided teacher.

    Args:
        what: what the teacher is left out of, for the message.
    """
    if led_ranks() is None and params.prepare.engine == "transformers":
        return dict(folders)
    say(f"evaluate: the teacher {what}, since it is not whole in this process")
    return {name: folder for name, folder in folders.items() if name != TEACHER}


def run_harness(
    harness: Harness,
    params: Params,
    folders: Mapping[str, Path],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> None:
    """Run the harness on each model; write and show each model's results as soon as it is done."""
    results: dict[str, HarnessResults] = {}
    here = _opened_whole(folders, params, "is left out of lm-evaluation-harness")
    for name, folder in here.items():
        results[name] = harness.run(
            folder,
            dtype=dtypes[name],
            device=device,
            batch_rows=params.evaluate.batch_rows,
            dequantize=name == TEACHER and params.prepare.dequantize,
        )
        write_json(params.paths.evaluate / "lm_eval.json", results)
        for line in harness_lines(name, results[name]):
            say(line)
