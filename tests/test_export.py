"""
Runs the checks of `export_checks.py` in a process of their own: ONNX Runtime and OpenVINO in one interpreter with all
the libraries that the other tests load (pyarrow's allocator, datasets) crash it.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKS = Path(__file__).parent / "export_checks.py"
NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[tuple]]:
    """What became of the cases of each check: ("passed" or "skipped" or "failure" or "error", text)."""
    report = tmp_path_factory.mktemp("export") / "report.xml"
    command = [sys.executable, "-m", "pytest", str(CHECKS), f"--junitxml={report}", "-p", "no:cacheprovider"]
    if chosen := request.config.getoption("-m"):
        command += ["-m", chosen]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CHECKS.parent.parent)
    assert report.exists(), result.stdout + result.stderr
    found = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = [(child.tag, child.text or "") for child in case if child.tag in ("skipped", "failure", "error")]
        found[case.attrib["name"].split("[")[0]] += outcome or [("passed", "")]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_in_a_process_of_its_own(name: str, outcomes: dict[str, list[tuple]]) -> None:
    if name not in outcomes:
        pytest.skip("left out by -m")
    assert not [text for outcome, text in outcomes[name] if outcome in ("failure", "error")]
    skipped = [text for outcome, text in outcomes[name] if outcome == "skipped"]
    if len(skipped) == len(outcomes[name]):
        pytest.skip(skipped[0])
