"""What the machine has and what to expect of it: `qwen2vl-q doctor`."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from command_line import Run
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.engine.stats import Stage
from qwen2vl_q.measure import checkup, expectation
from qwen2vl_q.measure import machine as machines
from qwen2vl_q.measure.benchmark import Benchmark, Settings, drawn_picture
from qwen2vl_q.measure.limits import Limits

LIMITS = Limits("avx2", 4, 1e12, 5e11, 5e11, 50e9)


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what the environment forces nor what this machine happens to lack."""
    monkeypatch.delenv("QWEN2VL_ISA", raising=False)
    monkeypatch.delenv("QWEN2VL_CUDA_PLUGIN", raising=False)
    monkeypatch.setattr(checkup, "_devices", lambda: ((), []))
    monkeypatch.setattr(machines, "_memory", lambda: machines.Memory(2**35, 2**34, None))
    monkeypatch.setattr(Limits, "measure", lambda isa, threads, seconds: LIMITS)


def processors(*counts: int, quota: float | None = None) -> machines.Processors:
    logical, cores, fast, threads = counts
    return machines.Processors(logical, cores, fast, quota, threads)


def test_what_it_prints(run: Run) -> None:
    code, out, err = run("doctor")
    assert code == 0 and err == "measuring for about five seconds\n"
    best = _native.supported_isas()[0]
    assert any(line.split()[:3] == [best, "in", "use:"] for line in out.splitlines())
    for name in (
        "processor",
        "threads",
        "memory     34.4 GB, available 17.2 GB",
        "8-bit products   1,000 Gop/s",
    ):
        assert name in out
    small, large = (line.split() for line in out.splitlines() if line.split()[:1] in (["2B"], ["7B"]))
    assert [small[i] for i in (2, 4, 6, 8)] == ["s", "tokens/s", "tokens/s", "GB"]
    assert float(small[3]) > float(large[3]) and float(small[7]) < float(large[7])


def test_nothing_is_measured_where_nobody_wants_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "measure", lambda *_: pytest.fail("measured"))
    code, out, err = run("doctor", "--no-limits")
    assert (code, err) == (0, "") and "Kernels" in out and "Limits" not in out and "7B" not in out


