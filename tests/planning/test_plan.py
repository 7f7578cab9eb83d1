"""The plan: stage times worked by hand, sizes against a real cache, advice in sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from click.testing import CliRunner

from pipeline.config.cache_params import DeviceName
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import ParamsError
from pipeline.planning.cache_size import Mode, bytes_a_token
from pipeline.planning.costs import capture_memory, with_sizes
from pipeline.planning.devices import DEVICES
from pipeline.planning.plan import make_plan
from pipeline.planning.plan_text import advice, plan_lines
from stages.advise import main
from tests.helpers import change, gate, live_teacher

BIG = {
    "corpus": {"train_tokens": 10_000_000, "validation_tokens": 100_000, "row_length": 1000},
    "advise": {"device": "t4", "mfu": 0.5},
    "prepare": {"k": 64, "dtype": "float16", "chunk_rows": 8, "shard_rows": 800},
    "train": {"steps": 500, "batch_rows": 10, "eval_every": 100, "eval_rows": 50},
}


def big(tiny_params: Params, tmp_path: Path, **sections: dict[str, object]) -> Params:
    """SmolLM2-135M on a T4, of which nothing is here."""
    params = change(tiny_params, teacher={"source": "wheel"}, paths={"teacher": str(tmp_path)})
    for changes in (BIG, sections):
        params = change(params, **changes)  # type: ignore[arg-type]
    return params


def test_stage_times_worked_by_hand(tiny_params: Params, tmp_path: Path) -> None:
    plan = make_plan(big(tiny_params, tmp_path, student={"init": "layers", "layers": [0, 1, 2]}))
    a_layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    head = 576 * 49_152
    teacher = 2 * (30 * a_layer + head) + 4 * 30 * 576 * 1000
    student = 2 * (3 * a_layer + head) + 4 * 3 * 576 * 1000
    assert plan.rates.teacher == pytest.approx(0.5 * 65e12 / teacher)
    assert plan.rates.train == pytest.approx(0.5 * 8.1e12 / (3 * student))
    assert plan.extent.tokens == 10_100_000
    assert plan.extent.epochs_per_run == 0.5
    assert plan.stage("prepare").seconds == pytest.approx(10.1e6 * teacher / (0.5 * 65e12))
    validated = 6 * 50 * 1000  # at step 0 and five times after
    run = (5e6 * 3 * student + validated * student) / (0.5 * 8.1e12)
    assert plan.stage("train").seconds == pytest.approx(run)
    assert plan.stage("baseline").seconds == pytest.approx(run)
    assert plan.seconds == pytest.approx(sum(stage.seconds or 0 for stage in plan.stages))
    params = big(
        tiny_params,
        tmp_path,
        student={"init": "layers", "layers": [0, 1, 2]},
        train={"targets": "online"},
    )
    online = make_plan(params)
    more = (online.stage("train").seconds or 0) - (plan.stage("train").seconds or 0)
    assert more == pytest.approx((5e6 + validated) / plan.rates.teacher)
    taught = with_sizes(params, batch_rows=params.train.batch_rows)
    beside = capture_memory(online.teacher_shape, taught, online.teacher_dtype).total
    assert online.stage("train").memory == (plan.stage("train").memory or 0) + beside


@pytest.mark.parametrize(
    ("device", "teacher", "student"),
    [
        ("cpu", "bfloat16", "bfloat16"),
        ("cpu-avx2", "float32", "float32"),
        ("t4", "float16", "float16"),
        ("a100-40gb", "float16", "bfloat16"),
    ],
)
def test_auto_is_what_the_planned_device_computes_fastest(
    device: str, teacher: str, student: str, tiny_params: Params, tmp_path: Path
) -> None:
    auto = {"prepare": {"dtype": "auto"}, "train": {"dtype": "auto"}, "advise": {"device": device}}
    params = big(tiny_params, tmp_path, **auto)
    plan = make_plan(params)
    assert (plan.teacher_dtype, plan.student_dtype) == (teacher, student)
    assert f"in {student}" in " ".join(plan_lines(plan, params))
    asked = {"prepare": {"dtype": teacher}, "train": {"dtype": student}}
    assert make_plan(big(tiny_params, tmp_path, **(auto | asked))).seconds == plan.seconds


def test_evaluate_counts_on_its_own_format(tiny_params: Params, tmp_path: Path) -> None:
    """Worked by hand for a T4, whose float16 is 65 / 8.1 times as fast as its float32."""
    half, single, auto = (
        make_plan(big(tiny_params, tmp_path, evaluate={"dtype": name}, train={"dtype": "float16"}))
        .stage("evaluate")
        .seconds
        for name in ("float16", "float32", "auto")
    )
    assert half is not None
    assert single is not None
    assert single / half == pytest.approx(65 / 8.1)
    assert auto == half
    plan = make_plan(big(tiny_params, tmp_path, evaluate={"dtype": "float32"}))
    teacher, student = plan.teacher_shape, plan.student_shape
    operations = teacher.forward_operations(1000) + 2 * student.forward_operations(1000)
    assert single == pytest.approx(100_000 * operations / (0.5 * 8.1e12))
    models = {"prepare": {"dtype": "float16"}, "train": {"dtype": "float32"}}
    apart = make_plan(big(tiny_params, tmp_path, evaluate={"dtype": "auto"}, **models))
    assert apart.evaluate_dtypes == ("float16", "float32")  # as captured, as trained
    operations = teacher.forward_operations(1000) / 65 + 2 * student.forward_operations(1000) / 8.1
    seconds = apart.stage("evaluate").seconds
    assert seconds == pytest.approx(100_000 * operations / (0.5 * 1e12))


def test_verify_counts_what_the_gate_computes(tiny_cache: Params) -> None:
    """Rows that a gate really runs through its teacher, the noise floor's three times more."""
    counted = 0
    teacher = live_teacher(tiny_cache)
    original = teacher.logits_by_chunk

    def counting(tokens: torch.Tensor, *rest: torch.Tensor | None) -> object:
        nonlocal counted
        counted += len(tokens)
        return original(tokens, *rest)

    teacher.logits_by_chunk = counting  # type: ignore[method-assign, assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.verify.gate._announce", lambda *_: None)
        gate(tiny_cache, teacher)
    plan = make_plan(tiny_cache)
    seconds = plan.stage("verify").seconds
    assert seconds is not None
    assert seconds * plan.rates.checked == pytest.approx(32 * counted)


