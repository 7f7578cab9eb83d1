"""A teacher shared by two ranks, over gloo: the numbers of one process, whatever happens to one."""

from __future__ import annotations

import json
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from pipeline.config.params import Params
from pipeline.errors import DecantError, ParamsError
from pipeline.runtime.launch import launch
from pipeline.runtime.ranks import ALONE
from pipeline.teacher import sharded
from pipeline.teacher.sharded import ShardedTeacher, choose_parallel, follow, lead, led_ranks
from pipeline.teacher.transformers import HuggingFaceTeacher
from tests.helpers import change, gate, open_cache
from tests.training.ranks import run_ranks, run_stage, start_ranks
from tests.waiting import PATIENCE, wait_until

V = 101
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}
WAYS = [("llama", "tensor"), ("llama", "fsdp"), ("qwen3_moe", "tensor"), ("qwen3_moe", "fsdp")]
WAYS += [("gpt2", "fsdp")]


def save_model(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(folder)
    return folder


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, which two ranks cannot share equally, of three documents each."""
    tokens = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([0] * 5 + [1] * 12 + [2] * 7).expand(3, -1)


def states_of(folder: Path, name: str, parallel: str) -> None:
    """Compute the rows' states and logits with two ranks; rank 0 saves them."""
    here = launch()
    if here is not None and here.rank:
        follow("cpu")
        return
    with lead("cpu"):
        group = led_ranks()
        assert group is not None
        teacher = ShardedTeacher(
            group, folder / name, vocab_size=V, dtype=torch.float32, head_chunk=7, parallel=parallel
        )
        tokens, doc_ids = rows()
        logits = [part.clone() for _, part in teacher.logits_by_chunk(tokens, doc_ids)]
        torch.save((teacher.hidden_states(tokens), torch.cat(logits)), folder / "states.pt")


@pytest.mark.parametrize(("name", "parallel"), WAYS)
def test_two_ranks_compute_what_one_process_computes(
    name: str, parallel: str, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    save_model(tmp_path / name, name)
    run_ranks(forkserver, 2, states_of, tmp_path, name, parallel)
    states, logits = torch.load(tmp_path / "states.pt", weights_only=True)
    alone = HuggingFaceTeacher(
        tmp_path / name, vocab_size=V, dtype=torch.float32, device=torch.device("cpu")
    )
    tokens, doc_ids = rows()
    torch.testing.assert_close(states, alone.hidden_states(tokens), atol=1e-5, rtol=1e-5)
    wanted = torch.cat([part.clone() for _, part in alone.logits_by_chunk(tokens, doc_ids)])
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


def run_on_two(
    context: ForkServerContext, log: Path, stage: str, *words: str
) -> tuple[list[int | None], str]:
    """Run a stage on two ranks; return their exit statuses, and what they printed."""
    with start_ranks(context, 2, run_stage, stage, log, *words) as processes:
        for process in processes:
            process.join(PATIENCE)
        statuses = [process.exitcode for process in processes]
    return statuses, "".join((log / str(rank)).read_text() for rank in range(2))


@pytest.mark.parametrize("parallel", ["tensor", "fsdp"])
def test_a_cache_from_two_ranks_passes_the_gate_of_one_process(
    parallel: str, tiny_corpus: Params, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    words = ["--params", str(tmp_path / "params.yaml"), "--set", f"prepare.parallel={parallel}"]
    statuses, printed = run_on_two(forkserver, tmp_path / "prepare", "prepare", *words)
    assert statuses == [0, 0], printed
    assert f"on 2 processes ({parallel}, cpu)" in printed
    assert printed.count("tokens captured in") == 1  # only rank 0 speaks
    engine = open_cache(tiny_corpus).fingerprint.engine
    assert engine == ("transformers, tensor parallel 2" if parallel == "tensor" else "transformers")
    report = gate(tiny_corpus)
    assert report.passed, report.failures
    models = ["--model", f"itself={tiny_corpus.paths.teacher}"]
    for stage, more in (("verify", []), ("evaluate", models), ("advise", [])):
        statuses, printed = run_on_two(forkserver, tmp_path / stage, stage, *words, *more)
        assert statuses == [0, 0], printed
        if stage == "evaluate":
            assert "the teacher writes no sample texts, since it is not whole" in printed


SMALL_SHARDS = ("prepare.chunk_rows=1", "prepare.shard_rows=1", "capture.batch_rows=1")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_capture_and_the_same_command_continues(
    victim: int, tiny_corpus: Params, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    words = ["--params", str(tmp_path / "params.yaml")]
    for setting in (*SMALL_SHARDS, "prepare.parallel=tensor"):
        words += ["--set", setting]
    commits, log = Path(str(tiny_corpus.paths.logits)) / "train/commits", tmp_path / "killed"
    with start_ranks(forkserver, 2, run_stage, "prepare", log, *words) as processes:
        wait_until(lambda: any(commits.glob("*")))
        processes[victim].kill()
        processes[1 - victim].join(PATIENCE)
        assert processes[1 - victim].exitcode == 1
    printed = (log / str(1 - victim)).read_text()
    assert f"error: rank {1 - victim}: the connection to another rank broke" in printed
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    statuses, printed = run_on_two(forkserver, tmp_path / "again", "prepare", *words)
    assert statuses == [0, 0], printed
    again = open_cache(tiny_corpus)
    words += ["--set", f"paths.logits={tmp_path / 'whole.zarr'}"]
    statuses, printed = run_on_two(forkserver, tmp_path / "whole", "prepare", *words)
    assert statuses == [0, 0], printed
    whole = open_cache(change(tiny_corpus, paths={"logits": str(tmp_path / "whole.zarr")}))
    every = np.arange(len(again.corpus))
    for name, values in vars(again.top_k(every)).items():
        torch.testing.assert_close(values, getattr(whole.top_k(every), name), rtol=0, atol=0)


def test_heads_that_do_not_divide_are_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    with pytest.raises(ParamsError, match="among 4 processes, since num_key_value_heads=2 does"):
        choose_parallel(tmp_path, "tensor", 4)
    assert choose_parallel(tmp_path, "auto", 4) == "fsdp"
    assert choose_parallel(tmp_path, "auto", 2) == "tensor"


def test_an_architecture_without_a_plan_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    with pytest.raises(ParamsError, match="no tensor-parallel plan for a 'gpt2' model"):
        choose_parallel(tmp_path, "tensor", 2)
    assert choose_parallel(tmp_path, "auto", 2) == "fsdp"


def test_quantised_weights_are_not_divided(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for wanted in ("auto", "tensor", "fsdp"):
        with pytest.raises(ParamsError, match=r"is quantised \(fp8\), and its weights are not"):
            choose_parallel(tmp_path, wanted, 2)


def test_an_error_of_rank_0_is_the_only_one(
    tiny_corpus: Params, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    for words, sentence in (
        (("--set", "prepare.k=1000"), "prepare.k=1000 exceeds"),
        (("--executor", "ray"), "--executor ray starts processes of its own, and torchrun started"),
    ):
        words = ("--params", str(tmp_path / "params.yaml"), *words)
        statuses, printed = run_on_two(forkserver, tmp_path / "log", "prepare", *words)
        assert statuses == [2, 2]
        assert printed.count("error: ") == 1
        assert sentence in printed


def test_every_rank_names_what_a_model_lacks(
    tiny_corpus: Params, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    folder = shutil.copytree(tiny_corpus.paths.teacher, tmp_path / "damaged")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    words = ["--params", str(tmp_path / "params.yaml"), "--set", f"paths.teacher={folder}"]
    statuses, printed = run_on_two(forkserver, tmp_path / "log", "prepare", *words)
    assert statuses == [1, 1], printed
    for rank in range(2):  # none blames the connection
        assert f"error: rank {rank}: {folder} lacks 1 tensors, for example model.norm" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("step", ["load_causal_lm", "require_own_logits"])
def test_a_rank_that_goes_away_is_not_the_models_fault(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DecantError("not a usable model") from RuntimeError("gloo: Connection closed by peer")

    save_model(tmp_path, "llama")
    load = sharded.load_causal_lm
    monkeypatch.setattr(
        sharded, "load_causal_lm", lambda *a, distributed_config, **o: load(*a, **o)
    )
    monkeypatch.setattr(sharded, step, fail)
    request = sharded._Open(folder=tmp_path, dtype=torch.float32, vocab_size=V, parallel="tensor")
    with pytest.raises(RuntimeError, match="Connection closed"):
        sharded._Part(request, ALONE)
