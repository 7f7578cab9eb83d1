"""Which architectures work as teacher and as student: the table of docs/architectures.md.

Each family is a tiny random model of transformers, saved and opened like a user's folder. What
opens has to equal the model's own logits, and the student's loss and gradients those of autograd
through transformers' own forward; otherwise `measure` fails. A refusal becomes a row that says why.

    python -m tests.model.architectures > docs/architectures.md

tests/model/test_architectures.py compares each row with the page.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from pipeline.errors import DecantError
from pipeline.export.gguf_models import require_convertible
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.losses.reference import distillation_loss
from pipeline.model.huggingface import HuggingFaceStudent, is_part_of_a_larger_model
from pipeline.model.logit_transform import LogitTransform
from pipeline.targets.reduce import top_k_from_logits
from pipeline.teacher.transformers import HuggingFaceTeacher

VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = SHAPE | {"head_dim": 8}
EXPERTS: dict[str, Any] = HEADS | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT: dict[str, Any] = EXPERTS | {
    "head_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
WINDOWS: dict[str, Any] = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
PATCHES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}

GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
RECURRENT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "state_size": 4,
    "num_hidden_layers": 2,
}
CHUNKED: dict[str, Any] = {"intermediate_size_mlp": 48, "attention_chunk_size": 4}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", HEADS),
    "arcee": ("Arcee AFM", HEADS),
    "bamba": ("Bamba", SHAPE | MAMBA2 | {"attn_layer_indices": [1]}),
    "bloom": ("BLOOM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "cohere": ("Command R", SHAPE | {"logit_scale": 0.5}),
    "cohere2": ("Command R7B, Command A", SHAPE | WINDOWS | {"logit_scale": 0.25}),
    "deepseek_v2": ("DeepSeek-V2", LATENT),
    "deepseek_v3": ("DeepSeek-V3, R1", LATENT),
    "dots1": (
        "dots.llm1",
        EXPERTS
        | {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "ernie4_5": ("ERNIE 4.5", HEADS),
    "ernie4_5_moe": ("ERNIE 4.5 MoE", EXPERTS | {"moe_num_experts": 4, "moe_k": 2}),
    "exaone4": ("EXAONE 4", HEADS | WINDOWS),
    "falcon": (
        "Falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
        | {"num_attention_heads": 4},
    ),
    "falcon_h1": (
        "Falcon-H1",
        HEADS
        | {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.4,
        },
    ),
    "falcon_mamba": ("Falcon Mamba", RECURRENT),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma 2", HEADS | WINDOWS | {"final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma 3, 4B and larger",
        {"text_config": HEADS | WINDOWS, "vision_config": PATCHES, "mm_tokens_per_image": 4},
    ),
    "gemma3_text": ("Gemma 3, 270M and 1B", HEADS | WINDOWS),
    "gemma3n_text": (
        "Gemma 3n, text part alone",
        HEADS
        | WINDOWS
        | {
            "final_logit_softcapping": 3.0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "intermediate_size": [48, 48],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4": (
        "Gemma 4",
        {
            "text_config": HEADS
            | WINDOWS
            | {
                "final_logit_softcapping": 3.0,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 8,
            },
            "vision_config": None,
            "audio_config": None,
        },
    ),
    "gemma4_text": (
        "Gemma 4, text part alone",
        HEADS
        | WINDOWS
        | {
            "final_logit_softcapping": 3.0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
        },
    ),
    "glm": ("GLM-4-9B", HEADS),
    "glm4": ("GLM-4-0414", HEADS),
    "glm4_moe": (
        "GLM-4.5, GLM-4.6",
        EXPERTS | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "glm4v": (
        "GLM-4.1V",
        {
            "text_config": SHAPE | MROPE,
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
            },
        },
    ),
    "gpt2": ("GPT-2", GPT),
    "gpt_bigcode": ("StarCoder", GPT),
    "gpt_neox": ("Pythia, GPT-NeoX", SHAPE),
    "gpt_oss": ("gpt-oss", EXPERTS | WINDOWS),
    "gptj": ("GPT-J", GPT | {"rotary_dim": 4}),
    "granite": ("Granite 3", SHAPE | {"logits_scaling": 3.0}),
    "granitemoe": ("Granite 3 MoE", EXPERTS | {"logits_scaling": 3.0}),
    "granitemoehybrid": (
        "Granite 4",
        EXPERTS
        | MAMBA2
        | {
            "logits_scaling": 3.0,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
        },
    ),
    "helium": ("Helium", HEADS),
    "hunyuan_v1_dense": ("Hunyuan dense", HEADS),
    "hunyuan_v1_moe": ("Hunyuan-A13B", EXPERTS | {"moe_topk": 2}),
    "hyperclovax": ("HyperCLOVA X", HEADS | {"logits_scaling": 3.0}),
    "internvl": (
        "InternVL 3",
        {"text_config": SHAPE | {"model_type": "qwen2"}, "vision_config": PATCHES},
    ),
    "jamba": (
        "Jamba",
        EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    ),
    "lfm2": ("LFM2", SHAPE | {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "LFM2 MoE",
        EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "llama": ("Llama 1 to 3, SmolLM2, Yi", SHAPE),
    "llama4": (
        "Llama 4",
        {
            "text_config": EXPERTS | CHUNKED,
            "vision_config": PATCHES
            | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        },
    ),
    "llama4_text": ("Llama 4, text part alone", EXPERTS | CHUNKED),
    "mamba": ("Mamba", RECURRENT),
    "mamba2": (
        "Mamba 2, Codestral Mamba",
        RECURRENT
        | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "minicpm3": ("MiniCPM3", LATENT | {"dim_model_base": 16}),
    "minimax": (
        "MiniMax-Text-01",
        EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
    "ministral": ("Ministral 8B", HEADS | WINDOWS),
    "ministral3": ("Ministral 3, text part alone", HEADS),
    "mistral": ("Mistral 7B, Mistral Small 2501", HEADS | {"sliding_window": 4}),
    "mistral3": (
        "Mistral Small 3.1",
        {
            "text_config": HEADS | {"model_type": "mistral"},
            "vision_config": PATCHES | {"model_type": "pixtral", "head_dim": 8},
        },
    ),
    "mixtral": ("Mixtral", EXPERTS),
    "modernbert-decoder": (
        "ModernBERT as decoder",
        SHAPE
        | {
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "mpt": (
        "MPT",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
        },
    ),
    "nanochat": ("nanochat", HEADS | {"final_logit_softcapping": 3.0}),
    "nemotron": ("Nemotron-4, Minitron", HEADS),
    "nemotron_h": (
        "Nemotron-H",
        EXPERTS
        | {
            "layers_block_type": ["mamba", "attention"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "olmo": ("OLMo", SHAPE),
    "olmo2": ("OLMo 2", SHAPE),
    "olmo3": ("OLMo 3", SHAPE | WINDOWS),
    "olmoe": ("OLMoE", EXPERTS),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.2,
        },
    ),
    "persimmon": ("Persimmon", SHAPE),
    "phi": ("Phi-1, Phi-2", SHAPE),
    "phi3": ("Phi-3, Phi-4", SHAPE),
    "phimoe": ("Phi-3.5-MoE", EXPERTS | {"lm_head_bias": True}),
    "qwen2": ("Qwen2, Qwen2.5", SHAPE),
    "qwen2_5_vl": (
        "Qwen2.5-VL",
        {
            "text_config": SHAPE | MROPE,
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0]},
        },
    ),
    "qwen2_moe": ("Qwen1.5-MoE, Qwen2-57B-A14B", EXPERTS),
    "qwen2_vl": (
        "Qwen2-VL",
        {
            "text_config": SHAPE | MROPE,
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        },
    ),
    "qwen3": ("Qwen3", HEADS),
    "qwen3_5": ("Qwen3.5", {"text_config": HEADS | LINEAR | MROPE, "vision_config": QWEN_VISION}),
    "qwen3_moe": ("Qwen3-30B-A3B, Qwen3-235B-A22B", EXPERTS),
    "qwen3_next": ("Qwen3-Next", EXPERTS | LINEAR),
    "qwen3_vl": (
        "Qwen3-VL",
        {
            "text_config": HEADS | MROPE,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3-VL-30B-A3B",
        {
            "text_config": EXPERTS | MROPE,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        SHAPE
        | {
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 3.0,
        },
    ),
    "rwkv": ("RWKV-4", RECURRENT | {"attention_hidden_size": 32, "context_length": 64}),
    "seed_oss": ("Seed-OSS", HEADS),
    "smollm3": ("SmolLM3", HEADS),
    "stablelm": ("StableLM 2", SHAPE),
    "starcoder2": ("StarCoder2", SHAPE),
    "vaultgemma": ("VaultGemma", HEADS | WINDOWS | {"final_logit_softcapping": 3.0}),
    "xlstm": ("xLSTM", RECURRENT | {"num_heads": 2, "chunk_size": 8}),
    "zamba2": (
        "Zamba2",
        SHAPE
        | {
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
}
"""Names of models and a tiny config, by `model_type`."""


PAGE = """# Architectures

