"""Put the repository root (save.py) and this folder (toy.py) on the path; keep the hub out of the tests."""
import os
import pathlib
import signal
import sys
import threading

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

torch.set_num_threads(1)  # models this small are slower on two
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
tqdm.set_lock(threading.RLock())  # its own is shared with forked processes: one that is killed would block all

@pytest.fixture(autouse=True)
def handlers():
    """Those that a process starts with: save.py replaces them for good."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The laptop world's files with tiny untrained models."""
    import toy
    path = tmp_path_factory.mktemp("world")
    toy.tiny_world(path)
    return path
