"""Find the token that a chat template writes after an answer, and end responses with it."""

from ..engine.models import Model
from ..prompts.rendering import Renderer
from .run import Notes


def add_turn_end(renderer: Renderer, model: Model, notes: Notes) -> None:
    """Add the token that closes a turn to the model's EOS ids, if it is not one of them.

    Without it, responses would run past the end of every answer.
    """
    end = find_unnamed_turn_end(renderer, model)
    if end is None or end in model.eos:
        return
    model.eos |= {end}
    notes.note(f"model {model.name}: {describe_turn_end(model, end)}")


def find_unnamed_turn_end(renderer: Renderer, model: Model) -> int | None:
    """Return the token that closes a turn, if neither tokenizer nor generation config names it."""
    end = renderer.turn_end
    configured = model.generation_config.eos_token_id
    if not isinstance(configured, list):
        configured = [configured]
    if end is None or end in configured or end == model.tokenizer.eos_token_id:
        return None
    return end


def describe_turn_end(model: Model, end: int) -> str:
    """Describe a token that ends responses because the chat template closes turns with it."""
    token = model.tokenizer.convert_ids_to_tokens(end)
    return (
        f"its chat template ends a turn with {token} ({end}), which is no EOS id of its generation "
        "config; responses end with it too; add it to eos_token_id in generation_config.json"
    )
