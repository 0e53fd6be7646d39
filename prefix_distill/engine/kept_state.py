"""State that a network keeps outside its KV cache, from one call to the next.

Some multimodal models keep the offsets of their positions, and some recurrent ones their states, in
attributes of their modules. The next call, on other rows, would continue from them.
"""

from torch import Tensor
from torch.nn import Module

Blanks = dict[type[Module], set[str]]  # the attributes that are None at load, by class


def find_blanks(net: Module) -> Blanks:
    """Return the attributes that are None in all modules of a class before the first call."""
    blanks: Blanks = {}
    for module in net.modules():
        if not type(module).__module__.startswith("torch."):
            names = {name for name, value in vars(module).items() if value is None}
            blanks[type(module)] = names & blanks.get(type(module), names)
    return blanks


def forget_state(net: Module, blanks: Blanks) -> None:
    """Set the attributes in ``blanks`` that hold a tensor to None; parameters and buffers stay."""
    for module in net.modules():
        for name in blanks.get(type(module), ()):
            if isinstance(vars(module).get(name), Tensor):
                setattr(module, name, None)
