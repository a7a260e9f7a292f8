"""Networks with random weights for the roofline on CPUs: those it was made with, and those it is judged by."""

import logging
import warnings

import torch


def _torchvision(name):
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options), (torch.randn(1, 3, 224, 224),)


def _timm(name):
    import timm

    return timm.create_model(name, pretrained=False), (torch.randn(1, 3, 224, 224),)


def _bert(layers, width, heads, tokens):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )
    return BertModel(config), (torch.randint(0, 30000, (1, tokens)),)


def _gpt(layers, width, heads, tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, use_cache=False))
    return model, (torch.randint(0, 30000, (1, tokens)),)


class _Lstm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.LSTM(256, 512, 2, batch_first=True)
        self.head = torch.nn.Linear(512, 1000)

    def forward(self, x):
        return self.head(self.layers(x)[0])


def _all(make, names):
    return {name: (lambda name=name: make(name)) for name in names.split()}


#: The estimates' form was chosen while looking at these.
DEVELOPMENT = (
    _all(_torchvision, "resnet18 mobilenet_v2 googlenet alexnet")
    | _all(_timm, "vit_tiny_patch16_224 convnext_femto")
    | {"bert_mini": lambda: _bert(4, 256, 4, 64), "gpt2_mini": lambda: _gpt(4, 256, 4, 64)}
)
#: The estimates are judged by these.
JUDGED = (
    _all(
        _torchvision,
        "resnet34 resnet50 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 shufflenet_v2_x1_0 squeezenet1_1 "
        "regnet_y_400mf densenet121 mnasnet1_0 vgg11 resnext50_32x4d",
    )
    | _all(_timm, "vit_small_patch32_224 deit_tiny_patch16_224 convnext_atto mixer_s32_224 ghostnet_100 poolformer_s12")
    | {
        "minilm 128": lambda: _bert(6, 384, 12, 128),
        "bert_small 128": lambda: _bert(4, 512, 8, 128),
        "distilgpt2 64": lambda: _gpt(6, 768, 12, 64),
        "lstm 64": lambda: (_Lstm(), (torch.randn(1, 64, 256),)),
    }
)


def export(build, path):
    """Write a network as ONNX, unless it is there."""
    if path.exists():
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    module, inputs = build()
    part = path.with_suffix(".part")
    with torch.no_grad():
        torch.onnx.export(module.eval(), inputs, str(part), dynamo=True, verbose=False, external_data=False)
    part.rename(path)
