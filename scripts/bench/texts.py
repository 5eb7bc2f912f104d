"""The prompts and real answers of a run as .jsonl: python texts.py RUN FILE"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq

run, path = Path(sys.argv[1]), Path(sys.argv[2])
rows = pq.read_table(run / "data" / "train.parquet", columns=["example_id", "prompt", "real"]).to_pylist()
named = [{"id": row["example_id"], "prompt": row["prompt"], "response": row["real"]} for row in rows]
path.write_text("".join(json.dumps(row) + "\n" for row in named))
