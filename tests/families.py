"""Tiny models of many families, dropout 0, each with a batch of 8: Hugging Face configurations and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain_models import PLAIN
from torch import Tensor, nn

Family = Callable[[], tuple[nn.Module, dict[str, Tensor]]]

BATCH, LENGTH, VOCABULARY, CLASSES, PIXELS = 8, 12, 64, 8, 32

WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
BERT = {
    **WIDTHS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "num_labels": CLASSES,
}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "attention_dropout": 0.0, "use_cache": False, "pad_token_id": 0}
PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": PIXELS,
    "patch_size": 8,
    "num_labels": CLASSES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PLAIN_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def words() -> dict[str, Tensor]:
    """Tokens and the next ones, unevenly ignored over the samples."""
    ids = _ids(VOCABULARY - 1, BATCH, LENGTH) + 1
    labels = ids.clone()
    labels[0, 3:] = -100
    labels[5, :9] = -100
    return {"input_ids": ids, "labels": labels}


def padded_words() -> dict[str, Tensor]:
    """The same with a mask of unequal lengths."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    mask[6, 4:] = 0
    return {**words(), "attention_mask": mask}


def classified() -> dict[str, Tensor]:
    return {"input_ids": _ids(VOCABULARY - 1, BATCH, LENGTH) + 1, "labels": _ids(CLASSES, BATCH)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": _normal(BATCH, 3, PIXELS, PIXELS), "labels": _ids(CLASSES, BATCH)}


def hugging_face(name: str, config: dict[str, Any], batch: Callable[[], dict[str, Tensor]]) -> Family:
    """The model class ``name`` with its config class; weights are those of seed 0."""

    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, name)
        model = cls(cls.config_class(**config))
        model.train()
        return model, batch()

    return build


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    text = {**WIDTHS, "attention_dropout": 0.0, "eos_token_id": VOCABULARY - 1, "bos_token_id": 0, "pad_token_id": 1}
    vision = {k: v for k, v in PATCHES.items() if "labels" not in k and "prob" not in k}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    batch = {
        "input_ids": _ids(VOCABULARY - 2, BATCH, LENGTH) + 1,
        "pixel_values": _normal(BATCH, 3, PIXELS, PIXELS),
        "return_loss": torch.ones(BATCH, dtype=torch.bool),
    }

    class WithLoss(nn.Module):
        """A contrastive loss compares all samples with each other."""

        def __init__(self) -> None:
            super().__init__()
            self.clip = transformers.CLIPModel(config)

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            loss = self.clip(input_ids=input_ids, pixel_values=pixel_values, return_loss=True).loss
            assert isinstance(loss, Tensor)
            return loss

    del batch["return_loss"]
    return WithLoss(), batch


def speech() -> dict[str, Tensor]:
    return {"input_features": _normal(BATCH, 16, 24), "labels": _ids(VOCABULARY - 1, BATCH, LENGTH) + 1}


