"""What ranks tell each other, in real processes over gloo; a rank that is slow trips no timeout of a collective."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spin_reg import ranks

TOLD = """
import json, sys, time
from datetime import timedelta
import torch.distributed as dist
from spin_reg import ranks
me, count, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=me, world_size=count,
                        timeout=timedelta(seconds=1))
said = [ranks.rank(), ranks.world(), ranks.is_main()]
polls = [0]
def poll():
    polls[0] += 1
if me == 1:
    time.sleep(2.5)
ranks.wait(poll)
for call in range(20):
    said.append(ranks.gathered({"from": me, "call": call}))
said.append(ranks.from_main(f"of {me}"))
class Enough(Exception): pass
def enough():
    raise Enough
if me == 0:
    try:
        ranks.wait(enough)
    except Enough:
        said.append("left")
print(json.dumps([said, polls[0]]))
"""


def test_one_process_is_rank_0_of_1() -> None:
    assert (ranks.rank(), ranks.world(), ranks.is_main()) == (0, 1, True)
    assert ranks.gathered({"a": 1}) == [{"a": 1}] and ranks.from_main("x") == "x"
    ranks.wait()


@pytest.mark.slow
def test_three_ranks_hear_each_other_and_wait_longer_than_a_collective_may(tmp_path: Path) -> None:
    import json

    words = [sys.executable, "-c", TOLD]
    started = [
        subprocess.Popen([*words, str(i), "3", str(tmp_path)], stdout=subprocess.PIPE, text=True, env=os.environ)
        for i in range(3)
    ]
    for i, process in enumerate(started):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        said, polls = json.loads(out)
        assert said[:3] == [i, 3, i == 0]
        assert said[3:23] == [[{"from": r, "call": call} for r in range(3)] for call in range(20)]
        assert said[23] == "of 0"
        assert said[24:] == (["left"] if i == 0 else [])
        assert (polls > 3) == (i != 1)