A teacher or a student is a folder of any causal language model that transformers knows, or of a
larger model that contains one (Qwen2.5-VL, Gemma 3): then only the language model is used. Decant
needs its final hidden states and its head's matrix separately. The logits may be scaled or softly
capped after the head, which capture, loss and evaluation apply as the model does. When a folder is
opened, the model's own logits are compared with these; if they differ by more than rounding, the
folder is refused, and the message says where they differ. `evaluate` judges such models too, from
their own logits.

The table is made from tiny random models, run by transformers in float32, by
`python -m tests.model.architectures`, and a test compares each row with it. "Yes" means:

- teacher: log-probabilities equal those of the model's own logits, computed in float64;
- documents: documents packed into one row get the hidden states that each has alone, so
  `prepare.document_mask` may be true. "No" is a layer that mixes documents (recurrent, linear
  attention, convolution), or a model that masks attention without regard to positions: then
  capture and training ask for `prepare.document_mask=false`;
- student: the chunked loss and all gradients equal those of autograd through the model's own
  logits;
- GGUF: `export` writes files for llama.cpp, and its check compares their tokens with transformers'.
  llama.cpp has no sliding window for Mistral and Phi-3, so the file's context ends with the window;
  of Gemma 3, every n-th layer must have full attention. Other architectures are exported as Hugging
  Face folders (`export.gguf=[]`), which llama.cpp's own converter reads.

