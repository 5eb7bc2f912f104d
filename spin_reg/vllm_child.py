"""Answers by vLLM. A program for the interpreter that has vLLM, which need not have spin_reg: it imports none of it.

A line on standard input is a request, a line on standard output a reply, both JSON. What libraries print goes to
standard error. The first request says what is loaded, the others hold prompts as token ids, and a seed for each:

    {"model": FOLDER, "adapter": [FOLDER, RANK] or null, "engine": {...}, "sampling": {...}, "cpu": true}
                                                              -> {"ready": VERSION}
    {"prompts": [[1, 2], ...], "seeds": [3, ...]}             -> {"ended": 1}, ... as answers end, and then
                                                                 {"answers": [[token ids, "stop" or "length"], ...]}

It ends with its standard input, so that it never outlives who started it.
"""

import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the sizes of room for an adapter that vLLM has


def loaded(asked: Request) -> tuple[str, Callable[[Request, Callable[[int], None]], list[tuple[list[int], str]]]]:
    """The version of vLLM, and a function from a request to its answers, which tells how many have ended.

    `ignore_eos`: an answer ends at the tokens that were given, not at others that vLLM finds in the model's folder.
    """
    vllm = importlib.import_module("vllm")
    adapter, room = None, dict[str, Any]()
    if asked["adapter"] is not None:
        folder, rank = asked["adapter"]
        adapter = importlib.import_module("vllm.lora.request").LoRARequest("iterate", 1, folder)
        room |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(size for size in RANKS if size >= rank)}
    if asked["cpu"]:
        room["enable_chunked_prefill"] = False  # after half a prompt it sets the draws back: on a CPU it cannot
    llm = vllm.LLM(
        model=asked["model"],
        skip_tokenizer_init=True,
        load_format="safetensors",  # nothing is unpickled
        generation_config="vllm",  # nor does the model's own change how it is drawn from
        enable_prefix_caching=False,  # what was asked before must not matter
        enforce_eager=asked["cpu"],  # compiling takes longer there than a stage
        disable_log_stats=True,
        seed=0,
        **room,
        **asked["engine"],
    )

    def answers(request: Request, ended: Callable[[int], None]) -> list[tuple[list[int], str]]:
        how = [
            vllm.SamplingParams(seed=seed, detokenize=False, ignore_eos=True, **asked["sampling"])
            for seed in request["seeds"]
        ]
        llm.enqueue(
            [{"prompt_token_ids": prompt} for prompt in request["prompts"]],
            how,
            lora_request=adapter,
            use_tqdm=False,
        )
        found: dict[int, tuple[list[int], str]] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    (answer,) = output.outputs
                    found[int(output.request_id)] = list(answer.token_ids), str(answer.finish_reason)
                    ended(len(found))
        return [found[i] for i in sorted(found)]

    return str(vllm.__version__), answers


def requests() -> "queue.Queue[Request]":
    """What comes on standard input, read by a thread of its own; the process ends with it, whatever it is doing."""
    found: queue.Queue[Request] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return found


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))  # else its neighbours could be taken for what vLLM imports
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**reply: Any) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    asked = requests()
    version, answers = loaded(asked.get())
    say(ready=version)
    while True:
        say(answers=answers(asked.get(), lambda count: say(ended=count)))


if __name__ == "__main__":
    main()
