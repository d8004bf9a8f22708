"""Backends that are plug-ins, from the host's side: with one that has no device behind it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import factors, write_adapter
from children import run_script
from gguf_files import split_file
from qwen2vl_q import DeviceError, Qwen2VL, Qwen2VLError, UnsupportedError, _native
from qwen2vl_q.cli.main import main
from qwen2vl_q.engine import devices
from qwen2vl_q.engine.stats import Stage
from qwen2vl_q.measure.limits import Limits

ROOT = Path(__file__).resolve().parent.parent
CC = shutil.which("cc")
INVALID, UNSUPPORTED, DEVICE, FAILED = 2, 3, 4, 5  # qwen2vl_status
DAMAGED = 1000  # the token after which the fake's logits are not numbers

pytestmark = [
    pytest.mark.skipif(CC is None, reason="needs a C compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree"),
]


@pytest.fixture(scope="module")
def compile_plugin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    folder = tmp_path_factory.mktemp("plugins")

    def build(name: str, *definitions: str) -> str:
        library = folder / f"{name}.so"
        source = ROOT / "tests" / "native" / "fake_plugin.c"
        flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        subprocess.run([str(CC), *flags, *definitions, str(source), "-o", str(library)], check=True)
        return str(library)

    return build


@pytest.fixture(scope="module")
def library(compile_plugin: Callable[..., str]) -> str:
    return compile_plugin("fake")


class Fake:
    """The plug-in, and what it has counted since the test began."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        for name in (
            "likeliest_calls",
            "kept_logits_calls",
            "forward_calls",
            "forward_without_logits",
            "page_copies",
        ):
            ctypes.c_int32.in_dll(self._library, f"fake_{name}").value = 0

    def __getattr__(self, name: str) -> int:
        kind = ctypes.c_int64 if name == "memory_bytes" else ctypes.c_int32
        return int(kind.in_dll(self._library, f"fake_{name}").value)


