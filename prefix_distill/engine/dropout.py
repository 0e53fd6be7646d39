"""Turn dropout off."""

import torch

_DROPOUT = torch.nn.modules.dropout._DropoutNd


def turn_off_dropout(net: torch.nn.Module) -> None:
    """Set every dropout probability of the modules to 0; the config keeps its own.

    Transformers recomputes a layer only in training mode, and layers that call dropout as a
    function with their own flag would apply it then.
    """
    for module in net.modules():
        for key, value in vars(module).items():
            is_probability = "drop" in key or (key == "p" and isinstance(module, _DROPOUT))
            if is_probability and isinstance(value, float):
                setattr(module, key, 0.0)
