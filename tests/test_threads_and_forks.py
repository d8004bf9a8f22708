"""Threads, forks and callbacks that meet in one model."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from threading import Event, Thread

import pytest

from children import run_script
from qwen2vl_q import Qwen2VL

IDS = list(range(3, 100))
ROWS = 512  # of a step
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


# --- forks ----------------------------------------------------------------------------------------

CHILD_COMPUTES = """
import multiprocessing, sys
import numpy as np
from qwen2vl_q import Qwen2VL

model = Qwen2VL.from_gguf(sys.argv[1], n_threads=4)
ids = list(range(3, 100))
expected = model.logits(ids)

def child(pipe):
    global model
    pipe.send((model.logits(ids), list(model.generate(ids, max_new_tokens=3, ignore_eos=True))))
    del model  # ends the threads
    pipe.send("ended")

context = multiprocessing.get_context("fork")
for _ in range(2):
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60), "the child hangs"
    logits, tokens = ours.recv()
    np.testing.assert_array_equal(logits, expected)
    assert ours.poll(60) and ours.recv() == "ended"
    process.join(60)
    assert process.exitcode == 0
    assert list(model.generate(ids, max_new_tokens=3, ignore_eos=True)) == tokens
"""


@pytest.mark.forks
@needs_fork
def test_a_forked_child_computes_what_its_parent_does(tiny_gguf: Path) -> None:
    run_script(CHILD_COMPUTES, tiny_gguf)


STREAMS_GO_ON = """
import os, sys
from threading import Thread
from qwen2vl_q import Qwen2VL

model = Qwen2VL.from_gguf(sys.argv[1], n_threads=2, precision="exact")
def stream(n):
    return model.generate(list(range(3, n)), max_new_tokens=30, ignore_eos=True)
expected = [list(stream(n)) for n in (70, 100)]
streams = [stream(n) for n in (70, 100)]
found = [[next(tokens)] for tokens in streams]
sleeper = Thread(target=lambda: found[1].append(next(streams[1])))
sleeper.start()
sleeper.join()
pid = os.fork()
same = all(part + list(tokens) == whole for part, tokens, whole in zip(found, streams, expected))
same = same and list(stream(50)) == list(stream(50))
if pid == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


@pytest.mark.forks
@needs_fork
def test_streams_go_on_on_both_sides_of_a_fork(tiny_gguf: Path) -> None:
    run_script(STREAMS_GO_ON, tiny_gguf, timeout=60)


CHILD_OF_A_BUSY_PARENT = """
import os, select, sys, threading
from qwen2vl_q import Qwen2VL, Qwen2VLError

model = Qwen2VL.from_gguf(sys.argv[1], n_threads=2)
computing, forked = threading.Event(), threading.Event()

def progress(stage, done, total):
    computing.set()
    forked.wait(60)

ids = list(range(3, 100))
call = {
    "generate": lambda **k: list(model.generate(ids, max_new_tokens=1, **k)),
    "logits": lambda **k: model.logits(ids, **k),
}
thread = threading.Thread(target=call[sys.argv[2]], kwargs={"progress": progress})
thread.start()
computing.wait(60)
reads, writes = os.pipe()
pid = os.fork()
if pid == 0:
    for name in ("generate", "logits"):
        try:
            call[name]()
            os.write(writes, b"computed;")
        except Qwen2VLError as error:
            os.write(writes, str(error).encode() + b";")
    os._exit(0)
os.close(writes)
said = b""
while select.select([reads], [], [], 30)[0] and (more := os.read(reads, 1000)):
    said += more
forked.set()
thread.join()
os.kill(pid, 9)
print(said.decode())
assert call["generate"]()
"""


@pytest.mark.forks
@needs_fork
@pytest.mark.parametrize("call", ["generate", "logits"])
def test_a_child_forked_during_a_call_is_told(call: str, tiny_gguf: Path) -> None:
    """The thread that holds the model is not there: nothing in the child may wait for it."""
    said = run_script(CHILD_OF_A_BUSY_PARENT, tiny_gguf, call)
    assert said.count("another thread was computing with the model when this process was forked") == 2


FORK_IN_A_CALLBACK = """
import os, sys
import numpy as np
from qwen2vl_q import Qwen2VL

model = Qwen2VL.from_gguf(sys.argv[1], n_threads=4, precision="exact")
ids = list(range(3, 600))
expected = model.logits(ids)
pids = []
def progress(stage, done, total):
    if not pids:
        pids.append(os.fork())
same = np.array_equal(model.logits(ids, progress=progress), expected)
same = same and np.array_equal(model.logits(ids), expected)
if pids[0] == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
"""


@pytest.mark.forks
@needs_fork
def test_a_call_goes_on_in_a_child_that_its_own_callback_forked(tiny_gguf: Path) -> None:
    run_script(FORK_IN_A_CALLBACK, tiny_gguf, timeout=60)


# --- callbacks ------------------------------------------------------------------------------------

