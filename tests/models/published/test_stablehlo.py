"""A classifier as StableHLO: the same numbers for any batch size, everything to feed it beside it, and no mix-ups."""

import dataclasses
import json

import jax
import jax.export
import numpy as np
import pytest
from tiny_tangerine import CLASSES, SIZE, VALUES, classifier, cubes, masked_autoencoder, scan

from jaxmed.arrays.task import predict_values
from jaxmed.errors import InputError
from jaxmed.models.published import stablehlo
from jaxmed.models.published.stablehlo import export_stablehlo, load_stablehlo


@pytest.fixture(scope="module")
def published():
    return classifier(CLASSES)


@pytest.fixture(scope="module")
def exported(published, tmp_path_factory):
    return export_stablehlo(published, tmp_path_factory.mktemp("export") / "model.stablehlo")


def direct(published, images):
    return predict_values(jax.jit(published.model.apply)(published.params, images)[0], published.task)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_file_gives_the_numbers_of_the_model(published, exported, batch):
    model = load_stablehlo(exported)
    np.testing.assert_allclose(model(cubes(batch)), direct(published, cubes(batch)), atol=1e-6, rtol=0)


def test_the_file_runs_with_jax_alone_on_every_platform(published, exported):
    program = jax.export.deserialize(bytearray(exported.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert len(program.in_avals) == 1  # parameters are inside
    np.testing.assert_allclose(program.call(cubes()), direct(published, cubes()), atol=1e-6, rtol=0)
    assert program.mlir_module_serialized[:4] == b"ML\xefR"


def test_the_json_file_says_how_to_feed_it_and_what_comes_out(published, exported):
    record = json.loads(exported.with_suffix(".json").read_text())
    assert record["input"]["shape"] == ["batch", *SIZE, 1] and record["input"]["range"] == [0.0, 1.0]
    assert record["output"] == {"shape": ["batch", 3], "names": list(CLASSES.names), "unit": "probability"}
    told = record["preprocess"]
    assert {name: told[name] for name in ("size", "axes", "fit", "interpolation", "edge")} == {
        "size": [16, 16, 16], "axes": "zyx", "fit": "stretch", "interpolation": "bspline", "edge": "clamp"
    }  # fmt: skip
    assert (told["intensity"]["kind"], told["intensity"]["window"]) == ("window", [-1200.0, 800.0])
    assert record["licence"] == "for tests only" and record["versions"]["jax"]
    model = load_stablehlo(exported)
    assert model.task == CLASSES
    np.testing.assert_array_equal(model.preprocess(scan()), published.preprocess(scan()))


def test_long_sequences_take_blocks_on_every_platform(published, monkeypatch, tmp_path):
    monkeypatch.setattr(stablehlo, "LONG", 10)
    regressor = classifier(VALUES)
    model = load_stablehlo(export_stablehlo(regressor, tmp_path / "model.stablehlo"))
    assert model.record["config"]["encoder"]["attention"] == "blocks"
    np.testing.assert_allclose(model(cubes()), direct(regressor, cubes()), atol=1e-4, rtol=1e-6)  # about 60 years
    assert model.record["output"]["unit"] == "unit of the labels"


def test_a_file_and_the_json_of_another_are_not_mixed_up(exported, tmp_path):
    content = bytearray(exported.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.stablehlo").write_bytes(content)
    (tmp_path / "model.json").write_bytes(exported.with_suffix(".json").read_bytes())
    with pytest.raises(InputError, match="the file that model.json describes, found another checksum"):
        load_stablehlo(tmp_path / "model.stablehlo")
    (tmp_path / "model.json").unlink()
    with pytest.raises(InputError, match="model.json: expected a JSON file, found no such file"):
        load_stablehlo(tmp_path / "model.stablehlo")


def test_what_cannot_be_exported_is_refused(published, tmp_path):
    with pytest.raises(InputError, match="a file name that ends in .stablehlo"):
        export_stablehlo(published, tmp_path / "model.onnx")
    for other in (masked_autoencoder(), dataclasses.replace(published, task=None)):
        with pytest.raises(InputError, match="classifier"):
            export_stablehlo(other, tmp_path / "model.stablehlo")
    assert not list(tmp_path.iterdir())
