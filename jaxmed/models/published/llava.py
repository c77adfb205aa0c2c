"""Weights of LLaVA in the names of Hugging Face, of both layouts.

The old layout (llava-hf/llava-1.5-7b-hf as published) has language_model.model.* and language_model.lm_head; the new
one model.language_model.* and lm_head, with model. before the other parts; the newest has no vision_model. in the
image transformer. Heads, the hidden state that is handed on and the placeholder token are in config.json alone: the
folder is given, with all its files.

Source: LLaVA-1.5, arXiv:2310.03744; the Hugging Face code and files.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxmed.arrays.task import Task
from jaxmed.data.intensity import Intensity
from jaxmed.data.preprocess import Preprocess
from jaxmed.errors import InputError
from jaxmed.models.llama import LlamaConfig
from jaxmed.models.llava import ClipConfig, Llava, LlavaConfig
from jaxmed.models.published.family import Facts, Family, Hints, Kind
from jaxmed.models.published.names import (
    BlockNames,
    Entry,
    blocks,
    count_parts,
    layer_norm,
    linear,
    reshaped,
    shape_of,
)
from jaxmed.nn.model import Model, make_model

NAME = "llava"
KINDS = {"answerer": Kind(LlavaConfig, "a multimodal model")}
CLIP_INTENSITY = Intensity(
    "unit", mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)  # fmt: skip
CLIP = BlockNames(
    tuple(f"self_attn.{part}_proj" for part in "qkv"), "self_attn.out_proj", norms=("layer_norm1", "layer_norm2")
)
OLD_TABLE, NEW_TABLE = "language_model.model.embed_tokens.weight", "language_model.embed_tokens.weight"
PROJECTOR = "multi_modal_projector.linear_1.weight"


def plain_name(name: str) -> str:
    """Return the name of a tensor without what differs between layouts."""
    name = re.sub(r"^model\.", "", name)
    name = re.sub(r"^language_model\.(model\.|(?=lm_head))", lambda hit: "language_model." * bool(hit[1]), name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Tell whether the names are those of this family."""
    names = {plain_name(name) for name in tensors}
    return {NEW_TABLE, PROJECTOR, "vision_tower.embeddings.class_embedding"} <= names


def naming(tensors: Mapping[str, Any]) -> str:
    """Return the layout: "" is the old one, "new", and "newest" without vision_model."""
    names = {re.sub(r"^model\.", "", name) for name in tensors}
    if OLD_TABLE in names:
        return ""
    return "new" if "vision_tower.vision_model.embeddings.class_embedding" in names else "newest"


def renames(names: Collection[str]) -> dict[str, str]:
    """Return the whole names of the new layouts, whose "model." the reader has taken off."""
    if OLD_TABLE in names:
        return {}
    parts = ("vision_tower.", "multi_modal_projector.", "language_model.")
    return {name: f"model.{name}" for name in names if name.startswith(parts)}


