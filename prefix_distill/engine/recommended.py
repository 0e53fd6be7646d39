"""The sampling that a model's own generation config recommends."""

from dataclasses import dataclass, replace

from .models import Model
from .sampling import Sampler

TOP_K = 50  # of transformers' generate, if a generation config that samples names no top-k
# settings of a generation config that a Sampler does not have, and the values that change nothing
WITHOUT_EFFECT = {
    "min_p": (0, 0.0),
    "typical_p": (1, 1.0),
    "repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
}


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """Temperature, top-p and top-k of a generation config; ``left_out``: what else it sets."""

    temperature: float
    top_p: float
    top_k: int
    left_out: dict[str, float]

    def applied_to(self, sampler: Sampler) -> Sampler:
        """Return the sampler with these settings."""
        return replace(sampler, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def describe(self) -> str:
        """Return the settings in words."""
        text = (
            f"temperature {self.temperature:g}, top-p {self.top_p:g}, top-k {self.top_k or 'off'}"
        )
        if self.left_out:
            named = ", ".join(f"{name} {value}" for name, value in self.left_out.items())
            text += f"; not applied: {named}"
        return text


def read_recommended(model: Model) -> Recommended:
    """Return what transformers' generate would do with the model's generation config."""
    config = model.generation_config
    left_out: dict[str, float] = {}
    for name, neutral in WITHOUT_EFFECT.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            left_out[name] = value
    if not config.do_sample:
        return Recommended(temperature=0.0, top_p=1.0, top_k=0, left_out=left_out)
    temperature, top_p, top_k = config.temperature, config.top_p, config.top_k
    return Recommended(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=TOP_K if top_k is None else int(top_k),
        left_out=left_out,
    )
