"""PPO's losses in PyTorch, written from the papers for parity tests; torch is imported by the caller's test alone."""

import math


def torch_losses(batch, clip, value_weight, entropy_weight, plain_value, normalise=True):
    """Return the loss and its parts for a diagonal normal policy whose outputs are leaves of the graph.

    Args:
        batch: Tensors mean, log_std, value_new (all with gradients), action, log_prob, value, advantage, target.
        clip: Of ratios and values.
        value_weight: Of the value's loss.
        entropy_weight: Of the entropy.
        plain_value: Mean squared error instead of half the larger of two.
        normalise: Advantages.
    """
    import torch

    mean, log_std, value = batch["mean"], batch["log_std"], batch["value_new"]
    law = torch.distributions.Normal(mean, log_std.exp())
    log_prob = law.log_prob(batch["action"]).sum(dim=1)
    advantage = batch["advantage"]
    if normalise:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = torch.exp(log_prob - batch["log_prob"])
    policy = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
    if plain_value:
        value_loss = torch.nn.functional.mse_loss(value, batch["target"])
    else:
        near = batch["value"] + torch.clamp(value - batch["value"], -clip, clip)
        errors = torch.max((value - batch["target"]) ** 2, (near - batch["target"]) ** 2)
        value_loss = 0.5 * errors.mean()
    entropy = (0.5 + 0.5 * math.log(2 * math.pi) + log_std).expand_as(mean).sum(dim=1).mean()
    total = policy + value_weight * value_loss - entropy_weight * entropy
    return total, {"policy_loss": policy, "value_loss": value_loss, "entropy": entropy}