HUGGING_FACE: dict[str, Family] = {
    "gpt2": hugging_face(
        "GPT2LMHeadModel",
        {
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 32,
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "use_cache": False,
            **PLAIN_IDS,
        },
        words,
    ),
    "llama": hugging_face("LlamaForCausalLM", GROUPED, words),
    "mistral": hugging_face("MistralForCausalLM", {**GROUPED, "sliding_window": 6}, words),
    "mixtral": hugging_face("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, words),
    "mixtral_balanced": hugging_face(
        "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "output_router_logits": True}, words
    ),
    "qwen2": hugging_face("Qwen2ForCausalLM", GROUPED, words),
    "gemma2": hugging_face("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 6}, words),
    "phi": hugging_face("PhiForCausalLM", {**GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, words),
    "falcon": hugging_face(
        "FalconForCausalLM",
        {**WIDTHS, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cache": False, **PLAIN_IDS},
        words,
    ),
    "gpt_neox": hugging_face(
        "GPTNeoXForCausalLM",
        {**WIDTHS, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cache": False, **PLAIN_IDS},
        words,
    ),
    "gptj": hugging_face(
        "GPTJForCausalLM",
        {
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 32,
            "n_positions": 32,
            "rotary_dim": 4,
            "vocab_size": VOCABULARY,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "use_cache": False,
            **PLAIN_IDS,
        },
        words,
    ),
    "opt": hugging_face(
        "OPTForCausalLM",
        {
            **{k: v for k, v in WIDTHS.items() if k != "intermediate_size"},
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cache": False,
            **PLAIN_IDS,
        },
        words,
    ),
    "bloom": hugging_face(
        "BloomForCausalLM",
        {
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cache": False,
            **PLAIN_IDS,
        },
        words,
    ),
    "deepseek_v3": hugging_face(
        "DeepseekV3ForCausalLM",
        {
            **GROUPED,
            **PLAIN_IDS,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        words,
    ),
    "qwen3_next": hugging_face(
        "Qwen3NextForCausalLM",
        {
            **GROUPED,
            **PLAIN_IDS,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        words,
    ),
    "recurrent_gemma": hugging_face(
        "RecurrentGemmaForCausalLM",
        {
            **{name: value for name, value in GROUPED.items() if name != "max_position_embeddings"},
            **PLAIN_IDS,
            "lru_width": 32,
            "attention_window_size": 6,
            "block_types": ["recurrent", "attention"],
            "w_init_variance_scale": 0.01,
        },
        words,
    ),
    "deberta_v2": hugging_face(
        "DebertaV2ForMaskedLM",
        {
            **BERT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 8,
            "position_buckets": 4,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "pooler_hidden_size": 32,
            "pooler_dropout": 0.0,
            "legacy": False,
        },
        padded_words,
    ),
    "bert": hugging_face("BertForMaskedLM", BERT, padded_words),
    "roberta": hugging_face("RobertaForSequenceClassification", {**BERT, "pad_token_id": 0}, classified),
    "electra": hugging_face("ElectraForMaskedLM", {**BERT, "embedding_size": 16}, words),
    "albert": hugging_face("AlbertForMaskedLM", {**BERT, "embedding_size": 16}, words),
    "distilbert": hugging_face(
        "DistilBertForMaskedLM",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        words,
    ),
    "longformer": hugging_face(
        "LongformerForMaskedLM",
        {**BERT, "attention_window": 4, "pad_token_id": 0, "max_position_embeddings": 40},
        words,
    ),
    "vit": hugging_face("ViTForImageClassification", PATCHES, images),
    "deit": hugging_face("DeiTForImageClassification", PATCHES, images),
    "swin": hugging_face(
        "SwinForImageClassification",
        {
            "image_size": PIXELS,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": CLASSES,
            "drop_path_rate": 0.0,
        },
        images,
    ),
    "convnext": hugging_face(
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "num_labels": CLASSES},
        images,
    ),
    "resnet": hugging_face(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": CLASSES},
        images,
    ),
    "t5": hugging_face(
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "dropout_rate": 0.0,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
        words,
    ),
    "bart": hugging_face(
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "use_cache": False,
            "decoder_start_token_id": 0,
            **PLAIN_IDS,
        },
        words,
    ),
    "whisper": hugging_face(
        "WhisperForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "vocab_size": VOCABULARY,
            "num_mel_bins": 16,
            "max_source_positions": 12,
            "max_target_positions": 32,
            "dropout": 0.0,
            "use_cache": False,
            "decoder_start_token_id": 0,
            **PLAIN_IDS,
        },
        speech,
    ),
    "rwkv": hugging_face(
        "RwkvForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "context_length": 16,
            "use_cache": False,
        },
        words,
    ),
    "clip": clip,
}

FAMILIES: dict[str, Family] = {**HUGGING_FACE, **PLAIN}
TRANSFORMERS = tuple(name for name in HUGGING_FACE if name not in ("resnet", "convnext"))
