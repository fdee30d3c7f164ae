"""Runs a script as torchrun would, on one GPU that all ranks share:

    torchrun --nproc-per-node 2 tests/gpu/shared_gpu.py SCRIPT [ARGUMENT ...]
    torchrun --nproc-per-node 2 tests/gpu/shared_gpu.py -m MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))
from tests.devices import be_a_host

os.environ["LOCAL_RANK"] = "0"
be_a_host(int(os.environ["RANK"]))
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