CALLBACK_CALLS_THE_MODEL = """
import sys
import numpy as np
from qwen2vl_q import Qwen2VL, Qwen2VLError

model = Qwen2VL.from_gguf(sys.argv[1], n_threads=2, n_ctx=512)
ids = list(range(3, 100))
rng = np.random.default_rng(0)
def profile():
    with model.profile():
        pass
calls = {
    "generate": lambda progress=None: list(model.generate(ids, max_new_tokens=2, progress=progress)),
    "chat": lambda progress=None: model.chat(
        [{"role": "user", "content": [
            {"type": "image", "image": rng.integers(0, 256, (56, 84, 3), np.uint8)}]}],
        stream=False, max_new_tokens=2, progress=progress),
    "logits": lambda progress=None: model.logits(ids, progress=progress),
    "encode_image": lambda progress=None: model.encode_image(
        rng.integers(0, 256, (56, 84, 3), np.uint8), progress),
    "reset": model.reset,
    "profile": profile,
    "read_weights": model.read_weights,
}
said = set()
def progress(stage, done, total):
    model.last_stats, model.tokenize("a"), model.weight_bytes  # these may be asked for
    for name, call in calls.items():
        try:
            call()
            said.add(name + " went through")
        except Qwen2VLError as error:
            said.add(str(error))

before = list(model.generate(ids, max_new_tokens=5, ignore_eos=True))
model.reset()
calls[sys.argv[2]](progress)  # goes on: the callback has caught the errors
assert list(model.generate(ids, max_new_tokens=5, ignore_eos=True)) == before
print(*said, sep="\\n")
"""


@pytest.mark.parametrize("outer", ["generate", "chat", "logits", "encode_image"])
def test_a_callback_that_calls_its_model_is_told(outer: str, tiny_gguf: Path) -> None:
    said = run_script(CALLBACK_CALLS_THE_MODEL, tiny_gguf, outer, timeout=60)
    assert said.splitlines() == [
        "a call of the model is under way in this thread: its callback cannot make another"
    ]


# --- threads --------------------------------------------------------------------------------------


def test_stats_may_be_asked_for_while_a_call_computes(tiny: Qwen2VL) -> None:
    """They wait for nothing."""
    computing, asked = Event(), Event()

    def progress(stage: str, done: int, total: int) -> None:
        computing.set()
        assert asked.wait(60)

    thread = Thread(target=lambda: list(tiny.generate(IDS, max_new_tokens=1, progress=progress)))
    thread.start()
    assert computing.wait(60)
    during = tiny.last_stats
    asked.set()
    thread.join()
    assert (during.prompt_tokens, during.kv_bytes) == (len(IDS), 0)
    assert tiny.last_stats.kv_bytes == tiny._native.cache_bytes > 0
    tiny.reset()
    assert tiny.last_stats.kv_bytes == tiny._native.cache_bytes == 0


def test_a_cancelled_prefill_keeps_whole_steps(tiny: Qwen2VL) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done > ROWS or total <= ROWS:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(tiny.generate(IDS, progress=stop))
    assert tiny.last_stats.kv_bytes == tiny._native.cache_bytes == 0
    long = (IDS * 20)[: 2 * ROWS + 100]
    with pytest.raises(InterruptedError):
        list(tiny.generate(long, progress=stop))
    assert tiny.last_stats.kv_bytes == tiny._native.cache_bytes > 0
    assert len(list(tiny.generate(long, max_new_tokens=1))) == 1
    assert tiny.last_stats.reused_tokens in (ROWS, 2 * ROWS)


def test_a_call_that_ends_writes_into_its_own_stats(tiny: Qwen2VL) -> None:
    first = tiny.generate(IDS, max_new_tokens=3, ignore_eos=True)
    next(first)
    second = tiny.generate(IDS[:50], max_new_tokens=2, ignore_eos=True)
    assert tiny.last_stats.prompt_tokens == len(IDS)  # until the other begins
    next(second)
    assert len(list(first)) == 2
    assert tiny.last_stats.prompt_tokens == 50
    assert len(list(second)) == 1
    assert (tiny.last_stats.prompt_tokens, tiny.last_stats.finish_reason) == (50, "length")


TOO_MANY_THREADS = """
import resource, sys
from qwen2vl_q import Qwen2VL, Qwen2VLError, _native
def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096
_native.GgufFile(sys.argv[1]).metadata
resource.setrlimit(resource.RLIMIT_AS, (address_space() + (400 << 20),) * 2)
try:
    Qwen2VL.from_gguf(sys.argv[1], n_threads=1024)
except Qwen2VLError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of the address space")
def test_more_threads_than_the_system_gives(tiny_gguf: Path) -> None:
    (said,) = run_script(TOO_MANY_THREADS, tiny_gguf).splitlines()
    found = re.fullmatch(r"n_threads: expected 1024 threads, the system gives only (\d+): .+", said)
    assert found and 1 <= int(found[1]) < 1024
