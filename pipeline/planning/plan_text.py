"""The plan as text: stages, caches by mode, and the conclusions."""

from __future__ import annotations

import math
import textwrap

from pipeline.config.params import Params
from pipeline.planning.cache_size import CacheSize, bytes_a_token
from pipeline.planning.costs import FITS
from pipeline.planning.decoder_shape import Shape
from pipeline.planning.devices import DEVICES
from pipeline.planning.plan import MODES, READ, Plan, StagePlan
from pipeline.runtime.console import readable_bytes, readable_seconds

_WIDTH = 25  # of a mode's name


def plan_lines(plan: Plan, params: Params) -> list[str]:
    """Return the plan in lines of up to 96 characters; the last one is the summary."""
    tables = [*_stage_table(plan), *_mode_table(plan)]
    return [
        *_wrapped(_subject(plan, params)),
        *(f"  {line}" for line in tables),
        *_wrapped(advice(plan, params)),
        _summary(plan, params),
    ]


def _wrapped(sentences: list[str]) -> list[str]:
    lines = (textwrap.wrap(text, 94, subsequent_indent="  ") for text in sentences)
    return [f"  {line}" for sentence in lines for line in sentence]


def _summary(plan: Plan, params: Params) -> str:
    return (
        f"advise: {readable_seconds(plan.seconds)} in all on {params.advise.devices} x "
        f"{params.advise.device}, the cache {readable_bytes(plan.cache.total)}; computed, not "
        "measured"
    )


def _subject(plan: Plan, params: Params) -> list[str]:
    extent, advise = plan.extent, params.advise
    return [
        f"teacher {plan.teacher}: {_weights(plan.teacher_shape)}, in {plan.teacher_dtype}",
        f"student {plan.student}: {_weights(plan.student_shape)}, in {plan.student_dtype}",
        f"corpus {extent.tokens:,} tokens in rows of {extent.row_length:,}; a run of "
        f"{plan.steps:,} steps of {extent.run_tokens // plan.steps:,} tokens "
        f"is {_epochs(extent.epochs_per_run)}{_in_loss(plan, params)}",
        f"device {advise.devices} x {advise.device} at {advise.mfu:.0%} of its peak: "
        f"capture {plan.rates.teacher:,.0f} tokens/s, training {plan.rates.train:,.0f} tokens/s",
        *_sharing(plan),
    ]


def _in_loss(plan: Plan, params: Params) -> str:
    share = plan.extent.share_in_loss
    if share < 1.0:
        return f"; {share:.1%} of its tokens are in the loss, and the others take no head or cache"
    if params.corpus.loss_on == "completions":
        return "; all tokens are assumed to be in the loss, until stages/corpus.py has counted them"
    return ""


def _weights(shape: Shape) -> str:
    words = f"{shape.parameters / 1e6:,.0f} M parameters"
    if shape.experts:
        words += f", {shape.active_parameters / 1e6:,.0f} M used per token"
    return words + (f", {shape.weight_format.describe()}" if shape.weight_format else "")


def _sharing(plan: Plan) -> list[str]:
    sharing = plan.sharing
    if sharing.devices == 1:
        return []
    return [
        f"prepare, verify and evaluate: {sharing.devices} devices share one teacher "
        f"({sharing.describe()})"
    ]


def _stage_table(plan: Plan) -> list[str]:
    return [
        f"{'stage':<10}{'writes':>10}{'takes':>11}{'memory per device':>21}",
        *(_stage_line(stage) for stage in plan.stages),
        f"{'all':<10}{'':>10}{readable_seconds(plan.seconds):>11}",
    ]


def _stage_line(stage: StagePlan) -> str:
    written = "" if stage.written is None else readable_bytes(stage.written)
    seconds = "" if stage.seconds is None else readable_seconds(stage.seconds)
    memory = "" if stage.memory is None else readable_bytes(stage.memory)
    return f"{stage.name:<10}{written:>10}{seconds:>11}{memory:>21}".rstrip()


def _mode_table(plan: Plan) -> list[str]:
    return [
        f"{'kept':<{_WIDTH}}{'bytes/token':>11}{'cache':>10}{'shard':>10}{'shards':>9}"
        f"{'objects':>11}{'read in training':>18}",
        *(_mode_line(size, plan.rates.train) for size in plan.modes),
    ]


def _mode_line(size: CacheSize, rate: float) -> str:
    read = f"{readable_bytes(size.bytes_a_token * rate)}/s"
    return (
        f"{size.mode.name:<{_WIDTH}}{size.bytes_a_token:>11.1f}{readable_bytes(size.total):>10}"
        f"{readable_bytes(size.shard):>10}{size.shards:>9,}{size.objects:>11,}{read:>18}"
    )


def advice(plan: Plan, params: Params) -> list[str]:
    """Say what fits, how much of the cache a run reads, and whether a cache pays off."""
    return [
        *_fits(plan, params),
        *_temperatures(plan, params),
        *_coverage(plan, params),
        *_cache_or_online(plan, params),
    ]


