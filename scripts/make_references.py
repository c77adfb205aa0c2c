"""Write tests/references: small weights under published key names, and what PyTorch makes of them.

Needs PyTorch: scripts/test --peers installs it. The models are those of tests/support/torch_*.py, with random weights.
The references stay as they are while this script does; run it again after a change: python scripts/make_references.py
"""

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import torch_brain as brain  # noqa: E402
import torch_cocolit as cocolit  # noqa: E402
import torch_guided as guided  # noqa: E402
import torch_tangerine as tangerine  # noqa: E402
import torch_vit as vit  # noqa: E402
from drawn_weights import draw_image, draw_latent, draw_volume  # noqa: E402

from jaxmed.io import safetensors  # noqa: E402

FOLDER = ROOT / "tests" / "references"


def main() -> None:
    """Write every reference."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for seed, (name, sizes) in enumerate((("28", tangerine.MAE_28), ("24", tangerine.MAE_24))):
        write_tangerine_mae(name, sizes, seed)
    sizes = tangerine.MAE_24
    write_tangerine_classifier("linear", tangerine.Classifier(sizes, 3), 2)
    write_tangerine_classifier("mlp", tangerine.Classifier(sizes, 2, hidden=6), 3)
    write_tangerine_classifier("class", tangerine.Classifier(sizes, 4, pooling=False), 4)
    write_guided("plain", guided.PLAIN)
    write_guided("released", guided.RELEASED)
    write_guided("volume", guided.VOLUME, (3, 4, 2))
    write_guided("thin", guided.THIN, (3, 4, 2))
    write_vit()
    write_brain()
    write_cocolit()


def write_tangerine_mae(name: str, sizes: tangerine.Sizes, seed: int) -> None:
    """Write a masked autoencoder as its authors save it, and its outputs on two images."""
    model = tangerine.randomise(tangerine.Mae(sizes), seed)
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand((2, 1, *(sizes.image,) * 3), generator=generator)
    noise = torch.rand((2, sizes.grid**3), generator=generator)
    with torch.no_grad():
        tokens, mask, prediction, loss = model(image, noise)
    arguments = argparse.Namespace(model="mae_vit_large_patch16", batch_size=14)
    saved = {"model": model.state_dict(), "epoch": 399, "scaler": {"scale": 65536.0}, "args": arguments}
    torch.save(saved, FOLDER / f"tangerine_mae_{name}.pth")
    write_outputs(f"tangerine_mae_{name}", image=image, noise=noise, tokens=tokens, mask=mask, prediction=prediction,
                  loss=loss)  # fmt: skip


def write_tangerine_classifier(name: str, model: tangerine.Classifier, seed: int) -> None:
    """Write a classifier as safetensors, and its outputs on two images in evaluation mode."""
    tangerine.randomise(model, seed)
    image = torch.rand((2, 1, *(model.sizes.image,) * 3), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features, logits = model(image)
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    safetensors.write(FOLDER / f"tangerine_{name}.safetensors", tensors)
    write_outputs(f"tangerine_{name}", image=image, features=features, logits=logits)
    if isinstance(model.head, torch.nn.Linear):
        with torch.no_grad():
            embeddings = model.embeddings(image)
        write_outputs(f"tangerine_{name}_embeddings", image=image, **embeddings)


def write_guided(name: str, sizes: guided.Sizes, space: tuple[int, ...] = ()) -> None:
    """Write what every part of a U-Net returns; its weights are drawn from their names, and not stored."""
    model = guided.fill(guided.Unet(sizes))
    space = space or (8,) * sizes.dimensions
    image = torch.rand((2, sizes.channels, *space), generator=torch.Generator().manual_seed(0))
    time = torch.tensor([3.0, 721.0])
    with torch.no_grad():
        output, trace = model(image, time)
    channels_last = {key: value.movedim(1, -1) for key, value in trace.items()}
    write_outputs(f"guided_{name}", image=image, time=time, output=output.movedim(1, -1), **channels_last)


def write_vit() -> None:
    """Write the tokens of 2D transformers at their own image size, after every block, and the last ones at others."""
    found: dict[str, np.ndarray] = {}
    for name, sizes in vit.RUNS.items():
        model = vit.make(name)
        shapes = {key: value.shape for key, value in vit.tensors(model).items()}
        found[f"{name}/names"] = np.array(sorted(f"{key} {tuple(shape)}" for key, shape in shapes.items()))
        for number, size in enumerate(sizes):
            states, last = vit.run(model, draw_image(size))
            place = f"{name}/{size[0]}x{size[1]}"
            found[f"{place}/last"] = last.numpy()
            if number == 0:
                found |= {f"{place}/{depth}": state.numpy() for depth, state in enumerate(states)}
    np.savez_compressed(FOLDER / "vit.npz", **found)


def write_brain() -> None:
    """Write every 7th voxel of a brain network's maps, of volumes of an even and an odd size, and a checkpoint.

    The checkpoint is as the authors save it; its arguments are instances of classes that are nowhere else.
    """
    model, found = brain.BrainNet(8, 3), {}
    for size in ((32, 32, 32), (37, 41, 33)):
        maps, features = brain.run(model, draw_volume(size))
        place = "x".join(map(str, size))
        found[f"{place}/bottleneck"] = features[0][::2, ::2, ::2]
        found |= {f"{place}/{name}": value[::7, ::7, ::7] for name, value in maps.items()}
        found[f"{place}/feature"] = features[-1][::7, ::7, ::7]
    np.savez_compressed(FOLDER / "brainfm.npz", **found)
    module = types.ModuleType("utils_of_nobody")
    module.Arguments = type("Arguments", (), {"__module__": "utils_of_nobody"})
    sys.modules["utils_of_nobody"] = module
    arguments, small = module.Arguments(), brain.BrainNet(8, 2, {**brain.HEADS, "thickness": 2})
    arguments.unit_feat, arguments.size = True, (160, 160, 160)
    saved = {"model": small.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    saved |= {"submit_args": argparse.Namespace(port=0), "gen_args": arguments, "train_args": arguments}
    torch.save(saved | {"best_val_stats": {"T1": 0.1}}, FOLDER / "brainfm.pth")


def write_cocolit() -> None:
    """Write what MONAI's autoencoder, and its U-Net with a ControlNet, return; weights are drawn from their names."""
    image = draw_latent((10, 13, 12), 1)
    found = {
        f"autoencoder/{name}": value for name, value in cocolit.run_autoencoder(cocolit.autoencoder(), image).items()
    }
    for name, space, changes in (
        ("volume", (4, 2, 6), {}),
        ("picture", (6, 4), {"include_fc": True, "use_combined_linear": True, "resblock_updown": False}),
    ):
        networks = cocolit.networks(len(space), **changes)
        outputs = cocolit.run_networks(*networks, draw_latent(space, 3), draw_latent(space, 2, 1))
        found |= {f"{name}/{part}": value for part, value in outputs.items()}
    np.savez_compressed(FOLDER / "cocolit.npz", **found)


def write_outputs(name: str, **tensors: torch.Tensor) -> None:
    """Write what goes into a model and what comes out, channels last as this package has them."""
    arrays = {key: value.numpy() for key, value in tensors.items()}
    arrays["image"] = np.moveaxis(arrays["image"], 1, -1)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
