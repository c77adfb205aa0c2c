"""LLaVA's files: three layouts read and written again bit for bit, folders of shards, and transformers' numbers."""

import dataclasses
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_weights import draw, draw_image
from tiny_llava import NAMINGS, SETTINGS, TINY, tensors_of, write_llava

from jaxmed.errors import InputError
from jaxmed.io import safetensors
from jaxmed.models.llama import LlamaConfig
from jaxmed.models.llava import LLAVA_15_7B, ClipConfig, LlavaConfig, Sampling, Texts, answer_texts, read_prefix
from jaxmed.models.published import llava
from jaxmed.models.published.load import export_published, load_published
from jaxmed.weights import describe

REFERENCES = Path(__file__).resolve().parents[2] / "references"
OLD = "language_model.model.layers.0.self_attn.q_proj.weight"
NEW = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_folder_of_every_layout_is_read_and_written_again(tmp_path, naming):
    folder, tensors = write_llava(tmp_path / "hub", naming=naming), tensors_of(naming=naming)
    assert (NEW if naming else OLD) in tensors
    published = load_published(folder)
    assert (published.report.family, published.report.left_over, published.naming) == ("llava", (), naming)
    assert published.config == TINY and len(published.extras) == 2
    assert "4 tokens" in describe(published, folder)
    export_published(published, tmp_path / "again.safetensors")
    again = safetensors.read(tmp_path / "again.safetensors")
    assert set(again) == set(tensors)
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)
    # What was exported is one file, and is read without config.json.
    once_more = load_published(tmp_path / "again.safetensors")
    assert once_more.config == TINY and once_more.naming == naming
    for one, other in zip(jax.tree.leaves(once_more.params), jax.tree.leaves(published.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_picture_is_prepared_as_clips_processor_does(tmp_path):
    published = load_published(write_llava(tmp_path))
    picture = np.random.default_rng(0).integers(0, 256, (28, 40, 3)).astype(np.uint8)
    found = published.preprocess(picture.astype(np.float32) / 255)
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(found, (picture[:, 6:34] / 255 - mean) / deviation, atol=1e-5)


def change(path, **more):
    settings = json.loads((path / "config.json").read_text())
    for name, value in more.items():
        part, _, field = name.rpartition("__")
        (settings[part] if part else settings)[field] = value
    (path / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text_config__model_type": "mistral"}, "expected 'model_type' llama, found mistral"),
        ({"vision_config__model_type": "siglip_vision_model"}, "expected 'model_type' clip_vision_model"),
        ({"vision_feature_layer": [-2, -5]}, "expected one hidden state under 'vision_feature_layer'"),
        ({"projector_hidden_act": "relu"}, "expected 'projector_hidden_act' gelu, found relu"),
        ({"text_config__rope_parameters": {"rope_type": "yarn"}}, "expected 'rope_type' default, found yarn"),
        ({"text_config__num_attention_heads": "four"}, "expected a number under 'num_attention_heads'"),
        ({"text_config": None}, "expected weights with their config.json"),
        ({"vision_feature_layer": 9}, "expected weights of a possible network"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path, more, message):
    folder = write_llava(tmp_path / "hub")
    change(folder, **more)
    with pytest.raises(InputError) as caught:
        load_published(folder)
    assert message in str(caught.value)


def test_a_shard_that_is_missing_or_a_file_alone_is_told(tmp_path):
    folder = write_llava(tmp_path / "hub")
    one, other = sorted(folder.glob("*.safetensors"))
    with pytest.raises(InputError, match="weights with their config.json"):
        safetensors.write(tmp_path / "alone.safetensors", tensors_of())
        load_published(tmp_path / "alone.safetensors")
    twice = folder / "twice.safetensors"
    twice.write_bytes(one.read_bytes())
    with pytest.raises(InputError, match="which another file has too"):
        load_published(folder)
    twice.unlink()
    other.unlink()
    with pytest.raises(InputError, match="copy the missing files too"):
        load_published(folder)


def test_tied_embeddings_need_no_head(tmp_path):
    tied = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, tied=True))
    published = load_published(write_llava(tmp_path, tied, shards=1))
    assert published.config == tied and "head" not in published.params["language"]
    image = jnp.zeros((1, 28, 28, 3))
    found = published.model.apply(published.params, image, jnp.asarray([[1, 98, 98, 98, 98]]))
    assert found.shape == (1, 5, 99) and np.isfinite(np.asarray(found)).all()


def test_the_released_model_has_its_published_number_of_parameters():
    shapes = [entry.shape for entry in llava.entries(LLAVA_15_7B)]
    total = sum(int(np.prod(shape)) for shape in shapes)
    # 7,063,427,072 with the norm behind the image transformer's last block, which nothing applies.
    assert total + 2 * 1024 == 7_063_427_072


def test_logits_and_greedy_text_are_the_stored_ones_of_pytorch(tmp_path):
    """references/make_llava_logits.py asked transformers, under the weights that `tiny_llava` draws."""
    with np.load(REFERENCES / "llava.npz") as stored:
        tokens, wanted, said = stored["tokens"], stored["logits"], stored["said"]
    published, image = load_published(write_llava(tmp_path)), jnp.asarray(draw_image((28, 28)))
    found = published.model.apply(published.params, image, jnp.asarray(tokens))
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    prefix = read_prefix(published.model, published.params, image, jnp.asarray(tokens[:, :6]))
    texts = Texts(jnp.asarray(tokens[:, 6:]), jnp.full(1, 4))
    answers = answer_texts(published.model, published.params, published.config, prefix, texts,
                           jax.random.split(jax.random.key(0), 1), Sampling(6, end=-1))  # fmt: skip
    np.testing.assert_array_equal(np.asarray(answers), said)


# --- Live parity -----------------------------------------------------------------------------

HUGGING = {
    "vision": {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14, "projection_dim": 16,
    },
    "text": {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    },
}  # fmt: skip


def hugging_llava(**more):
    """Return transformers' model under drawn weights."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        vision = transformers.CLIPVisionConfig(**HUGGING["vision"])
        text = transformers.LlamaConfig(**HUGGING["text"], **more)
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=98, image_seq_length=4
        )
        model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
    return model


def write_hugging(model, folder, naming):
    """Write its weights in one of the layouts, and its config.json."""
    folder.mkdir()
    tensors = {}
    for name, value in model.state_dict().items():
        name = llava.plain_name(name)
        if naming != "newest":
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if naming:
            name = name if name.startswith("lm_head") else f"model.{name}"
        elif name.startswith("lm_head"):
            name = f"language_model.{name}"
        else:
            name = name.replace("language_model.", "language_model.model.", 1)
        tensors[name] = value.numpy()
    safetensors.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return folder


@pytest.mark.peers
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    "more", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}], ids=["theta-10000", "theta-500"]
)
def test_logits_and_greedy_text_are_transformers(tmp_path, naming, more):
    import torch

    model = hugging_llava(**more)
    published = load_published(write_hugging(model, tmp_path / "hub", naming))
    assert published.naming == naming and published.report.left_over == ()
    image = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype(np.float32)
    before = [1, 5, 98, 98, 98, 98]
    words = [[7, 9, 11, 60], [33, 4, 4, 90]]
    tokens = np.array([before + row for row in words])
    pixels = torch.from_numpy(np.moveaxis(image, -1, 1).copy())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = model(input_ids=torch.from_numpy(tokens), pixel_values=pixels).logits.numpy()
        model.generation_config.eos_token_id = None
        said = model.generate(input_ids=torch.from_numpy(tokens), pixel_values=pixels, max_new_tokens=8,
                              do_sample=False, pad_token_id=0).numpy()[:, tokens.shape[1] :]  # fmt: skip
    found = jax.jit(published.model.apply)(published.params, image, jnp.asarray(tokens))
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    prefix = read_prefix(published.model, published.params, jnp.asarray(image), jnp.asarray([before] * 2))
    texts = Texts(jnp.asarray(words), jnp.full(2, 4))
    answers = answer_texts(published.model, published.params, published.config, prefix, texts,
                           jax.random.split(jax.random.key(0), 2), Sampling(8, end=-1))  # fmt: skip
    np.testing.assert_array_equal(np.asarray(answers), said)


def test_the_settings_of_the_tiny_model_are_those_of_its_config():
    """What the other tests take for granted."""
    assert isinstance(TINY, LlavaConfig) and isinstance(TINY.text, LlamaConfig) and isinstance(TINY.vision, ClipConfig)
    assert llava.infer("here", tensors_of(), llava.Hints(settings=SETTINGS)) == TINY