def test_recomputed_blocks_take_longer(tiny_params: Params, tmp_path: Path) -> None:
    plain, again = (
        make_plan(
            big(
                tiny_params,
                tmp_path,
                student={"init": "layers", "layers": list(range(30))},
                run={"activation_checkpointing": value},
            )
        )
        for value in (False, True)
    )
    ratio = (again.stage("train").seconds or 0) / (plain.stage("train").seconds or 1)
    assert 1.1 < ratio < 4 / 3


def test_epochs_are_planned_as_their_steps(tiny_params: Params, tmp_path: Path) -> None:
    steps = make_plan(big(tiny_params, tmp_path, train={"steps": 3000}))
    params = big(tiny_params, tmp_path, train={"steps": None, "epochs": 3})
    epochs = make_plan(params)
    assert epochs.steps == 3000
    assert epochs.stages == steps.stages
    assert "a run of 3,000 steps of 10,000 tokens" in " ".join(plan_lines(epochs, params))


def test_rows_of_a_random_student_are_guessed_aloud(tiny_params: Params, tmp_path: Path) -> None:
    """Without a tokenizer at hand; with one they are counted."""
    student = {"init": "random"}
    guessed = make_plan(big(tiny_params, tmp_path, student=student))
    assert guessed.student_shape.vocab_size == 49_152
    words = "a vocabulary of the teacher's 49,152 rows assumed for student.vocab_size=auto"
    assert words in guessed.student
    assert "assumed" not in make_plan(big(tiny_params, tmp_path)).student  # layers of the teacher
    given = make_plan(big(tiny_params, tmp_path, student=student | {"vocab_size": 1000}))
    assert given.student == "random weights"
    counted = make_plan(change(tiny_params, student=student))
    assert (counted.student, counted.student_shape.vocab_size) == ("random weights", 320)


