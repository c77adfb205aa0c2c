"""The published 2D transformers in PyTorch, small (transformers and timm), with weights drawn from their names."""

import sys
import types

import drawn_weights
import torch

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
# Image sizes that are run: the model's own first.
RUNS = {
    "dinov2": ((56, 56), (84, 84), (84, 112)),
    "dinov2_gated": ((56, 56), (84, 84)),
    "dinov2_registers": ((56, 56), (84, 84)),
    "dinov2_classifier": ((56, 56),),
    "dinov3": ((64, 64), (64, 96)),
    "dinov3_gated": ((64, 64), (64, 96)),
    "timm": ((32, 32),),
    "timm_scaled": ((32, 32),),
    "timm_registers": ((56, 56), (84, 84)),
}


def make(name):
    """Return one of the models of `RUNS` in evaluation mode."""
    torch.set_num_threads(1)
    model = _timm(name) if name.startswith("timm") else _hugging(name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.tensor(drawn_weights.draw(plain(key), tuple(value.shape))))
    return model.eval()


def plain(name):
    """Return a name as a saved file has it."""
    return name.removeprefix("model.")


def run(model, image):
    """Return every hidden state and the last one after the final norm, of images [batch, row, column, channel]."""
    x = torch.tensor(image).permute(0, 3, 1, 2)
    with torch.no_grad():
        if hasattr(model, "forward_intermediates"):
            x = model.patch_embed(x)
            states = [model._pos_embed(x)]
            for block in model.blocks:
                states.append(block(states[-1]))
            return states, model.norm(states[-1])
        found = model(x, output_hidden_states=True)
    if hasattr(found, "logits"):
        return list(found.hidden_states), found.logits
    return list(found.hidden_states), found.last_hidden_state


def tensors(model):
    """Return the tensors as a file has them."""
    return {plain(name): value.detach().numpy() for name, value in model.state_dict().items()}


def _hugging(name):
    import transformers

    if name.startswith("dinov3"):
        is_gated = name.endswith("gated")
        config = transformers.DINOv3ViTConfig(
            **SIZES, intermediate_size=96, image_size=64, patch_size=16, num_register_tokens=4,
            use_gated_mlp=is_gated, hidden_act="silu" if is_gated else "gelu",
        )  # fmt: skip
        return transformers.DINOv3ViTModel(config)
    sizes = {**SIZES, "image_size": 56, "patch_size": 14}
    if name.endswith("registers"):
        config = transformers.Dinov2WithRegistersConfig(**sizes, use_swiglu_ffn=True)
        return transformers.Dinov2WithRegistersModel(config)
    config = transformers.Dinov2Config(**sizes, use_swiglu_ffn=name.endswith("gated"), num_labels=5)
    kind = transformers.Dinov2ForImageClassification if name.endswith("classifier") else transformers.Dinov2Model
    return kind(config)


def _timm(name):
    timm = import_timm()
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0, "global_pool": ""}
    if name != "timm_registers":
        scale = 1e-5 if name == "timm_scaled" else None
        return timm.VisionTransformer(img_size=32, patch_size=8, init_values=scale, **sizes)
    from timm.layers import SwiGLUPacked

    return timm.VisionTransformer(
        img_size=56, patch_size=14, init_values=1e-5, reg_tokens=4, no_embed_class=True, mlp_layer=SwiGLUPacked,
        mlp_ratio=4, act_layer=torch.nn.SiLU, dynamic_img_size=True, **sizes,
    )  # fmt: skip


def import_timm():
    """Import timm's transformers beside empty modules in torchvision's place, which has no build for every machine."""
    import importlib.machinery
    from unittest import mock

    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
                 "torchvision.transforms.functional", "torchvision.datasets"):  # fmt: skip
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            module.__getattr__ = lambda attribute: mock.MagicMock()  # pyright: ignore[reportAttributeAccessIssue]
            sys.modules[name] = module
    from timm.models import vision_transformer

    return vision_transformer