`qwen2`, `qwen3` and `llama` students run on our own model, whose numbers are those of transformers
(`python stages/study.py` compares them part by part), unless their config has a variant that it
lacks, such as a sliding window; all others are run by transformers.

Architectures that are not in the table are checked in the same way when they are opened.

| `model_type` | Models | Teacher | Documents | Student | GGUF | Notes |
|---|---|---|---|---|---|---|
{rows}
"""
LENGTHS = (5, 1, 11, 6)  # of the documents packed into one row; most exceed windows and chunks


@dataclass(frozen=True)
class Row:
    """What works for one family."""

    kind: str
    teacher: bool
    documents: bool
    student: bool
    gguf: bool
    notes: tuple[str, ...]

    def __str__(self) -> str:
        answers = self.teacher, self.documents, self.student, self.gguf
        works = ("yes" if answer else "no" for answer in answers)
        cells = (f"`{self.kind}`", FAMILIES[self.kind][0], *works, ", ".join(self.notes))
        return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def make_family(folder: Path, kind: str) -> Any:
    """Save a tiny random model of the family, and return it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**FAMILIES[kind][1])
    both = AutoModelForImageTextToText, AutoModelForCausalLM
    model = next(auto for auto in both if type(config) in auto._model_mapping).from_config(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


def measure(kind: str, folder: Path) -> Row:
    """Return the family's row; raise an AssertionError where something is silently wrong."""
    model = make_family(folder, kind)
    notes = []
    if is_part_of_a_larger_model(model.config):
        notes.append("its language model alone")
    transform = LogitTransform.of_config(model.config)
    notes += ["scaled logits"] if transform.scale != 1.0 else []
    notes += ["soft cap"] if transform.soft_cap is not None else []
    works = {}
    for name, check in (
        ("teacher", check_teacher),
        ("documents", check_documents),
        ("student", check_student),
        ("gguf", check_gguf),
    ):
        try:
            check(folder, model)
            works[name] = True
        except DecantError as error:
            works[name] = False
            notes += [note for note in [reason(str(error))] if note and note not in notes]
    return Row(kind, **works, notes=tuple(notes))


def reason(message: str) -> str | None:
    """Return what a refusal says of the head."""
    if "bias in its head" in message:
        return "no student: bias in the head"
    found = re.search(r"does more (\w+) the head", message)
    return f"refused: more {found[1]} the head" if found else None


def open_teacher(folder: Path) -> HuggingFaceTeacher:
    return HuggingFaceTeacher(
        folder, vocab_size=VOCABULARY, dtype=torch.float32, device=torch.device("cpu"), head_chunk=7
    )


def some_tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (1, sum(LENGTHS)))


@torch.no_grad()
def check_teacher(folder: Path, model: Any) -> None:
    """The teacher's log-probabilities against those of the model's own logits."""
    teacher = open_teacher(folder)
    tokens = some_tokens()
    own = model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
    topk = teacher.top_k(tokens, VOCABULARY, ())
    said = torch.empty_like(own).scatter_(-1, topk.ids, topk.logprobs.double())
    torch.testing.assert_close(said, own, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def check_documents(folder: Path, _: Any) -> None:
    """Hidden states of packed documents against those of each alone."""
    teacher = open_teacher(folder)
    tokens = some_tokens()
    numbers = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    packed = teacher.hidden_states(tokens, numbers).split(LENGTHS, 1)
    for document, found in zip(tokens.split(LENGTHS, 1), packed, strict=True):
        torch.testing.assert_close(found, teacher.hidden_states(document), atol=2e-5, rtol=1e-4)


def check_student(folder: Path, _: Any) -> None:
    """Loss and gradients against autograd through transformers' own logits."""
    student = HuggingFaceStudent(folder).eval()  # no dropout
    tokens = some_tokens()
    labels = tokens[0].roll(-1)
    topk = top_k_from_logits(torch.randn(len(labels), VOCABULARY) * 3, 8, (2.0,))
    objective: Any = {"alpha": 0.6, "temperature": 2.0}
    ours = distillation_loss_sums(
        student.hidden_states(tokens)[0],
        student.head_weight,
        labels,
        topk,
        transform=student.logit_transform,
        chunk=7,
        **objective,
    ).total
    logits = student.model(input_ids=tokens, use_cache=False).logits[0]
    theirs = distillation_loss(logits.float(), labels, topk, **objective).sum()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    grads = (torch.autograd.grad(loss, trained, materialize_grads=True) for loss in (ours, theirs))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def check_gguf(folder: Path, _: Any) -> None:
    """The architecture alone; tests/export/test_three_paths.py compares what llama.cpp says."""
    require_convertible(folder)


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for kind in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(str(measure(kind, Path(folder))))
    sys.stdout.write(PAGE.format(rows="\n".join(rows)))


if __name__ == "__main__":
    main()
