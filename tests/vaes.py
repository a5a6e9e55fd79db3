"""Tiny autoencoders of random weights, as ComfyUI loads them."""

import torch


def taesd():
    """A VAE of a TAESD."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TAESD()
        for weight in network.parameters():
            if weight.ndim == 4:
                torch.nn.init.normal_(weight, std=(1.5 / weight[0].numel()) ** 0.5)
            elif weight.ndim == 1:
                torch.nn.init.normal_(weight, std=0.1)
    state = {name: t.detach().clone() for name, t in network.state_dict().items()}
    state["vae_scale"] = torch.tensor(0.18215)
    return comfy.sd.VAE(sd=state)
