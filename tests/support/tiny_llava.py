"""A small LLaVA under drawn weights: in the published layouts, with config.json and a tokenizer of words."""

import json

from drawn_weights import draw

from jaxmed.io import safetensors
from jaxmed.models.llama import LlamaConfig
from jaxmed.models.llava import ClipConfig, LlavaConfig
from jaxmed.models.published import llava

IMAGE_TOKEN = 98
TINY = LlavaConfig(
    ClipConfig(28, 14, 3, 32, 3, 4, 37),
    LlamaConfig(99, 32, 2, 4, 2, 8, 48, theta=500.0),
    IMAGE_TOKEN,
)
SETTINGS = {
    "model_type": "llava", "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
    "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 4, "hidden_act": "quick_gelu"},
    "text_config": {"model_type": "llama", "num_attention_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500.0},
}  # fmt: skip
NAMINGS = ("", "new", "newest")
WORDS = (
    "<unk>", "<s>", "</s>", "USER", ":", "ASSISTANT", ".", "\n", "?", "of", "a", "the", "woman", "man", "years",
    "which", "Answer", "with", "letter", "one", "option", "valve", "failure", "none", "words", "as", "stored", "both",
    "A", "B", "C", "D", "0", "1", "2", "3", "less",
)  # fmt: skip


def tensors_of(config=TINY, naming=""):
    """Return drawn tensors, the same weights whatever their names, and the unused norm that files have."""
    plain = llava.entries(config, "newest")
    found = {
        entry.name: draw(other.name, other.shape)
        for entry, other in zip(llava.entries(config, naming), plain, strict=True)
    }
    stem = next(name for name in found if name.endswith("pre_layrnorm.weight")).removesuffix("pre_layrnorm.weight")
    for part in ("weight", "bias"):
        found[f"{stem}post_layernorm.{part}"] = draw(f"post.{part}", (config.vision.width,))
    return found


def write_llava(folder, config=TINY, naming="", shards=2, settings=SETTINGS):
    """Write a folder as the hub has them, in several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(config, naming)
    names = sorted(tensors)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        safetensors.write(folder / file, {name: tensors[name] for name in part})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_tokenizer(folder):
    """Write a tokenizer that knows a few words and the placeholder."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {"<image>": IMAGE_TOKEN}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
