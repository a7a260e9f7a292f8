"""Networks with random weights from the configurations of transformers, for the roofline on GPUs."""

import torch
import transformers as hf


def _images(batch, edge=224):
    return lambda: {"pixel_values": torch.randn(batch, 3, edge, edge)}


def _tokens(batch, length, vocabulary=30000):
    return lambda: {"input_ids": torch.randint(0, vocabulary, (batch, length))}


def _model(kind, config):
    return lambda: getattr(hf, kind)(config)


def _encoder_of_t5(config):
    return lambda: hf.T5EncoderModel(config)


def _encoder_of_whisper(config):
    def build():
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder(config)

    return build


def zoo(tiny):
    """Return a builder and a maker of inputs by name; small ones if ``tiny``, to try the script on a CPU."""

    def pick(large, small):
        return small if tiny else large

    edge = pick(224, 64)
    batches = pick((1, 32), (1,))
    length = pick(512, 16)
    layers = {"num_hidden_layers": 1} if tiny else {}
    found = {}
    bert_base = hf.BertConfig(**layers)
    bert_large = hf.BertConfig(
        hidden_size=1024, num_attention_heads=16, intermediate_size=4096, **({"num_hidden_layers": 24} | layers)
    )
    gpt2 = hf.GPT2Config(use_cache=False, **({"n_layer": 1} if tiny else {}))
    llama = hf.LlamaConfig(
        hidden_size=pick(2048, 64),
        intermediate_size=pick(8192, 128),
        num_hidden_layers=pick(16, 1),
        num_attention_heads=pick(32, 4),
        num_key_value_heads=pick(8, 2),
        vocab_size=32000,
        max_position_embeddings=4096,
        use_cache=False,
    )
    vit = hf.ViTConfig(image_size=edge, **layers)
    for batch in batches:
        found |= {
            f"resnet-50 b{batch}": (_model("ResNetModel", hf.ResNetConfig()), _images(batch, edge)),
            f"vit-base b{batch}": (_model("ViTModel", vit), _images(batch, edge)),
            f"convnext-tiny b{batch}": (_model("ConvNextModel", hf.ConvNextConfig()), _images(batch, edge)),
            f"mobilenet-v2 b{batch}": (_model("MobileNetV2Model", hf.MobileNetV2Config()), _images(batch, edge)),
            f"regnet b{batch}": (_model("RegNetModel", hf.RegNetConfig()), _images(batch, edge)),
            f"bert-base 128 b{batch}": (_model("BertModel", bert_base), _tokens(batch, pick(128, 16))),
        }
    swin = hf.SwinConfig(image_size=224)
    t5 = hf.T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=pick(12, 1), use_cache=False, dropout_rate=0.0
    )
    whisper = hf.WhisperConfig(
        d_model=768, encoder_layers=pick(12, 1), encoder_attention_heads=12, encoder_ffn_dim=3072
    )
    found |= {
        f"bert-large {length} b8": (_model("BertModel", bert_large), _tokens(pick(8, 1), length)),
        "gpt2 1024 b1": (_model("GPT2LMHeadModel", gpt2), _tokens(1, pick(1024, 16))),
        "gpt2 1024 b8": (_model("GPT2LMHeadModel", gpt2), _tokens(pick(8, 2), pick(1024, 16))),
        "llama-1b 2048 b1": (_model("LlamaForCausalLM", llama), _tokens(1, pick(2048, 16))),
        "llama-1b 128 b1": (_model("LlamaForCausalLM", llama), _tokens(1, pick(128, 16))),
        "swin-tiny b16": (_model("SwinModel", swin), _images(pick(16, 1))),
        "t5-base encoder 512 b8": (_encoder_of_t5(t5), _tokens(pick(8, 1), length)),
        "whisper-small encoder b4": (
            _encoder_of_whisper(whisper),
            lambda: {"input_features": torch.randn(pick(4, 1), 80, 3000)},
        ),
        "efficientnet-b0 b32": (
            _model(
                "EfficientNetModel",
                hf.EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
            ),
            _images(pick(32, 1), edge),
        ),
        "distilbert 128 b64": (
            _model("DistilBertModel", hf.DistilBertConfig(**({"n_layers": 1} if tiny else {}))),
            _tokens(pick(64, 1), pick(128, 16)),
        ),
    }
    return found
