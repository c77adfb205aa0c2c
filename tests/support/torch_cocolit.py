"""MONAI's autoencoder, U-Net and ControlNet under weights drawn from their names: what jaxmed is compared with."""

import numpy as np
import torch
from drawn_weights import draw
from functorch.einops import rearrange
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.blocks import selfattention
from monai.networks.nets.controlnet import ControlNet
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, get_timestep_embedding  # noqa: F401


class Rearrange(torch.nn.Module):
    """What MONAI takes of einops, which nothing else here needs; PyTorch has its function."""

    def __init__(self, pattern, **lengths):
        super().__init__()
        self.pattern, self.lengths = pattern, lengths

    def forward(self, x):
        return rearrange(x, self.pattern, **self.lengths)


selfattention.Rearrange = Rearrange

# As the released networks, but for sizes; `num_head_channels` of levels without attention is not looked at.
UNET = {
    "in_channels": 3, "num_res_blocks": (1, 2), "channels": (32, 64), "attention_levels": (False, True),
    "num_head_channels": 32, "resblock_updown": True, "include_fc": False,
}  # fmt: skip
CONTROL = {"conditioning_embedding_in_channels": 2, "conditioning_embedding_num_channels": (32,)}
AUTOENCODER = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "num_channels": (32, 64),
    "num_res_blocks": (1, 2), "attention_levels": (False, False), "num_splits": 1,
}  # fmt: skip
RELEASED_UNET = {
    "spatial_dims": 3, "in_channels": 4, "num_res_blocks": 2, "channels": (256,) * 3,
    "attention_levels": (False, True, True), "num_head_channels": (0, 256, 256), "resblock_updown": True,
    "include_fc": False,
}  # fmt: skip
RELEASED_CONTROL = {"conditioning_embedding_in_channels": 4, "conditioning_embedding_num_channels": (256,)}
RELEASED_AUTOENCODER = {
    **AUTOENCODER, "latent_channels": 4, "num_channels": (64, 128, 256), "num_res_blocks": (2, 2, 2),
    "attention_levels": (False,) * 3,
}  # fmt: skip
TIMES = (3.0, 721.0)


def fill(model):
    """Draw every tensor, the ones that start at zero too."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
    return model.eval()


def autoencoder(**changes):
    return fill(AutoencoderKlMaisi(**{**AUTOENCODER, **changes}))


def networks(dimensions, control=None, **changes):
    """Return a U-Net and its ControlNet."""
    settings = {"spatial_dims": dimensions, **UNET, **changes}
    net = ControlNet(**settings, **{**CONTROL, **(control or {})})
    return fill(DiffusionModelUNet(**settings, out_channels=3)), fill(net)


def first(x):
    """Put channels first, as PyTorch's."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x):
    """Put channels last, as an array."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def run_autoencoder(model, image):
    """Return mean, deviation and the image of the mean."""
    with torch.no_grad():
        mean, deviation = model.encode(first(image))
        return {"mean": last(mean), "deviation": last(deviation), "image": last(model.decode(mean))}


def run_networks(unet, net, z, condition):
    """Return the prediction, that with residuals, and every residual."""
    times = torch.tensor(TIMES)
    with torch.no_grad():
        skips, middle = net(first(z), times, first(condition))
        plain = unet(first(z), times)
        controlled = unet(first(z), times, down_block_additional_residuals=skips, mid_block_additional_residual=middle)
    found = {"plain": last(plain), "controlled": last(controlled), "middle": last(middle)}
    return found | {f"skip_{number}": last(skip) for number, skip in enumerate(skips)}