@pytest.fixture
def fake(library: str, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Installed, as it were."""
    monkeypatch.setenv(devices.PLUGIN_VARIABLE, library)
    for name in ("FAKE_DEVICES", "FAKE_FAIL", "FAKE_NOTE"):
        monkeypatch.delenv(name, raising=False)
    return Fake(library)


@pytest.fixture
def no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(devices, "_LIBRARY", "libnonesuch.so")


def on_cuda(path: Path, **options: Any) -> Qwen2VL:
    return Qwen2VL.from_gguf(path, n_ctx=256, **{"device": "cuda", **options})


def sequence_after(model: Qwen2VL, tokens: list[int]) -> _native.SequenceState:
    sequence = _native.SequenceState(model._native, 256)
    sequence.prefill(_native.Prompt(model._native, np.array(tokens, np.int32)), [])
    return sequence


# --- the library ----------------------------------------------------------------------------------


def test_libraries_that_are_no_plugins(
    compile_plugin: Callable[..., str], tmp_path: Path, tiny_gguf: Path
) -> None:
    text = tmp_path / "notes.so"
    text.write_text("not a library")
    for path, message in (
        (str(tmp_path / "missing.so"), "missing.so: expected a plug-in library, found no such file"),
        (str(tmp_path), "expected a plug-in library, found no such file"),
        (str(text), "notes.so: cannot be loaded: .*"),
        (compile_plugin("nameless", "-DFAKE_SYMBOL=something_else"), "not a plug-in: .* no qwen2vl_backend"),
        (compile_plugin("later", "-DFAKE_ABI=99"), "another version .* expected interface 2 .*, found 99 of"),
    ):
        with pytest.raises(DeviceError, match=message):
            _native.plugin_devices(path)
        with pytest.raises(DeviceError, match=message):
            _native.Model(str(tiny_gguf), device="cuda", plugin=path)


def test_where_the_library_is_looked_for(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.PLUGIN_VARIABLE, library)
    assert devices.cuda_plugin() == library
    monkeypatch.setenv(devices.PLUGIN_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(DeviceError, match=r"QWEN2VL_CUDA_PLUGIN: expected .*, found '.*gone\.so'"):
        devices.cuda_plugin()
    monkeypatch.delenv(devices.PLUGIN_VARIABLE)
    package = tmp_path / "qwen2vl_q_cuda"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('nobody needs to import me')")
    installed = package / devices._LIBRARY
    shutil.copy(library, installed)
    monkeypatch.syspath_prepend(tmp_path)
    assert devices.cuda_plugin() == str(installed)


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode elsewhere")
def test_a_library_whose_name_is_not_utf8(library: str, tiny_gguf: Path, tmp_path: Path) -> None:
    good, bad = (os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/\xff.so", b"/\xfe.so"))
    shutil.copy(library, good)
    assert _native.Model(str(tiny_gguf), device="cuda", plugin=good).device == "Fake, made of C"
    Path(bad).write_text("not a library")
    with pytest.raises(DeviceError, match=r"/\\xfe\.so: cannot be loaded: "):
        _native.plugin_devices(bad)


def test_adapters_are_computed_on_the_cpu_alone(fake: Fake, tiny_gguf: Path, tmp_path: Path) -> None:
    tensors = factors(np.random.default_rng(0), "model.layers.0.self_attn.q_proj", (64, 64), 4)
    adapter = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(UnsupportedError, match="device cuda: adapters are computed on the CPU alone"):
        on_cuda(tiny_gguf, lora=adapter)
    model = on_cuda(tiny_gguf, lora=adapter, device="auto")
    assert model.device == "cpu"
    assert model.note.startswith("computing on the CPU: device cuda: adapters are")


def test_devices_are_listed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DEVICES", "2")
    first, second = devices.cuda_devices()
    assert first == devices.Device(0, "Fake 0", 8_000_000_000, 6_000_000_000, (12, 3), 3)
    assert (second.index, second.name) == (1, "Fake 1")
    monkeypatch.setenv("FAKE_DEVICES", "0")
    with pytest.raises(DeviceError, match=r"^no driver was found$"):
        devices.cuda_devices()


def test_limits_of_a_device(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limits.measure_device(0, 0.01) == Limits("Fake 0", 0, 4e12, 4e12, 1e12, 2e11)
    with pytest.raises(DeviceError, match="cuda:1: there is no such device"):
        Limits.measure_device(1)
    with pytest.raises(ValueError, match="seconds: expected"):
        _native.measure_device_limits(fake.path, 0, 0.0)
    monkeypatch.setenv("FAKE_FAIL", f"measure_limits={DEVICE}")
    with pytest.raises(DeviceError, match="measure_limits: the fake fails"):
        Limits.measure_device(0)


# --- which device ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ":1", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "CUDA", "cuda:9999999999", "cpu:1", "auto:0"]
)
def test_names_that_are_no_devices(name: str, tiny_gguf: Path) -> None:
    for load in (
        lambda: Qwen2VL.from_gguf(tiny_gguf, device=name),
        lambda: _native.Model(str(tiny_gguf), device=name),
    ):
        with pytest.raises(ValueError, match=r"device: expected .*cuda:.* or auto, found '"):
            load()


def test_names_of_no_backend(fake: Fake, tiny_gguf: Path, tmp_path: Path) -> None:
    """Are told before the file is read."""
    for path in (tiny_gguf, tmp_path / "none.gguf"):
        for device in ("gpu", "tpu:1"):
            with pytest.raises(
                DeviceError, match=rf"device {device[:3]}: there is no such backend, only cpu, cuda$"
            ):
                _native.Model(path, device=device, plugin=fake.path)
            with pytest.raises(DeviceError, match=r": there is no such backend, only cpu$"):
                _native.Model(path, device=device)
    with pytest.raises(DeviceError, match="device gpu: there is no such backend, only cpu, cuda"):
        Qwen2VL.from_gguf(tiny_gguf, device="gpu")


def test_cpu_asks_no_plugin(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.PLUGIN_VARIABLE, "/nowhere.so")
    model = Qwen2VL.from_gguf(tiny_gguf)
    assert (model.device, model.note) == ("cpu", "") and model.n_threads > 0


def test_a_device_that_is_there(fake: Fake, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DEVICES", "2")
    monkeypatch.setenv("FAKE_NOTE", "1 of 2 layers stay in the host's memory")
    model = on_cuda(tiny_gguf, device="cuda:1", precision="exact")
    assert (model.device, model.isa, model.n_threads) == ("Fake, made of C", "Fake, made of C", 0)
    assert model.note == "1 of 2 layers stay in the host's memory"
    assert "exact, Fake, made of C, n_ctx" in repr(model)
    assert (fake.device, fake.more_devices, fake.exact, fake.memory_bytes) == (1, 0, 1, 0)
    _native.Model(str(tiny_gguf), device="cuda", plugin=fake.path, device_memory=12345)
    assert (fake.device, fake.more_devices, fake.exact, fake.memory_bytes) == (0, 1, 0, 12345)
    with pytest.raises(ValueError, match="device_memory: expected 0"):
        _native.Model(str(tiny_gguf), device="cuda", plugin=fake.path, device_memory=-1)


def test_devices_that_are_not_there(fake: Fake, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda:1", "cuda:3"):
        with pytest.raises(DeviceError, match=rf"{name}: there is no such device, only cuda:0 \(Fake 0\)"):
            on_cuda(tiny_gguf, device=name)
    monkeypatch.setenv("FAKE_DEVICES", "0")
    with pytest.raises(DeviceError, match="device cuda: no driver was found"):
        on_cuda(tiny_gguf)
    model = on_cuda(tiny_gguf, device="auto")
    assert (model.device, model.note) == ("cpu", "computing on the CPU: device cuda: no driver was found")
    assert len(list(model.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True))) == 2


@pytest.mark.usefixtures("no_plugin")
def test_without_a_plugin(tiny_gguf: Path) -> None:
    with pytest.raises(DeviceError, match="not installed; pip install qwen2vl-q-cuda"):
        on_cuda(tiny_gguf)
    with pytest.raises(DeviceError, match="not installed; pip install qwen2vl-q-cuda"):
        devices.cuda_devices()
    model = on_cuda(tiny_gguf, device="auto")
    assert (model.device, model.note) == ("cpu", "")


def test_auto_takes_what_works(fake: Fake, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cuda(tiny_gguf, device="auto").device == "Fake, made of C"
    monkeypatch.setenv("FAKE_FAIL", f"create={DEVICE}")  # too little memory, say
    model = on_cuda(tiny_gguf, device="auto", precision="exact")
    assert (model.device, model.note) == ("cpu", "computing on the CPU: create: the fake fails")
    exact = Qwen2VL.from_gguf(tiny_gguf, precision="exact")
    assert np.array_equal(model.logits([1, 2, 3]), exact.logits([1, 2, 3]))
    monkeypatch.setenv("FAKE_FAIL", f"create={UNSUPPORTED}")
    with pytest.raises(UnsupportedError, match="create: the fake fails"):
        on_cuda(tiny_gguf, device="auto")


# --- the backend ----------------------------------------------------------------------------------


def test_the_plugin_is_given_every_weight(fake: Fake, tiny_gguf: Path, tmp_path: Path) -> None:
    """From one file, and from parts of one."""
    file = _native.GgufFile(str(tiny_gguf))
    expected = sum(int(file.raw(tensor.name).sum(dtype=np.int64)) for tensor in file.tensors)
    assert on_cuda(tiny_gguf).read_weights() == expected
    assert on_cuda(split_file(tiny_gguf, tmp_path, 20)[1]).read_weights() == expected


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (INVALID, ValueError),
        (UNSUPPORTED, UnsupportedError),
        (DEVICE, DeviceError),
        (FAILED, Qwen2VLError),
        (99, Qwen2VLError),
    ],
)
def test_statuses_become_errors(
    status: int, error: type[Exception], fake: Fake, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(call: str, run: Callable[[], object]) -> None:
        monkeypatch.setenv("FAKE_FAIL", f"{call}={status}")
        with pytest.raises(error, match=f"^{call}: the fake fails$") as raised:
            run()
        assert raised.type is error
        monkeypatch.delenv("FAKE_FAIL")

    fails("devices", devices.cuda_devices)
    fails("create", lambda: on_cuda(tiny_gguf))
    model = on_cuda(tiny_gguf)
    sequence = sequence_after(model, [1, 2])
    fails("new_page", lambda: sequence_after(model, [1, 2]))
    fails("forward", lambda: sequence.accept(3))
    sequence = sequence_after(model, [1, 2])
    fails("likeliest", lambda: sequence.sample(_native.Sampler()))
    fails("kept_logits", lambda: sequence.logits)
    fails("encode_vision", lambda: model.encode_image(np.zeros((56, 56, 3), np.uint8)))
    fails("start_profile", model._native.start_profile)
    fails("stop_profile", model._native.stop_profile)
    fails("read_weights", model.read_weights)


def test_greedy_tokens_need_no_logits(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    assert list(model.generate([7, 8, 9], max_new_tokens=4, ignore_eos=True)) == [10, 11, 12, 13]
    assert (fake.likeliest_calls, fake.kept_logits_calls) == (4, 0)
    assert fake.forward_without_logits == fake.forward_calls == 4
    assert model.last_stats.kv_bytes == 2 * 400  # pages of four cells


def test_where_logits_stay_nothing_is_guessed(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    assert not model._native.can_guess
    known = [10, 11, 12, 13, 7, 8, 9]  # 10 and on follow once more
    assert list(model.generate(known, max_new_tokens=4, ignore_eos=True)) == known[:4]
    assert model.last_stats.guessed_tokens == 0 and fake.forward_calls == 4
    sequence = sequence_after(model, [1, 2])
    sequence.push(3)
    with pytest.raises(ValueError, match="guess: this device computes tokens one at a time"):
        sequence.guess([4])


@pytest.mark.parametrize(
    ("sampling", "fetched"),
    [
        ({"temperature": 0.5, "top_k": 1}, 0),
        ({"temperature": 1.0, "top_p": 0.001, "seed": 1}, 4),  # of the likeliest alone
        ({"repetition_penalty": 1.01}, 4),
    ],
)
def test_other_samplers_fetch_them_once_a_token(
    sampling: dict[str, Any], fetched: int, fake: Fake, tiny_gguf: Path
) -> None:
    tokens = on_cuda(tiny_gguf).generate([7, 8, 9], max_new_tokens=4, ignore_eos=True, **sampling)
    assert list(tokens) == [10, 11, 12, 13]
    assert (fake.likeliest_calls, fake.kept_logits_calls) == (4 - fetched, fetched)


def test_logits_are_fetched_once(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    sequence = sequence_after(model, [5, 6])
    assert fake.kept_logits_calls == 0
    assert sequence.logits.argmax() == sequence.logits.argmax() == 7
    assert sequence.sample(_native.Sampler()) == 7  # what is here need not be asked for
    assert (fake.likeliest_calls, fake.kept_logits_calls) == (0, 1)
    sequence.accept(20)
    assert sequence.logits.argmax() == 21 and fake.kept_logits_calls == 2


def test_all_rows_are_written(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    tokens = list(range(1, 30))  # in pieces: the fake takes 8 rows
    assert model.logits(tokens).argmax(axis=-1).tolist() == [token + 1 for token in tokens]
    assert (fake.forward_calls, fake.forward_without_logits) == (4, 0)


def test_logits_that_are_not_numbers(fake: Fake, tiny_gguf: Path) -> None:
    sequence = sequence_after(on_cuda(tiny_gguf), [DAMAGED])
    with pytest.raises(Qwen2VLError, match="the model's logits are not numbers: the weights are damaged"):
        sequence.sample(_native.Sampler())


def test_what_is_common_is_not_computed_again(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    list(model.generate([7, 8, 9], max_new_tokens=4, ignore_eos=True))
    assert list(model.generate([7, 8, 30], max_new_tokens=2, ignore_eos=True)) == [31, 32]
    assert model.last_stats.reused_tokens == 2
    assert (model.last_stats.kv_bytes, fake.page_copies) == (3 * 400, 1)  # both answers can be gone on with


def test_progress_and_cancelling(fake: Fake, tiny_gguf: Path) -> None:
    """Exceptions pass over the C interface as a number and come out behind it as they were."""

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop(f"{done} of {total}")

    with pytest.raises(Stop, match=r"^\d of 2$"):
        _native.Model(str(tiny_gguf), device="cuda", plugin=fake.path, progress=stop)
    model = on_cuda(tiny_gguf)
    sequence = sequence_after(model, [1, 2])
    prompt = _native.Prompt(model._native, np.array([1, 2, 3, 4], np.int32))
    assert sequence.reuse(prompt) == 2
    with pytest.raises(Stop):
        sequence.prefill(prompt, [], progress=stop)
    assert sequence.n_cells == 2
    with pytest.raises(ValueError, match="not finished"):
        sequence.accept(5)
    sequence.prefill(prompt, [])
    assert sequence.n_cells == 4 and sequence.sample(_native.Sampler()) == 5
    with pytest.raises(Stop):
        patches = np.zeros((16, 3 * 2 * 14 * 14), np.float32)
        _native.VisionPass(model._native, patches, (1, 4, 4)).advance(progress=stop)


def test_the_first_picture_reads_the_file(fake: Fake, tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_gguf, path)
    model = on_cuda(path)
    assert model.weight_bytes == 1000
    path.write_bytes(path.read_bytes())  # another time of change
    with pytest.raises(Qwen2VLError, match=r"model\.gguf"):
        model.encode_image(np.zeros((56, 56, 3), np.uint8))
    model = on_cuda(path)
    assert model.encode_image(np.zeros((56, 56, 3), np.uint8)).shape == (4, 64)
    assert model.weight_bytes == 2000
    path.write_bytes(path.read_bytes())  # no longer needed
    model.encode_image(np.full((56, 56, 3), 9, np.uint8))


def resident_bytes(path: Path) -> int:
    """Of the mappings of a file, in this process."""
    mapping = re.escape(str(path)) + r"\nSize:.*(?:\n.*)*?\nRss: +(\d+) kB"
    return 1024 * sum(map(int, re.findall(mapping, Path("/proc/self/smaps").read_text(errors="replace"))))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_pages_of_the_file_are_given_back(fake: Fake, tiny_gguf: Path, tmp_path: Path) -> None:
    """Once the weights have been copied to where they are used: by the first picture all are."""
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_gguf, path)
    model = on_cuda(path)
    assert resident_bytes(path) == 0
    model.read_weights()  # the fake adds up the file's own bytes
    assert resident_bytes(path) > 0.8 * path.stat().st_size
    model.encode_image(np.zeros((56, 56, 3), np.uint8))
    assert resident_bytes(path) == 0
    del model
    assert str(path) not in Path("/proc/self/maps").read_text(errors="replace")


def test_profile(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    with model.profile() as stages:
        list(model.generate([1], max_new_tokens=3, ignore_eos=True))
    (stage,) = stages
    assert stage == Stage("text all", 3, 1e-3, int8_ops=1e6, float_ops=2e6, bytes=3e6)


# --- lifetimes and threads ------------------------------------------------------------------------


def test_pages_end_before_their_backend(fake: Fake, tiny_gguf: Path) -> None:
    gc.collect()  # what other tests have left
    backends, pages = fake.live_backends, fake.live_pages
    model = on_cuda(tiny_gguf)
    sequence = sequence_after(model, [1, 2])
    assert (fake.live_backends, fake.live_pages) == (backends + 1, pages + 1)
    del model
    assert fake.live_backends == backends + 1  # the sequence needs it
    sequence.accept(3)
    del sequence
    assert (fake.live_backends, fake.live_pages) == (backends, pages)
    assert fake.pages_left_behind == 0


def test_pages_dropped_during_a_call_are_given_back_after_it(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    dropped = [sequence_after(model, [1])]
    during = []

    def drop(done: int, total: int) -> None:
        dropped.clear()
        during.append(fake.live_pages)

    before = fake.live_pages
    prompt = _native.Prompt(model._native, np.array([2, 3], np.int32))
    sequence = _native.SequenceState(model._native, 16)
    sequence.prefill(prompt, [], progress=drop)
    assert during == [before + 1] and model._native.idle_pages == 1
    model._native.forget()
    assert fake.live_pages == before
    del sequence
    model._native.limit_cache(400)
    assert model._native.idle_pages == 1  # until its memory is needed
    kept = [sequence_after(model, [4])]
    assert (model._native.idle_pages, fake.live_pages) == (0, before + len(kept) - 1)
    assert fake.overlapping_calls == 0


def test_calls_go_one_at_a_time(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    found = []

    def work(first: int) -> None:
        for _ in range(50):
            sequence = sequence_after(model, [first, first + 1])
            sequence.accept(sequence.sample(_native.Sampler()))
            found.append((first, int(sequence.logits.argmax())))

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted((100 * i, 100 * i + 3) for i in range(4) for _ in range(50))
    assert fake.overlapping_calls == 0


def test_streams_share_the_pages_of_what_they_have_in_common(fake: Fake, tiny_gguf: Path) -> None:
    model = on_cuda(tiny_gguf)
    before = fake.live_pages
    prompt = list(range(7, 15))  # two pages
    first, second = (model.generate([*prompt, n], max_new_tokens=20, ignore_eos=True) for n in (90, 50))
    found = [(next(first), next(second)) for _ in range(3)]
    assert found == [(91 + i, 51 + i) for i in range(3)]
    assert fake.live_pages == before + 2 + 2  # their own: the ninth cell and three more
    assert list(first) == list(range(94, 111)) and list(second) == list(range(54, 71))
    list(model.generate([*prompt, 50, 51, 99], max_new_tokens=2, ignore_eos=True))
    assert model.last_stats.reused_tokens == 10 and fake.page_copies == 1  # of the part-filled third page
    assert fake.overlapping_calls == 0


def test_kept_logits_outlast_the_steps_of_others(fake: Fake, tiny_gguf: Path) -> None:
    """The plug-in keeps those of its last call: the host fetches what it still needs before the next."""
    model = on_cuda(tiny_gguf)
    waiting, asked = sequence_after(model, [5, 6]), sequence_after(model, [30])
    assert (fake.likeliest_calls, fake.kept_logits_calls) == (0, 1)
    greedy = _native.Sampler()
    for n in range(3):
        asked.accept(asked.sample(greedy))
        assert (fake.likeliest_calls, fake.kept_logits_calls) == (n + 1, 1)
    assert waiting.sample(greedy) == 7 and asked.sample(greedy) == 34
    waiting.accept(7)
    assert asked.logits.argmax() == 34 and waiting.logits.argmax() == 8


CALLBACK_CALLS_THE_MODEL = """
import sys
from qwen2vl_q import Qwen2VL, Qwen2VLError
model = Qwen2VL.from_gguf(sys.argv[1], n_ctx=64, device="cuda")
def progress(stage, done, total):
    for call in (model.reset, lambda: list(model.generate([3], max_new_tokens=2)), lambda: model.logits([3])):
        try:
            call()
        except Qwen2VLError as error:
            print(error)
print(list(model.generate([7, 8, 9], max_new_tokens=3, ignore_eos=True, progress=progress)))
"""


def test_a_callback_that_calls_its_model_is_told(fake: Fake, tiny_gguf: Path) -> None:
    *told, tokens = run_script(CALLBACK_CALLS_THE_MODEL, tiny_gguf, timeout=60).splitlines()
    assert set(told) == {"a call of the model is under way in this thread: its callback cannot make another"}
    assert (len(told) % 3, tokens) == (0, "[10, 11, 12]")


# --- the command line -----------------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_version_lists_devices(run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.splitlines()[1:] == ["device cuda:0: Fake 0, 8 GB, compute capability 12.3"]
    monkeypatch.setenv("FAKE_DEVICES", "0")
    assert run("--version")[1].splitlines()[1:] == ["no cuda device: no driver was found"]


@pytest.mark.usefixtures("no_plugin")
def test_version_without_a_plugin(run: Run) -> None:
    assert len(run("--version")[1].splitlines()) == 1


def test_chat_on_a_device(run: Run, fake: Fake, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-m", tiny_gguf, "-p", "a", "-n", 3, "--ctx", 99, "--device", "cuda"]
    code, _, err = run("chat", *options, "-v")
    assert code == 0 and "fast, Fake, made of C, n_ctx=99" in err and "note:" not in err
    monkeypatch.setenv("FAKE_NOTE", "half of it is elsewhere")
    assert run("chat", *options)[2].splitlines()[0] == "note: half of it is elsewhere"
    monkeypatch.setenv("FAKE_DEVICES", "0")
    assert run("chat", *options) == (1, "", "error: device cuda: no driver was found\n")


def test_demo_names_the_device(run: Run, fake: Fake, tmp_path: Path) -> None:
    code, _, err = run("demo", "-o", tmp_path / "card.png", "--device", "cuda")
    assert code == 0 and err.endswith(" tokens/s (Fake, made of C)\n")


def test_bench_on_a_device(run: Run, fake: Fake, tiny_gguf: Path) -> None:
    options = ["-m", tiny_gguf, "--only", "prefill", "--only", "decode", "--repeat", 1, "--decode-tokens", 3]
    code, out, err = run("bench", *options, "--device", "auto", "--json")
    assert code == 0, err
    (result,) = json.loads(out)
    assert (result["device"], result["isa"], result["n_threads"]) == ("Fake, made of C", "Fake, made of C", 0)
    assert result["limits_before"] == asdict(Limits("Fake 0", 0, 4e12, 4e12, 1e12, 2e11))
    assert result["decode"][0]["floor_seconds"] > 0 and result["prefill"][0]["floor_seconds"] > 0
    code, out, _ = run("bench", *options, "--device", "cuda:0")
    assert code == 0 and "Fake, made of C, fast" in out and "Limits of Fake, made of C. " in out


@pytest.mark.parametrize(
    ("command", "device", "code", "message"),
    [
        ("chat", "gpu:", 2, r"error: Invalid value for '--device': expected cpu, cuda, .* found 'gpu:' .*"),
        ("chat", "gpu", 1, "error: device gpu: there is no such backend, only cpu"),
        ("chat", "cuda", 1, "error: device cuda: its plug-in is not installed; pip install .*"),
        ("demo", "cuda:1", 1, "error: device cuda: its plug-in is not installed; pip install .*"),
        ("bench", "cuda", 1, "(measuring .*\n)error: device cuda: its plug-in is not installed; .*"),
    ],
)
@pytest.mark.usefixtures("no_plugin")
def test_device_errors_are_one_line(
    command: str,
    device: str,
    code: int,
    message: str,
    run: Run,
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"chat": ["-m", tiny_gguf, "-p", "a"], "demo": [], "bench": ["-m", tiny_gguf]}[command]
    found, _, err = run(command, *options, "--device", device)
    assert found == code and re.fullmatch(message + "\n", err), err
