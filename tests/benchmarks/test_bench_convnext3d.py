"""The benchmark of ConvNeXt V2 compares like with like: jaxmed's loss and plain PyTorch's, of the same weights."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.arrays.masking import draw_noise
from jaxmed.models.fcmae import fcmae_model
from jaxmed.objectives.masked import masked_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.peers
def test_plain_pytorch_has_the_loss_of_the_model(monkeypatch):
    """Weights and hidden patches are the same."""
    import torch

    bench = importlib.import_module("bench_convnext3d")
    ((_, config, batch),) = bench.WORKLOADS["smoke"]
    model, volumes = fcmae_model(config), bench.smooth_noise(batch, config.encoder)
    params = jax.jit(model.network.init)(jax.random.key(0))
    plain = bench.plain_fcmae(config)

    def put(ours, theirs, names=("kernel", "bias")):
        for name, tensor in zip(names, theirs, strict=True):
            value = np.asarray(ours[name])
            value = np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim == 5 else value.T
            tensor.data.copy_(torch.from_numpy(value.copy()))

    def put_block(ours, block):
        put(ours["depthwise"], (block.depthwise.weight, block.depthwise.bias))
        put(ours["fc1"], (block.fc1.weight, block.fc1.bias))
        put(ours["fc2"], (block.fc2.weight, block.fc2.bias))

    encoder, decoder = params["encoder"], params["decoder"]
    for stage, blocks in enumerate(plain.stages):
        put(encoder[f"downsample_{stage}"], (plain.coarsen[stage].weight, plain.coarsen[stage].bias))
        put_block(encoder[f"block_{stage}"], blocks[0])
    put(decoder["embed"], (plain.embed.weight, plain.embed.bias))
    put(decoder["prediction"], (plain.predict.weight, plain.predict.bias))
    put_block(decoder["block_0"], plain.decoder[0])
    plain.mask_token.data.copy_(torch.from_numpy(np.array(decoder["mask_token"])))
    keys = jax.random.split(jax.random.key(1), batch)
    noise = np.asarray(draw_noise(keys, model.num_tokens))
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.from_numpy(noise.copy()))
    expected = plain(torch.from_numpy(np.moveaxis(volumes, -1, 1).copy())).item()
    loss, _ = jax.jit(lambda params: masked_loss(model, params, keys, {"image": jnp.asarray(volumes)}))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_operations_are_those_of_a_small_model_counted_by_hand():
    bench = importlib.import_module("bench_convnext3d")
    config = bench.SMOKE
    places, widths = (4 * 8 * 8, 2 * 4 * 4, 1 * 2 * 2, 1 * 2 * 2), (16, 32, 48, 64)
    coarsen = 2 * 256 * 64 * 3 * 16 + 2 * 32 * 8 * 16 * 32 + 2 * 4 * 8 * 32 * 48 + 2 * 4 * 48 * 64
    blocks = sum(2 * p * w * (343 + 8 * w) for p, w in zip(places, widths, strict=True))
    decoder = 2 * 4 * 64 * 32 + 2 * 4 * 32 * (343 + 8 * 32) + 2 * 4 * 32 * 16**3 * 3
    np.testing.assert_allclose(bench.count_flops(config), 3 * (coarsen + blocks + decoder), rtol=1e-12)
