"""What the README says is so: its Python runs, and its two commands are the ones that checks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

REPORT_COMMAND = 'python -m pip install -c tests/constraints.txt -e ".[report]" && python -m functional_hess report'
TEST_COMMAND = 'python -m pip install -c tests/constraints.txt -e ".[test]" && python -m pytest'


def fences(text: str, language: str = "python") -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    found = re.finditer(rf"^```{language}[ \t]*\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


def run(text: str) -> int:
    """Run every Python fence in order, as one program would: names carry over. How many asserts there were."""
    namespace: dict = {"__name__": "readme"}
    blocks = fences(text)
    for line, source in blocks:
        # Blank lines in front make a traceback point into the README.
        exec(compile("\n" * (line - 1) + source, str(README), "exec"), namespace)
    return sum(len(re.findall(r"^\s*assert\b", source, re.MULTILINE)) for _, source in blocks)


@pytest.fixture
def readme() -> str:
    assert README.is_file(), "README.md is missing: its examples are part of the tests"
    return README.read_text(encoding="utf-8")


def test_python_in_the_readme_runs_and_asserts_what_it_says(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(readme) > 0, "README.md shows no Python that asserts anything"


def test_commands_of_the_readme_are_in_it_once(readme):
    lines = [line.strip().removeprefix("$ ") for line in readme.splitlines()]
    assert lines.count(REPORT_COMMAND) == 1 and lines.count(TEST_COMMAND) == 1


def test_checks_run_the_test_command_of_the_readme():
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_extras_and_constraints_of_the_commands_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert {"report", "test"} <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    pins = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^torch==([\d.]+)$", pins, re.MULTILINE)
    assert f'"torch=={pinned}"' in extras


def test_fences_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\nassert x == 1\n```\n"
    assert fences(text) == [(3, "x = 1\n"), (9, "assert x == 1\n")]
    assert run(text) == 1


def test_a_wrong_statement_in_a_readme_is_noticed():
    with pytest.raises(AssertionError):
        run("```python\nx = 1\n```\n```python\nassert x == 2\n```\n")