def test_more_devices_share_the_work(tiny_params: Params, tmp_path: Path) -> None:
    one = make_plan(big(tiny_params, tmp_path))
    four = make_plan(big(tiny_params, tmp_path, advise={"devices": 4}))
    for name in ("prepare", "train", "baseline"):
        assert four.stage(name).seconds == pytest.approx((one.stage(name).seconds or 0) / 4)
    for name in ("corpus", "verify", "evaluate"):  # one process
        assert four.stage(name).seconds == pytest.approx(one.stage(name).seconds or 0)
    assert four.break_even == one.break_even


@pytest.mark.parametrize(
    ("mode", "size", "at_three_temperatures"),
    [
        (Mode(k=64), 144.1, 148.1),
        (Mode(k=16), 43.7, 47.7),
        (Mode(k=256), 523.0, 526.9),
        (Mode(k=0, num_sampled=50), 27.4, 52.8),
        (Mode(k=0, num_sampled=25), 18.4, 35.7),
        (Mode(k=32, num_sampled=16), 101.8, 127.3),
        (Mode(k=16, num_sampled=16), 66.6, 91.5),
        (Mode(k=64, num_sampled=16), 167.7, 193.3),
    ],
)
def test_sizes_come_to_what_was_measured(
    mode: Mode, size: float, at_three_temperatures: float
) -> None:
    """The figures of docs/benchmarks.md, of the demo's teacher and corpus."""
    assert bytes_a_token(mode, 49_152) == pytest.approx(size, rel=0.01)
    assert bytes_a_token(mode, 49_152, (1.0,)) == bytes_a_token(mode, 49_152)
    three = bytes_a_token(mode, 49_152, (1.0, 2.0, 4.0))
    assert three == pytest.approx(at_three_temperatures, rel=0.01)
    assert bytes_a_token(mode, 151_936) >= bytes_a_token(mode, 49_152)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        (Mode(k=16, top_p=0.95), 31.2),
        (Mode(k=32, top_p=0.95), 50.7),
        (Mode(k=64, top_p=0.9), 68.9),
        (Mode(k=64, top_p=0.95), 83.4),
        (Mode(k=64, top_p=0.99), 107.5),
        (Mode(k=128, top_p=0.95), 138.9),
        (Mode(k=256, top_p=0.9), 163.4),
        (Mode(k=64, entropy_quantile=0.5), 74.4),
        (Mode(k=256, entropy_quantile=0.75), 134.1),
        (Mode(k=0, num_sampled=50, entropy_quantile=0.5), 21.45),
        (Mode(k=0, num_sampled=50, entropy_quantile=0.8), 11.57),
        (Mode(k=32, num_sampled=16, entropy_quantile=0.8), 21.61),
    ],
)
def test_sizes_of_cuts_come_to_what_was_measured(mode: Mode, size: float) -> None:
    assert bytes_a_token(mode, 49_152) == pytest.approx(size, rel=0.08)


def test_sizes_rise_with_all_that_is_kept() -> None:
    def sizes(*modes: Mode) -> list[float]:
        return [bytes_a_token(mode, 49_152, (2.0,)) for mode in modes]

    for rising in (
        sizes(*(Mode(k=k) for k in (1, 8, 40, 64, 256, 300, 1000))),
        sizes(*(Mode(k=64, top_p=p) for p in (0.01, 0.5, 0.9, 0.99, 1.0))),
        sizes(*(Mode(k=0, num_sampled=m) for m in (1, 10, 50, 200, 400))),
        sizes(*(Mode(k=32, num_sampled=m) for m in (0, 1, 16, 64))),
        sizes(*(Mode(k=64, entropy_quantile=q) for q in (0.9, 0.5, 0.2, 0.0))),
    ):
        assert rising == sorted(set(rising))
    assert sizes(Mode(k=64, top_p=1.0)) == sizes(Mode(k=64))