def infer(where: str, tensors: Mapping[str, Any], hints: Hints = Hints()) -> LlavaConfig:
    """Return the sizes of a model from the shapes of its tensors and its config.json; see `family.Family.infer`."""
    settings = hints.settings
    text, vision = settings.get("text_config"), settings.get("vision_config")
    if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        advice = "give the folder in which config.json lies beside the weights"
        raise InputError(where, "weights with their config.json, of a LLaVA", "none", advice)
    plain = {plain_name(name): value for name, value in tensors.items()}
    _require_known(where, settings, text, vision, plain)

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        return shape_of(where, NAME, plain, name, dimensions)

    def number(part: Mapping[str, Any], name: str, default: Any) -> Any:
        value = part.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where} config.json", f"a number under '{name}'", str(value))
        return value

    width, hidden = shape("vision_tower.encoder.layers.0.mlp.fc1.weight")[::-1]
    patch = shape("vision_tower.embeddings.patch_embedding.weight", 4)
    places = shape("vision_tower.embeddings.position_embedding.weight")[0] - 1
    edge = round(places**0.5)
    if edge * edge != places:
        raise InputError(where, "a square number of patches", places)
    vocabulary, text_width = shape(NEW_TABLE)
    heads = int(hints.heads or number(text, "num_attention_heads", 32))
    head_width = int(number(text, "head_dim", text_width // heads))
    rope = text.get("rope_parameters") or {}
    try:
        return LlavaConfig(
            ClipConfig(
                edge * patch[2], patch[2], patch[1], width, count_parts(where, plain, r"vision_tower\.encoder\.layers"),
                int(number(vision, "num_attention_heads", 12)), hidden, float(number(vision, "layer_norm_eps", 1e-5)),
                vision.get("hidden_act", "quick_gelu"), int(number(settings, "vision_feature_layer", -2)),
                settings.get("vision_feature_select_strategy", "default") == "full",
            ),
            LlamaConfig(
                vocabulary, text_width, count_parts(where, plain, r"language_model\.layers"), heads,
                shape("language_model.layers.0.self_attn.k_proj.weight")[0] // head_width, head_width,
                shape("language_model.layers.0.mlp.gate_proj.weight")[0], float(number(text, "rms_norm_eps", 1e-6)),
                float(number(rope, "rope_theta", number(text, "rope_theta", 10_000.0))),
                tied="lm_head.weight" not in plain,
            ),
            int(number(settings, "image_token_index", number(settings, "image_token_id", 32000))),
        )  # fmt: skip
    except InputError:
        raise
    except ValueError as error:
        raise InputError(where, "weights of a possible network", str(error)) from error


def _require_known(
    where: str,
    settings: Mapping[str, Any],
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    plain: Mapping[str, Any],
) -> None:
    """Refuse what would be computed otherwise, in silence."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rows = (
        (text, "model_type", ("llama",)), (vision, "model_type", ("clip_vision_model",)),
        (text, "hidden_act", ("silu",)), (vision, "hidden_act", ("quick_gelu", "gelu")),
        (settings, "projector_hidden_act", ("gelu",)),
        (settings, "vision_feature_select_strategy", ("default", "full")),
        (rope, "rope_type", ("default",)), (rope, "type", ("default",)),
    )  # fmt: skip
    for part, name, known in rows:
        if part.get(name, known[0]) not in known:
            raise InputError(f"{where} config.json", f"'{name}' {' or '.join(known)}", str(part[name]))
    if isinstance(settings.get("vision_feature_layer"), list):
        found = str(settings["vision_feature_layer"])
        raise InputError(f"{where} config.json", "one hidden state under 'vision_feature_layer'", found)
    biased = [name for name in plain if re.match(r"language_model\.layers\.\d+\..*_proj\.bias$", name)]
    if biased:
        raise InputError(where, "a Llama decoder, whose maps have no constants", f"'{biased[0]}'")


def facts(config: LlavaConfig) -> Facts:
    """Return what others ask of a model."""
    return Facts("answerer", config.text.heads)


def entries(config: LlavaConfig, naming: str = "") -> list[Entry]:
    """Return every tensor of a model and its parameter."""
    first = "model." if naming else ""
    vision = f"{first}vision_tower." + ("" if naming == "newest" else "vision_model.")
    language = f"{first}language_model." + ("" if naming else "model.")
    clip, text = config.vision, config.text
    patch, places = (clip.width, clip.channels, clip.patch_size, clip.patch_size), (1 + clip.patches, clip.width)
    found = [
        reshaped(f"{vision}embeddings.class_embedding", "vision/class_token", (clip.width,), (clip.width,)),
        Entry(f"{vision}embeddings.patch_embedding.weight", "vision/patch_embed/kernel", patch, (2, 3, 1, 0),
              (clip.patch_size**2 * clip.channels, clip.width)),
        reshaped(f"{vision}embeddings.position_embedding.weight", "vision/position", places, places),
        *layer_norm(f"{vision}pre_layrnorm", "vision/first_norm", clip.width),
        *blocks(f"{vision}encoder.layers", "vision/blocks", clip.depth, clip.block("float32"), CLIP),
    ]  # fmt: skip
    for number, inputs in ((1, clip.width), (2, text.width)):
        found += linear(f"{first}multi_modal_projector.linear_{number}", f"projector/fc{number}", inputs, text.width)
    table = (text.vocabulary, text.width)
    found.append(reshaped(f"{language}embed_tokens.weight", "language/table", table, table))
    for number in range(text.depth):
        found += _decoder_block(f"{language}layers.{number}", f"language/layer_{number}", text)
    found.append(reshaped(f"{language}norm.weight", "language/norm/scale", (text.width,), (text.width,)))
    if not text.tied:
        head = "lm_head" if naming else "language_model.lm_head"
        found.append(linear(head, "language/head", text.width, text.vocabulary)[0])
    return found


def _decoder_block(name: str, path: str, config: LlamaConfig) -> list[Entry]:
    width, depth = config.width, config.head_width
    maps = (
        ("self_attn.q_proj", "query", width, (config.heads, depth)),
        ("self_attn.k_proj", "key", width, (config.key_heads, depth)),
        ("self_attn.v_proj", "value", width, (config.key_heads, depth)),
        ("self_attn.o_proj", "out", config.heads * depth, (width,)),
        ("mlp.gate_proj", "gate", width, (config.hidden,)),
        ("mlp.up_proj", "up", width, (config.hidden,)),
        ("mlp.down_proj", "down", config.hidden, (width,)),
    )
    found = []
    for theirs, ours, inputs, target in maps:
        outputs = target[0] * (target[1] if len(target) > 1 else 1)
        found.append(linear(f"{name}.{theirs}", f"{path}/{ours}", inputs, outputs, target)[0])
    for theirs, ours in (("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
        found.append(reshaped(f"{name}.{theirs}.weight", f"{path}/{ours}/scale", (width,), (width,)))
    return found


def make_llava_model(config: LlavaConfig, parts: Collection[str]) -> Model:
    """Return the model, which is always whole."""
    return make_model(Llava(config))


def preprocess(config: LlavaConfig) -> Preprocess:
    """Return what CLIP's processor does: the shorter side resized, the middle cut out, CLIP's mean and deviation."""
    size = config.vision.image_size
    return Preprocess(
        (size, size), config.vision.channels, axes="xyz", fit="cover", shorter=size, interpolation="bicubic",
        intensity=CLIP_INTENSITY, order="cut-then-scale",
    )  # fmt: skip


def notes(config: LlavaConfig, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what a file does not."""
    return ("pictures are prepared as CLIP's processor does by default; preprocessor_config.json is not read",)


def describe(config: LlavaConfig, parts: Collection[str], task: Task | None) -> list[tuple[str, str]]:
    """Return the lines of `jaxmed weights show` on kind and sizes."""
    clip, text = config.vision, config.text
    return [
        ("kind", "multimodal model: for mupm answer --model llava"),
        ("input", f"pictures of {clip.image_size} x {clip.image_size} pixels, which become {clip.tokens} tokens"),
        ("image transformer", f"width {clip.width}, {clip.depth} blocks, hidden state {clip.layer}"),
        ("decoder", f"width {text.width}, {text.depth} blocks, {text.heads} heads, {text.key_heads} of keys"),
        ("vocabulary", f"{text.vocabulary:,} tokens, placeholder {config.image_token}"),
    ]


def own_record(where: str, run: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """No run trains such a model."""
    return None


FAMILY = Family(
    name=NAME,
    title="LLaVA-1.5 and others of its kind: CLIP, projector and Llama (arXiv:2310.03744)",
    licence="the Llama 2 community licence for LLaVA-1.5; of other decoders their own",
    where="llava-hf/llava-1.5-7b-hf and its like on the Hugging Face hub: the whole folder, with config.json",
    keys=(
        "vision_tower.vision_model.*, multi_modal_projector.linear_{1,2}.*, "
        "language_model.model.{embed_tokens,norm}.*, language_model.model.layers.N."
        "{self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj,input_layernorm,"
        "post_attention_layernorm}, language_model.lm_head.*; or the same under model., with lm_head.*"
    ),
    kinds=KINDS,
    recognises=recognises,
    infer=infer,
    facts=facts,
    entries=entries,
    make_model=make_llava_model,
    preprocess=preprocess,
    notes=notes,
    describe=describe,
    own_record=own_record,
    counters=(r".*vision_tower\.(vision_model\.)?post_layernorm\.(weight|bias)", r".*position_ids", r".*inv_freq"),
    naming=naming,
    renames=renames,
)