def _fits(plan: Plan, params: Params) -> list[str]:
    device = DEVICES[params.advise.device]
    remedies = {
        "prepare": "lower capture.batch_rows or capture.head_chunk, or choose a larger device or "
        "more of them (advise.devices)",
        "train": "set run.activation_checkpointing, halve train.batch_rows and double "
        "train.gradient_accumulation_steps, or shard it with run.parallel=fsdp",
    }
    lines = []
    for name, remedy in remedies.items():
        memory = plan.stage(name).memory or 0.0
        of = f"{readable_bytes(memory)} of {readable_bytes(device.memory)}"
        fits = memory <= FITS * device.memory
        lines.append(f"{name} fits: {of}" if fits else f"{name} does NOT fit: {of}; {remedy}")
    judging = plan.stage("evaluate").memory or 0.0
    if judging > FITS * device.memory:
        lines.append(
            f"evaluate does NOT fit: {readable_bytes(judging)} of {readable_bytes(device.memory)}, "
            "with teacher, student and baseline side by side; judge one run at a time (--run), or "
            "use a larger device"
        )
    weight_format = None if params.prepare.dequantize else plan.teacher_shape.weight_format
    if weight_format and weight_format.capability and device.capability < weight_format.capability:
        wanted = ".".join(map(str, weight_format.capability))
        lines.append(
            f"{params.advise.device} has no kernels for {weight_format.name}: transformers needs a "
            f"GPU of compute capability {wanted}, prepare.dequantize=true or the unquantised model"
        )
    dtypes = (plan.teacher_dtype, plan.student_dtype, *plan.evaluate_dtypes)
    for key, dtype in zip(("prepare", "train", "evaluate", "evaluate"), dtypes, strict=True):
        emulated = dtype == "bfloat16" and not device.has_bfloat16
        # Only training computes in float16 on a CPU; the other stages round weights to it.
        if emulated or (key == "train" and dtype == "float16" and not device.has_float16):
            line = (
                f"{params.advise.device} has no units for {dtype} and computes at most at the rate "
                f"of float32: set {key}.dtype to another"
            )
            lines += [] if line in lines else [line]
    return lines


def _temperatures(plan: Plan, params: Params) -> list[str]:
    """Say what the stored temperatures cost if the run needs none of them."""
    if set(params.prepare.temperatures) <= {1.0} or params.train.temperature != 1.0:
        return []
    vocab_size, share = plan.teacher_shape.vocab_size, plan.extent.share_in_loss
    saved = []
    for mode in (MODES[0], MODES[-1]):
        with_all = bytes_a_token(mode, vocab_size, params.prepare.temperatures)
        saved.append(share * (with_all - bytes_a_token(mode, vocab_size)))
    return [
        "train.temperature=1 needs no other temperature: prepare.temperatures=[1.0] takes "
        f"{saved[0]:.1f} bytes per token less with the {MODES[0].name}, {saved[1]:.1f} less with "
        f"{MODES[-1].name}"
    ]


def _coverage(plan: Plan, params: Params) -> list[str]:
    if plan.extent.epochs_per_run >= 1.0:
        return []
    return [
        f"a run reads {plan.extent.run_tokens:,} of the training tokens: for one run alone set "
        "corpus.train_tokens to that; to read all in as many steps, multiply "
        f"train.gradient_accumulation_steps by {math.ceil(1.0 / plan.extent.epochs_per_run)}"
    ]


def _cache_or_online(plan: Plan, params: Params) -> list[str]:
    hour = 3600.0 * plan.rates.teacher / params.advise.devices
    live = plan.extent.run_tokens / plan.rates.teacher
    cached = plan.stage("baseline").seconds or 0.0
    shared = plan.sharing.devices > 1
    more = f"{readable_seconds(live)} more with a live teacher"
    if shared:
        more = "cannot have a live teacher, which would have to fit beside it on each device"
    lines = [
        f"a run takes {readable_seconds(cached)} from the cache and {more}",
        f"an hour of {params.advise.device} captures {hour / 1e6:,.3g} M tokens, "
        f"{readable_bytes(hour * plan.cache.bytes_a_token)} of cache: keep it if that is cheaper "
        "to store than to compute again",
    ]
    if shared:
        return lines
    if plan.break_even is None:
        return [
            *lines,
            f"go online: this teacher makes {plan.rates.teacher:,.0f} tokens/s, and two threads "
            f"read {READ:,.0f} from a cache",
        ]
    number = math.ceil(plan.break_even / plan.extent.epochs_per_run)
    runs = f"{number:,} run" + ("" if number == 1 else "s")
    return [
        *lines,
        f"caching pays from {_epochs(plan.break_even)} on, {runs} of train.*; for fewer, or "
        f"without room for {readable_bytes(plan.cache.total)}, set train.targets=online",
    ]


def _epochs(number: float) -> str:
    return "1 epoch" if f"{number:.3g}" == "1" else f"{number:.3g} epochs"