def test_prompts_cost_neither_head_nor_bytes(tiny_corpus: Params) -> None:
    """The plan takes the share of tokens in the loss from the corpus, if there is one."""
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    share = corpus.info.num_in_loss / corpus.info.num_positions
    here = make_plan(tiny_corpus)
    assert here.extent.share_in_loss == share < 1.0
    elsewhere = change(tiny_corpus, paths={"corpus": str(tiny_corpus.paths.corpus) + ".none"})
    whole = make_plan(elsewhere)
    assert whole.extent.share_in_loss == 1.0
    assert here.cache.total == pytest.approx(share * whole.cache.total)
    body = here.teacher_shape.body_operations(32)
    head = 2.0 * here.teacher_shape.head
    assert here.rates.teacher / whole.rates.teacher == pytest.approx(
        (body + head) / (body + share * head)
    )
    assert here.rates.train == whole.rates.train
    text = " ".join(" ".join(plan_lines(here, tiny_corpus)).split())
    assert f"; {share:.1%} of its tokens are in the loss, and the others take no" in text
    assert "in the loss" not in " ".join(plan_lines(whole, elsewhere))
    chats = change(elsewhere, corpus={"loss_on": "completions"})
    said = " ".join(" ".join(plan_lines(make_plan(chats), chats)).split())
    assert "all tokens are assumed to be in the loss, until stages/corpus.py has counted" in said


def test_the_mode_of_prepare_is_planned(tiny_params: Params, tmp_path: Path) -> None:
    prepare = {"k": 64, "top_p": 0.95, "num_sampled": 16, "positions": "high_entropy"}
    plan = make_plan(big(tiny_params, tmp_path, prepare=prepare))
    assert plan.cache.mode == Mode(k=64, num_sampled=16, top_p=0.95, entropy_quantile=0.5)
    assert plan.cache.mode.name == "top 64 + 16 sampled ids, top_p=0.95, high_entropy 0.5"
    assert plan.cache.total < make_plan(big(tiny_params, tmp_path)).cache.total


def test_temperatures_that_no_run_reads(tiny_params: Params, tmp_path: Path) -> None:
    hot = {"temperatures": [1.0, 2.0, 4.0]}
    text = sentences(tiny_params, tmp_path, prepare=hot, train={"temperature": 1.0})
    assert (
        "train.temperature=1 needs no other temperature: prepare.temperatures=[1.0] takes 4.0 "
        "bytes per token less with the top 64, 25.5 less with 50 sampled ids"
    ) in text
    for sections in (
        {"prepare": hot, "train": {"temperature": 2.0}},
        {"prepare": {"temperatures": [1.0]}, "train": {"temperature": 1.0}},
    ):
        assert "needs no other temperature" not in sentences(tiny_params, tmp_path, **sections)


def test_shards_and_objects_are_those_of_a_real_cache(tiny_cache: Params) -> None:
    plan = make_plan(tiny_cache)
    files = [file for file in Path(str(tiny_cache.paths.logits)).rglob("*") if file.is_file()]
    cut = [file for file in files if "c" in file.parts or file.parent.name == "commits"]
    cut = [file for file in cut if not any("id_order" in part for part in file.parts)]
    assert plan.cache.shards == 8
    assert plan.cache.objects == len(cut)


def test_every_device_has_numbers(tiny_params: Params, tmp_path: Path) -> None:
    assert set(DEVICES) == set(get_args(DeviceName))
    for name in DEVICES:
        plan = make_plan(big(tiny_params, tmp_path, advise={"device": name}))
        assert 0 < plan.seconds < 1e7


def sentences(tiny_params: Params, tmp_path: Path, **sections: dict[str, object]) -> str:
    params = big(tiny_params, tmp_path, **sections)
    return "\n".join(advice(make_plan(params), params))


