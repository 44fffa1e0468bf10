"""Tiny random models of real architectures."""

import torch

VOCABULARY = 128


def llama(seed: int = 0, **options):
    """Two layers, grouped-query attention, widths that are and are not multiples of a block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{**sizes, "tie_word_embeddings": False, **options},
    )
    return LlamaForCausalLM(config)


def gpt2(seed: int = 0, **options):
    """Two layers whose linear layers are transformers' Conv1D, with biases and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return GPT2LMHeadModel(config)


def bert(seed: int = 0, **options):
    """Two layers with a classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return BertForSequenceClassification(config)


def gpt_neox(seed: int = 0, **options):
    """Two layers; its files call the head `embed_out`, the model `lm_head`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return GPTNeoXForCausalLM(config)


def t5(seed: int = 0, **options):
    """Two layers of encoder and decoder with shared embeddings; transformers keeps its `wo` in float32."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        **options,
    )
    return T5ForConditionalGeneration(config)


def token_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    """int64 `[batch, length]`, the same each time."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def loaded(folder, device: str, auto_class=None, **options):
    """`from_pretrained` onto a device; onto a GPU by default, as for anyone who has one and names none."""
    from transformers import AutoModelForCausalLM

    place = {"device_map": "cpu"} if device == "cpu" else {}
    model = (auto_class or AutoModelForCausalLM).from_pretrained(folder, **place, **options)
    return model if getattr(model, "quantization_method", None) else model.to(device)


def qwen3_moe(seed: int = 0, **options):
    """Two layers of four experts each, two for a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **options,
        }
    )
    return Qwen3MoeForCausalLM(config)


def gpt_oss(seed: int = 0, **options):
    """Two layers of four experts with biases, whose weights are transposed and whose gate is interleaved."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    config = GptOssConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **options,
        }
    )
    return GptOssForCausalLM(config)