def test_json(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == {"machine", "devices", "limits", "expectations", "findings"}
    assert found["machine"]["processors"]["threads"] == _native.default_thread_count()
    assert [each["name"] for each in found["machine"]["sets"] if each["runs"]] == _native.supported_isas()
    assert [each["model"] for each in found["expectations"]] == ["2B", "7B"]


def test_a_forced_instruction_set_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_ISA", "generic")
    _, out, _ = run("doctor")
    assert "in use: QWEN2VL_ISA forces it" in out
    if _native.supported_isas()[0] != "generic":
        assert "hint  QWEN2VL_ISA forces generic" in out
    monkeypatch.setenv("QWEN2VL_ISA", "nonesuch")
    code, out, err = run("doctor")
    assert (code, out) == (1, "") and "error: QWEN2VL_ISA: expected one of" in err


def test_every_set_of_this_machine_is_known_and_lacks_nothing() -> None:
    """The table of what sets need is the one that dispatch goes by."""
    _, features = machines._processor()
    found = machines.instruction_sets(["generic"], platform.machine(), features)
    known = {each.name: each.lacks for each in found}
    for name in _native.supported_isas():
        assert name in known
        assert features is None or known[name] == ()


@pytest.mark.parametrize(
    ("machine", "features", "lacks"),
    [
        ("x86_64", frozenset({"avx2", "fma", "f16c", "avx512f"}), {"avx512_bf16", "avx512", "avxvnni"}),
        ("AMD64", None, {"avx512_bf16", "avx512", "avxvnni", "avx2"}),
        ("arm64", frozenset({"asimd", "asimddp"}), {"i8mm"}),
        ("riscv64", frozenset(), set()),
    ],
)
def test_what_a_processor_lacks(machine: str, features: frozenset[str] | None, lacks: set[str]) -> None:
    found = machines.instruction_sets(["generic"], machine, features)
    assert {each.name for each in found if each.lacks} == lacks
    assert found[-1] == machines.InstructionSet("generic", True)
    if machine == "x86_64":
        assert found[1].lacks == ("avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
        assert found[3] == machines.InstructionSet("avx2", False)  # the processor has it, the build not


@pytest.mark.parametrize(
    ("found", "threads", "hint"),
    [
        (processors(8, 8, 8, 8), "8, one for each core", ""),
        (processors(20, 14, 6, 6), "6, one for each fast core", "8 slower cores are left out: -t 14"),
        (
            processors(8, 8, 8, 3, quota=2.5),
            "3, what the cgroup's quota of 2.5",
            "quota is 2.5 processors of 8",
        ),
        (processors(4, 4, 4, 4, quota=16.0), "4, one for each core", ""),
    ],
)
def test_threads_and_why(
    run: Run, monkeypatch: pytest.MonkeyPatch, found: machines.Processors, threads: str, hint: str
) -> None:
    monkeypatch.setattr(machines, "_processors", lambda: found)
    code, out, _ = run("doctor")
    assert code == 0 and f"threads    {threads}" in out
    assert hint in out and (hint or "cores are" not in out)


def test_too_little_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_memory", lambda: machines.Memory(2**33, 2**32, None))
    code, out, _ = run("doctor")
    assert code == 0 and "hint  a 7B takes about" in out and "hint  a 2B" not in out
    monkeypatch.setattr(machines, "_memory", lambda: machines.Memory(2**33, 2**30, 2**30))
    code, out, _ = run("doctor")
    assert code == 1 and "problem  a 2B takes about" in out and "the cgroup's limit 1.1 GB" in out


def test_a_plugin_that_does_not_work_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Limits, "measure", lambda isa, threads, seconds: LIMITS)
    monkeypatch.setenv("QWEN2VL_CUDA_PLUGIN", "/nonesuch.so")
    code, out, _ = run("doctor")
    assert code == 1 and "problem  QWEN2VL_CUDA_PLUGIN: expected the path of a plug-in" in out


def test_what_extras_would_bring(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "find_spec", lambda module: None)
    assert "needs matplotlib: pip install 'qwen2vl-q[plot]'" in run("doctor")[1]
    monkeypatch.setattr(checkup, "find_spec", lambda module: module)
    assert "pip install" not in run("doctor")[1]


def test_memory_is_counted() -> None:
    total, available = machines._posix_memory()
    assert available is None or (total is not None and 0 < available <= total)


# --- what to expect ---


def counted(stages: list[Stage], kind: str) -> list[float]:
    """8-bit and floating-point operations."""
    some = [stage for stage in stages if stage.name.startswith(kind)]
    return [sum(stage.int8_ops for stage in some), sum(stage.float_ops for stage in some)]


def test_operations_are_those_that_the_engine_counts() -> None:
    model, size = Qwen2VL.from_gguf(DEMO_MODEL, 1), (224, 140)
    bench = Benchmark(model, Settings(str(DEMO_MODEL)))
    vision, text = model.config.vision_config, model.config.text_config
    assert vision is not None
    with model.profile() as stages:
        model.encode_image(drawn_picture(size))
    patches = expectation.patches(vision, size)
    assert counted(stages, "image") == counted(expectation.image_stages(vision, patches), "image")
    with model.profile() as stages:
        bench.tokens_after(bench.prompt(40), 1)
    linear = [stage for stage in stages if not stage.is_attention]
    assert counted(linear, "text") == counted(expectation.prefill_stages(text, 40), "text")
    tokens = bench.decode(0).prepare()
    with model.profile() as stages:
        n = sum(1 for _ in tokens)
    linear = [stage for stage in stages if not stage.is_attention]
    assert counted(linear, "text") == [n * ops for ops in counted(expectation.decode_stages(text), "text")]


def test_twice_the_machine_takes_half_the_time() -> None:
    faster = Limits("avx2", 8, 2e12, 1e12, 1e12, 100e9)
    for shape in expectation.SHAPES:
        a, b = expectation.expect(shape, LIMITS), expectation.expect(shape, faster)
        assert a.photo_seconds == pytest.approx(2 * b.photo_seconds)
        assert 2 * a.prefill_tokens_per_second == pytest.approx(b.prefill_tokens_per_second)
        assert 2 * a.decode_tokens_per_second == pytest.approx(b.decode_tokens_per_second)
        assert a.memory_bytes == b.memory_bytes


def test_a_model_takes_about_its_file_and_cache() -> None:
    small, large = expectation.SHAPES
    assert 1.7e9 < expectation.memory_bytes(small) < 2.1e9  # bench/README.md: 1.89 GB
    assert 5e9 < expectation.memory_bytes(large) < 7e9
    unknown = Limits("another", 4, 1e12, 5e11, 5e11, 50e9)
    assert expectation.expect(small, unknown).photo_seconds > 0


def test_the_set_that_is_forced_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def measure(isa: str, threads: int, seconds: float) -> Limits:
        asked.append((isa, threads))
        return LIMITS

    monkeypatch.setattr(Limits, "measure", measure)
    monkeypatch.setenv("QWEN2VL_ISA", "generic")
    assert checkup.check_up().limits == LIMITS
    assert asked == [("generic", _native.default_thread_count())]


def test_readable_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert machines._processor()[1] is None
    assert machines._posix_memory()[1] is None
