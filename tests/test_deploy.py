"""What deploy/ holds: that tools can read it, and that it names what there is."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import pytest

from qwen2vl_q.cli.serve import serve
from qwen2vl_q.serve.limits import Limits

DEPLOY = Path(__file__).parents[1] / "deploy"
pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="needs the source tree")

OPTIONS = {option for parameter in serve.params for option in parameter.opts}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_the_unit_starts_the_server_with_options_that_it_has() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(DEPLOY / "qwen2vl-q.service")
    command = shlex.split(unit["Service"]["ExecStart"])
    assert command[0].endswith("/qwen2vl-q")
    assert command[1] == "serve"
    assert {word for word in command if word.startswith("-")} <= OPTIONS
    assert unit["Service"]["DynamicUser"] == "yes"
    assert int(unit["Service"]["TimeoutStopSec"]) > Limits().stop_seconds


def test_the_image_starts_the_server_as_nobody_special() -> None:
    lines = (DEPLOY / "Dockerfile").read_text("utf-8").splitlines()
    steps = [line for line in lines if line and not line.startswith(("#", " "))]
    assert steps[-1].startswith("ENTRYPOINT")
    assert "USER server" in steps[steps.index(next(s for s in steps if s.startswith("RUN useradd"))) :]
    assert options_in(steps[-1]) <= OPTIONS
    assert any("/health" in line for line in lines)


@pytest.mark.parametrize("name", ["compose.yaml", "prometheus.yml"])
def test_yaml_can_be_read(name: str) -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    found = yaml.safe_load((DEPLOY / name).read_text("utf-8"))
    if name == "compose.yaml":
        command = found["services"]["server"]["command"]
        assert {word for word in command if word.startswith("-")} <= OPTIONS
        assert (DEPLOY.parent / found["services"]["server"]["build"]["dockerfile"]).is_file()
    else:
        assert found["scrape_configs"][0]["static_configs"][0]["targets"] == ["server:8080"]
