"""What `plan` prints: the stages of a run and how each stands, and what is left may cost; for people or programs."""

import json
from collections import Counter

from spin_reg import asking, estimate, launch, processes, space
from spin_reg.fingerprint import plain
from spin_reg.launch import Planned
from spin_reg.sheet import short


def show(planned: Planned) -> None:
    """A line a stage, then tokens, memory, time and disk."""
    width = max(len(stage.name) for stage in planned.stages)
    print(f"run {short(planned.root)}")
    for stage, state in zip(planned.stages, planned.states, strict=True):
        print(f"  {state.status:5}  {stage.name:{width}}  {state.reason}")
    needed, room = launch.disk(planned), space.human(space.free(planned.outputs))
    counts = Counter(state.status for state in planned.states)
    print("  " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    if planned.stop is not None:
        print(f"  stopped {planned.stop.words()}")
    tokens, memory, helps, asked = launch.estimates(planned)
    print(f"  tokens: {tokens.words()}")
    if asked.calls or asked.cached:
        print(f"  judge: {asking.words(planned.config.evaluation.judge, asked)}")
    if how := processes.words(planned.config.hardware):
        print(f"  processes: {how}")
    print(f"  memory: {memory.words(estimate.room(), helps)}")
    print(f"  time: {launch.time_left(planned).words()}")
    print(f"  disk: {needed.words()}; {room} free")


def show_json(planned: Planned) -> None:
    """The same as one JSON object on a line: bytes, tokens and seconds as numbers."""
    tokens, memory, helps, asked = launch.estimates(planned)
    stages = [
        {"name": stage.name, "status": state.status, "reason": state.reason}
        for stage, state in zip(planned.stages, planned.states, strict=True)
    ]
    found = {"run": planned.root, "finished": planned.finished, "stages": stages, "tokens": tokens}
    found |= {"stopped": None if planned.stop is None else planned.stop.words(), "judge": asked}
    found |= {
        "memory": dict(memory.by_kind),
        "room": estimate.room(),
        "memory_help": helps,
        "time": launch.time_left(planned),
    }
    found |= {"processes": planned.config.hardware.processes, "threads": processes.threads(planned.config.hardware)}
    found |= {"disk": launch.disk(planned), "free": space.free(planned.outputs)}
    print(json.dumps(plain(found), ensure_ascii=False, allow_nan=False))
