#!/usr/bin/env python3
"""Write tests/golden_experiments.json anew: the result-changing settings of the defaults and of every experiment.

    python scripts/golden.py

Its diff shows what an edit in conf/ changes; commit it together with the edit.
"""

import json
from pathlib import Path

from hydra import compose, initialize_config_dir

from spin_reg import config, overrides

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    config.register()
    overrides.register_help(ROOT / "conf")
    names = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
    golden = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name in ["default", *names]:
            words = [] if name == "default" else [f"experiment={name}"]
            golden[name] = config.identity_settings(config.load(compose("config", words)))
    (ROOT / "tests" / "golden_experiments.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
