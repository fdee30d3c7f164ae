"""Runs a script as torchrun would, on one GPU that all ranks share:

    torchrun --nproc-per-node 2 tests/gpu/shared_gpu.py SCRIPT [ARGUMENT ...]
    torchrun --nproc-per-node 2 tests/gpu/shared_gpu.py -m MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import os
import runpy
import sys

rank = os.environ["RANK"]
# NCCL refuses two ranks on one device of a host, so each says that it is a host of its own.
os.environ.update(LOCAL_RANK="0", NCCL_HOSTID=f"rank {rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
