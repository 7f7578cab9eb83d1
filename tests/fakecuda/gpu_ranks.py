"""Two ranks on two GPUs of the stand-in. Gradients go over gloo, which stands for NCCL.

ddp has the losses of a CPU. Of fsdp only devices and control flow are checked, since the stand-in
does not compute all that FSDP2 does between its hooks.
"""

from __future__ import annotations

import os
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config.params import Params
from pipeline.training.run import run_training
from tests.fakecuda import stand_in
from tests.helpers import change, losses
from tests.training.ranks import run_ranks

SHORT = {"steps": 3, "batch_rows": 2, "eval_every": 3, "eval_rows": 2}


def train_on_own_gpu(params: Params, name: str) -> None:
    os.environ["FAKECUDA_DEVICES"] = "2"
    stand_in.install()
    join = dist.init_process_group

    def join_over_gloo(_: str, **options: Any) -> None:
        join("cpu:gloo,cuda:gloo", **options)

    dist.init_process_group = join_over_gloo
    with stand_in.Values():
        run_training(params, name)
    assert torch.cuda.current_device() == int(os.environ["LOCAL_RANK"])


@pytest.mark.skipif("FAKECUDA_CAPABILITY" not in os.environ, reason="for the stand-in")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train_one_student(
    parallel: str, forkserver: ForkServerContext, tiny_cache: Params
) -> None:
    params = change(tiny_cache, train=SHORT, run={"parallel": parallel})
    run_training(params, "cpu")
    on_gpus = Params.model_validate(params.model_dump(mode="json") | {"device": "cuda"})
    run_ranks(forkserver, 2, train_on_own_gpu, on_gpus, "gpus")
    expected, found = (losses(params.paths.runs / name) for name in ("cpu", "gpus"))
    assert found.keys() == expected.keys()
    for name, (steps, values) in found.items():
        assert steps == expected[name][0]
        if parallel == "ddp":
            assert values == pytest.approx(expected[name][1], rel=2e-3, abs=2e-4), name
