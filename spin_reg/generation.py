"""How answers are drawn: the settings, and what the engine that draws them can do."""

import math
from dataclasses import dataclass
from enum import StrEnum

from spin_reg.settings import Model, Pretrained, Quantize, check, later, positive, runtime

COOLEST, HOTTEST = 0.01, 2.0  # below the first vLLM draws at it without a word, above the second it does not


class Backend(StrEnum):
    """Who draws: our sampler over transformers (spin_reg/sampling.py), or vLLM in processes of its own."""

    transformers = "transformers"
    vllm = "vllm"


@dataclass
class Generation:
    """How answers are drawn; `max_new_tokens` null means `dataset.max_response_tokens`.

    Temperature 0 takes the likeliest token each time: for evaluations alone, `config.load` refuses it for the game.
    `python`: the interpreter that has vLLM, null: the one that runs this.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    batch_size: int = runtime(32)
    backend: Backend = later(Backend.transformers)
    python: str | None = runtime(None)

    def __post_init__(self) -> None:
        ok = math.isfinite(self.temperature) and self.temperature >= 0
        check(ok, f"generation.temperature={self.temperature}: give a number above 0 (1 samples the policy itself)")
        check(0 < self.top_p <= 1, f"generation.top_p={self.top_p}: give a number above 0, up to 1")
        positive(generation__max_new_tokens=self.max_new_tokens, generation__batch_size=self.batch_size)
        message = f"generation.python={self.python}: it is vLLM's interpreter; set generation.backend=vllm, or leave it"
        check(self.python is None or self.backend is Backend.vllm, f"{message} out")


def check_engine(generation: Generation, model: Model, matched: float) -> None:
    """Refuse what vLLM would draw from another policy than the one that is scored and trained.

    Args:
        matched: the temperature of answers whose results are compared with the real ones.

    Raises:
        ValueError: such a setting is there.
    """
    if generation.backend is not Backend.vllm:
        return
    for key, value in (("generation", generation.temperature), ("evaluation.exact_match", matched)):
        ok = value == 0 or COOLEST <= value <= HOTTEST
        check(ok, f"{key}.temperature={value}: vLLM draws at temperatures from {COOLEST} to {HOTTEST:g}")
    if not isinstance(model, Pretrained):
        return
    why = "generation.backend=vllm reads safetensors alone; use generation.backend=transformers"
    check(model.gguf_file is None, f"model.gguf_file={model.gguf_file}: {why}")
    why = "generation.backend=vllm would draw from other weights; use generation.backend=transformers"
    check(model.lora.quantize is Quantize.none, f"model.lora.quantize={model.lora.quantize}: {why}")