def test_advice_says_what_fits(tiny_params: Params, tmp_path: Path) -> None:
    text = sentences(tiny_params, tmp_path, train={"dtype": "float32"})
    assert "prepare fits: " in text
    assert "train fits: " in text
    assert "bfloat16" not in text
    text = sentences(tiny_params, tmp_path, train={"batch_rows": 500, "dtype": "float16"})
    assert "train does NOT fit: " in text
    assert "set run.activation_checkpointing" in text
    cpu = {"device": "cpu-avx2"}
    for dtype in ("bfloat16", "float16"):
        text = sentences(tiny_params, tmp_path, train={"dtype": dtype}, advise=cpu)
        assert f"cpu-avx2 has no units for {dtype} and computes at most at the rate of" in text
    text = sentences(tiny_params, tmp_path, evaluate={"dtype": "bfloat16"}, advise=cpu)
    assert "at the rate of float32: set evaluate.dtype to another" in text


@pytest.mark.parametrize("section", ["prepare", "train", "evaluate"])
def test_bfloat16_is_refused_where_the_stage_would_refuse_it(
    section: str, tiny_params: Params, tmp_path: Path
) -> None:
    bfloat16 = {section: {"dtype": "bfloat16"}}
    with pytest.raises(ParamsError, match=rf"{section}\.dtype=bfloat16, but advise\.device=t4 has"):
        make_plan(big(tiny_params, tmp_path, **bfloat16))
    make_plan(big(tiny_params, tmp_path, **bfloat16, advise={"device": "l4"}))


def test_a_t4_trains_in_float16_at_its_rate(tiny_params: Params, tmp_path: Path) -> None:
    half, single = (
        make_plan(big(tiny_params, tmp_path, train={"dtype": dtype}))
        for dtype in ("auto", "float32")
    )
    assert half.rates.train / single.rates.train == pytest.approx(65 / 8.1)
    assert half.student_dtype == "float16"


def test_advice_says_how_much_is_read_and_when_to_go_online(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sentences(tiny_params, tmp_path)
    assert "a run reads 5,000,000 of the training tokens" in text
    assert "multiply train.gradient_accumulation_steps by 2" in text
    assert "caching pays from 2 epochs on, 4 runs of train.*" in text
    text = sentences(tiny_params, tmp_path, train={"steps": 2000})
    assert "of the training tokens" not in text
    assert "on, 1 run of train" in text
    fast = {"advise": {"device": "h100", "mfu": 1.0}}
    monkeypatch.setattr("pipeline.planning.plan.READ", 1e6)
    assert "go online: this teacher makes" in sentences(tiny_params, tmp_path, **fast)


def test_a_corpus_without_a_size_has_no_plan(tiny_params: Params) -> None:
    with pytest.raises(ParamsError, match=r"corpus\.train_tokens=null .* set a number"):
        make_plan(change(tiny_params, corpus={"train_tokens": None}))


def test_what_the_teacher_has_not_has_no_plan(tiny_params: Params, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"prepare\.k=49153 exceeds the 49152 rows"):
        make_plan(big(tiny_params, tmp_path, prepare={"k": 49_153}))
    layers = {"init": "layers", "layers": [0, 30]}
    with pytest.raises(ParamsError, match=r"student\.layers names layer 30, .* 0 to 29"):
        make_plan(big(tiny_params, tmp_path, student=layers))


def test_the_stage_prints_it_and_needs_nothing(tiny_params: Params, tmp_path: Path) -> None:
    file = str(tmp_path / "params.yaml")
    done = CliRunner().invoke(main, ["--plan", "--params", file], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert not Path(tiny_params.paths.corpus).exists()  # type: ignore[arg-type]
    plan = make_plan(tiny_params)
    assert done.stdout.splitlines() == plan_lines(plan, tiny_params)
    assert done.stdout.splitlines()[-1].endswith("computed, not measured")
    written = json.loads((tiny_params.paths.advise / "plan.json").read_text())
    assert written["seconds"] == pytest.approx(plan.seconds)
    assert [stage["name"] for stage in written["stages"]][2] == "prepare"
