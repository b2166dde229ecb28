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

# whole runs whose parts faster tests hold: the default tests must end within three minutes on two cores
SLOW = """test_tables test_every_row_runs_once[compare-few]; test_tables test_compare_takes_a_world;
test_tables test_worlds_; test_tables test_purity_of_a_tiny_world; test_readme test_ctrl_c_is_for;
test_readme test_run_sh_; test_report test_the_picture_of_what; test_closing test_a_bf16_run_resumes;
test_forks test_places_without; test_forks test_a_generator_says; test_forks test_an_ensemble_of_one;
test_forks test_the_models_of_the_lowest; test_forks test_a_centred_run; test_forks test_offline_trains;
test_gpu test_an_injected_bug; test_gpu test_a_run_is_the_same_byte_for_byte[rloo];
test_gpu test_a_run_is_the_same_byte_for_byte[gspo]; test_gpu test_bench_memory; test_real test_real_trains;
test_real test_both_forms; test_r2m test_a_run_writes_both_models_and_the_matrices[bfloat16];
test_hostile test_gspo_in_bf16; test_faults test_a_signal_saves_and_ends_well[2];
test_runs test_each_choice_changes[{'micro_tokens'; test_prime test_resume_goes_on;
test_forks test_another_curriculum; test_closing test_labels_that; test_runs test_each_choice_changes[{'cache_tokens';
test_hostile test_what_only_looks; test_faults test_odd_responses_make_no_bad_numbers[cut];
test_faults test_odd_responses_make_no_bad_numbers[mixed]"""

@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    """Mark them."""
    names = tuple(name.strip().replace(" ", ".py::") for name in SLOW.split(";"))
    for item in items:
        if item.nodeid.split("/")[-1].startswith(names):
            item.add_marker("slow")
