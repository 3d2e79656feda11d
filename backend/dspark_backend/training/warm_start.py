"""What a drafter starts from: the target's last layers, reading the target's own features."""

from __future__ import annotations

import torch

from dspark_backend.checkpoint.safetensors import TensorStore
from dspark_backend.drafter.model import DraftModel


def warm_start(model: DraftModel, target: TensorStore, seed: int = 0) -> None:
    """Initialise ``model`` from the target's tensors.

    Draft layers are copies of the target's last ones; ``fc`` passes the last tap on and
    ``hidden_norm`` is the first copied layer's input norm, so that before the first step a draft
    layer sees keys and values much like those that the copied layer saw. ``W2`` is zero: the
    drafter starts without a bias of the token before.
    """
    config = model.config
    first = config.num_target_layers - config.shape.num_layers
    width = config.shape.hidden_size
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            prefix = f"model.layers.{first + index}."
            for name, parameter in layer.named_parameters():
                parameter.copy_(target.get(prefix + name))
        model.fc.weight.zero_()
        model.fc.weight[:, -width:] = torch.eye(width)
        model.hidden_norm.weight.copy_(target.get(f"model.layers.{first}.input_layernorm.weight"))
        model.norm.weight.copy_(target.get("model.norm.weight"))
        if model.markov_head is not None:
            for parameter in model.markov_head.parameters():
                parameter.zero_()
                if parameter.dim() == 2:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
            model.markov_head.markov_w2.weight.zero_()
        if model.confidence_head is not None:
            model.confidence_head.proj.weight.zero_()
            model.confidence_head.proj.bias.zero_()
